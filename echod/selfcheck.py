"""A round trip through the own listener: proof that a client would be served, not only that the loop turns.

Owns the names of the clients that are ourselves, so that nobody counts them.
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
"""Names remembered of checks that were given up: their connections may be accepted later still."""


_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (what is looked for)


class SelfCheck:
    """Asks the service for an echo, as a client would."""

    def __init__(self) -> None:
        self._ours: dict[SockAddr, None] = {}  # a set that keeps its order
        self._proven: socket.socket | None = None

    @property
    def names(self) -> list[SockAddr]:
        """The clients under way that are ourselves."""
        return [*self._ours]

    def recognize(self, names: Iterable[SockAddr]) -> None:
        """Take clients of the program before us for ourselves."""
        self._ours.update(dict.fromkeys(names))

    def is_ours(self, peer: SockAddr) -> bool:
        """Whether a client that was accepted is ourselves."""
        return bool(self._ours) and peer in self._ours

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
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
            client.bind(_own_name(family, target))
            name = client.getsockname()
            self._ours[name] = None
            if len(self._ours) > _GIVEN_UP:
                del self._ours[next(iter(self._ours))]
            await loop.sock_connect(client, target)
            await loop.sock_sendall(client, LINE)
            reply = await loop.sock_recv(client, len(REPLY))
            del self._ours[name]
            return reply == REPLY


def _own_name(family: int, target: SockAddr) -> SockAddr:
    """What to bind to before connecting, so that the name is known before the listener sees it: any port, any name."""
    if family == socket.AF_UNIX or not isinstance(target, tuple):
        return ""  # any name in the abstract namespace (unix(7), autobind)
    host = _LOOPBACK.get(target[0], target[0])
    return (host, 0, *target[2:])
