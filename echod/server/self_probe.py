"""A round trip through our own listener: it shows that clients are served, not only that the event loop runs.

Owns the client sockets of these checks, so that the server can recognize them and leave them out of the statistics.
"""

import asyncio
import errno
import socket
from collections.abc import Iterable

from echod.net.sockets import RawAddress

LINE, REPLY = b"are you well?\n", b"ARE YOU WELL?\n"

_TELLING = {errno.EPIPE, errno.ECONNRESET}
"""The errors that only a failing service causes. Any other error prevents the check and proves nothing about the
service: a sandbox, a firewall, a full backlog, no free port or descriptor."""

_GIVEN_UP = 16
"""How many checks without a reply are kept open until they are accepted; beyond that the oldest is closed."""

_PREDECESSORS_S = 5.0
"""How long a check that the predecessor started may still be accepted after a live upgrade."""

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (a key to look up, not an address to bind)


class SelfProbe:
    """Requests an echo from the service, as a client would.

    An accepted connection is a self-check if its peer address is that of a socket that we hold open and that was not
    accepted before: no other client can have that address while the socket is open. Therefore a check without a reply
    keeps its socket open until the server has accepted it.
    """

    def __init__(self) -> None:
        self._waiting: dict[RawAddress, socket.socket] = {}
        """The client sockets that are not accepted yet, by their address; the oldest first."""
        self._given_up: dict[RawAddress, socket.socket] = {}
        """The subset of `_waiting` whose check has ended without a reply."""
        self._predecessors: dict[RawAddress, float] = {}
        """Addresses of the predecessor's checks, and until when each may be accepted; their sockets are closed."""
        self._proven: socket.socket | None = None

    @property
    def names(self) -> list[RawAddress]:
        """The addresses of self-checks that have not been accepted yet."""
        return [*self._waiting, *self._predecessors]

    def expect(self, names: Iterable[RawAddress]) -> None:
        """Recognize these addresses as self-checks of the predecessor, for `_PREDECESSORS_S` from now."""
        until = asyncio.get_running_loop().time() + _PREDECESSORS_S
        self._predecessors.update(dict.fromkeys(names, until))

    def is_ours(self, peer: RawAddress) -> bool:
        """Whether a client that was just accepted is a self-check; call exactly once per accept."""
        if not self._waiting and not self._predecessors:
            return False
        if self._waiting.pop(peer, None):
            if given_up := self._given_up.pop(peer, None):
                given_up.close()
            return True
        return self._predecessors.pop(peer, 0.0) > asyncio.get_running_loop().time()

    async def passes(self, listener: socket.socket, deadline_s: float) -> bool:
        """Whether the correct reply arrived in time; also True if the check cannot be made.

        A missing reply counts as a failure only if this listener has replied before: a packet filter may block our own
        connections and nobody else's.
        """
        try:
            async with asyncio.timeout(deadline_s):
                is_right = await self._ask(listener.family, listener.getsockname())
        except TimeoutError:
            return listener is not self._proven
        except OSError as error:
            return error.errno not in _TELLING or listener.fileno() < 0
        self._proven = listener if is_right else self._proven
        return is_right

    async def _ask(self, family: int, target: RawAddress) -> bool:
        loop = asyncio.get_running_loop()
        client = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        name: RawAddress = ""
        try:
            client.bind(_own_name(family, target))
            name = client.getsockname()
            self._waiting[name] = client
            await loop.sock_connect(client, target)
            await loop.sock_sendall(client, LINE)
            reply = await loop.sock_recv(client, len(REPLY))
            return reply == REPLY
        finally:
            self._leave(name, client)

    def _leave(self, name: RawAddress, client: socket.socket) -> None:
        if name not in self._waiting or _is_unconnected(client):
            self._waiting.pop(name, None)
            client.close()
            return
        self._given_up[name] = client
        if len(self._given_up) > _GIVEN_UP:
            oldest = next(iter(self._given_up))
            del self._waiting[oldest]
            self._given_up.pop(oldest).close()


def _is_unconnected(client: socket.socket) -> bool:
    """Whether the server will never accept this socket: it was refused, or closing it ends its incomplete handshake."""
    try:
        client.getpeername()
    except OSError:
        return True
    return False


def _own_name(family: int, target: RawAddress) -> RawAddress:
    """Return what to bind to (any port, any name), so that our address is known before the listener sees it."""
    if family == socket.AF_UNIX or not isinstance(target, tuple):
        return ""  # any name in the abstract namespace (unix(7), autobind)
    host = _LOOPBACK.get(target[0], target[0])
    return (host, 0, *target[2:])
