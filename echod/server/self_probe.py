"""A round trip through our own listener: it shows that clients are served, not only that the event loop runs.

Owns the client sockets of these probes, so that the server can recognize them and leave them out of the statistics.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Iterable

import structlog

from echod.net.sockets import RawAddress

LINE, REPLY = b"are you well?\n", b"ARE YOU WELL?\n"

_FAILURES = {errno.EPIPE, errno.ECONNRESET}
"""The errors that only a failing service causes. Any other error prevents the probe and proves nothing about the
service: a sandbox, a firewall, a full backlog, no free port or descriptor."""

_MAX_UNANSWERED = 16
"""How many probes without a reply are kept open until they are accepted; beyond that the oldest is closed."""

_PREDECESSORS_S = 5.0
"""How long a probe that the predecessor started may still be accepted after a live upgrade."""

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (a key to look up, not an address to bind)

log = structlog.get_logger()


class SelfProbe:
    """Requests an echo from the service, as a client would.

    An accepted connection is a self-probe if its peer address is that of a socket that we hold open and that was not
    accepted before: no other client can have that address while the socket is open. Therefore a probe without a reply
    keeps its socket open until the server has accepted it.
    """

    def __init__(self) -> None:
        self._waiting: dict[RawAddress, socket.socket] = {}
        """The client sockets that are not accepted yet, by their address; the oldest first."""
        self._unanswered: dict[RawAddress, socket.socket] = {}
        """The subset of `_waiting` whose probe has ended without a reply."""
        self._predecessors: dict[RawAddress, float] = {}
        """Addresses of the predecessor's probes, and until when each may be accepted; their sockets are closed."""
        self._proven: socket.socket | None = None
        """The last listener that has replied."""
        self._has_logged = False

    @property
    def names(self) -> list[RawAddress]:
        """The addresses of self-probes that have not been accepted yet."""
        return [*self._waiting, *self._predecessors]

    def expect(self, names: Iterable[RawAddress]) -> None:
        """Recognize these addresses as self-probes of the predecessor, for `_PREDECESSORS_S` from now."""
        until = asyncio.get_running_loop().time() + _PREDECESSORS_S
        self._predecessors.update(dict.fromkeys(names, until))

    def is_self_probe(self, peer: RawAddress) -> bool:
        """Whether a client that was just accepted is a self-probe; call exactly once per accept."""
        if not self._waiting and not self._predecessors:
            return False
        if self._waiting.pop(peer, None):
            if unanswered := self._unanswered.pop(peer, None):
                unanswered.close()
            return True
        return self._predecessors.pop(peer, 0.0) > asyncio.get_running_loop().time()

    async def passes(self, listener: socket.socket, deadline_s: float) -> bool:
        """Whether the correct reply arrived in time; also True if the probe cannot be made, which is logged once.

        A missing reply counts as a failure only if this listener has replied before: a packet filter may block our own
        connections and nobody else's.
        """
        try:
            async with asyncio.timeout(deadline_s):
                is_correct = await self._request(listener.family, listener.getsockname())
        except TimeoutError:
            if listener is self._proven:
                return False
            self._log_impossible(f"no reply within {deadline_s:g} s, and none before")
            return True
        except OSError as error:
            if error.errno in _FAILURES and listener.fileno() >= 0:
                return False
            self._log_impossible(os.strerror(error.errno or 0).lower())
            return True
        self._proven = listener if is_correct else self._proven
        return is_correct

    def _log_impossible(self, why: str) -> None:
        if not self._has_logged:
            self._has_logged = True
            log.debug("self-probe impossible", why=why)

    async def _request(self, family: int, target: RawAddress) -> bool:
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
            self._end(name, client)

    def _end(self, name: RawAddress, client: socket.socket) -> None:
        """Close the socket, or keep it until it is accepted."""
        if name not in self._waiting or _is_unconnected(client):
            self._waiting.pop(name, None)
            client.close()
            return
        self._unanswered[name] = client
        if len(self._unanswered) > _MAX_UNANSWERED:
            oldest = next(iter(self._unanswered))
            del self._waiting[oldest]
            self._unanswered.pop(oldest).close()


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
