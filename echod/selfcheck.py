"""A round trip through the own listener: proof that a client would be served, not only that the loop turns.

Owns the sockets that it asks with, so that nobody counts them as clients.
"""

import asyncio
import errno
import socket
from collections.abc import Iterable

from echod.sockets import SockAddr

LINE, REPLY = b"are you well?\n", b"ARE YOU WELL?\n"

_TELLING = {errno.EPIPE, errno.ECONNRESET}
"""What only a service that fails can make of a connection. Anything else keeps us from asking, and tells nothing about
it: a sandbox, a firewall, a full backlog, no port or descriptor left."""

_GIVEN_UP = 16
"""Checks without a reply that are remembered until they are accepted; the oldest one makes room for the next."""

_PREDECESSORS_S = 5.0
"""How long a check of the program before us is expected to be accepted still."""

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (what is looked for)


class SelfCheck:
    """Asks the service for an echo, as a client would.

    A client that is accepted is ours if its address is that of a socket which we hold open and which was not accepted
    before: nobody else can have the same address meanwhile. So the socket of a check that got no reply is kept open
    until it is accepted.
    """

    def __init__(self) -> None:
        self._waiting: dict[SockAddr, socket.socket] = {}
        """Our ends, by their address, until they are accepted; the oldest first."""
        self._given_up: dict[SockAddr, socket.socket] = {}
        """Those of them whose reply nobody waits for any more."""
        self._predecessors: dict[SockAddr, float] = {}
        """Until when those of the program before us are expected: their sockets ended with it."""
        self._proven: socket.socket | None = None

    @property
    def names(self) -> list[SockAddr]:
        """The addresses of checks that have not been accepted yet."""
        return [*self._waiting, *self._predecessors]

    def expect(self, names: Iterable[SockAddr]) -> None:
        """Take clients with these addresses for ours: the program before us has connected them."""
        until = asyncio.get_running_loop().time() + _PREDECESSORS_S
        self._predecessors.update(dict.fromkeys(names, until))

    def is_ours(self, peer: SockAddr) -> bool:
        """Whether the client that was just accepted is ours; to be asked once for each accept."""
        if not self._waiting and not self._predecessors:
            return False
        if self._waiting.pop(peer, None):
            if given_up := self._given_up.pop(peer, None):
                given_up.close()
            return True
        return self._predecessors.pop(peer, 0.0) > asyncio.get_running_loop().time()

    async def passes(self, listener: socket.socket, deadline_s: float) -> bool:
        """Whether the right reply came in time; True too if there is no way to ask.

        No reply at all counts only where there was one before: a filter may keep us, and us alone, from the port.
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

    async def _ask(self, family: int, target: SockAddr) -> bool:
        loop = asyncio.get_running_loop()
        client = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        name: SockAddr = ""
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

    def _leave(self, name: SockAddr, client: socket.socket) -> None:
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
    """Whether nobody will accept it: it was refused, or its handshake is not complete and ends when it is closed."""
    try:
        client.getpeername()
    except OSError:
        return True
    return False


def _own_name(family: int, target: SockAddr) -> SockAddr:
    """What to bind to before connecting, so that the name is known before the listener sees it: any port, any name."""
    if family == socket.AF_UNIX or not isinstance(target, tuple):
        return ""  # any name in the abstract namespace (unix(7), autobind)
    host = _LOOPBACK.get(target[0], target[0])
    return (host, 0, *target[2:])
