"""A round trip through the own listener: proof that a client would be served, not only that the loop turns.

Owns the names of the clients that are ourselves, so that nobody counts them.
"""

import asyncio
import errno
import socket

from echod.sockets import SockAddr

LINE, REPLY = b"are you well?\n", b"ARE YOU WELL?\n"

_UNABLE = {errno.EAGAIN, errno.ECONNREFUSED, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EADDRNOTAVAIL, errno.EMFILE}
"""What keeps us from asking, but tells nothing about the service: a sandbox, a firewall, a full backlog."""


_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (what is looked for)


class SelfCheck:
    """Asks the service for an echo, as a client would."""

    def __init__(self) -> None:
        self._ours: set[SockAddr | bytes] = set()

    def is_ours(self, peer: SockAddr | bytes) -> bool:
        """Whether a client that was accepted is ourselves."""
        return bool(self._ours) and peer in self._ours

    async def passes(self, listener: socket.socket, deadline_s: float) -> bool:
        """Whether the right reply came in time; True too if there is no way to ask."""
        try:
            async with asyncio.timeout(deadline_s):
                return await self._ask(listener.family, listener.getsockname())
        except TimeoutError:
            return False
        except OSError as error:
            return error.errno in _UNABLE

    async def _ask(self, family: int, target: SockAddr) -> bool:
        loop = asyncio.get_running_loop()
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
            client.bind(_own_name(family, target))
            name = client.getsockname()
            self._ours.add(name)
            try:
                await loop.sock_connect(client, target)
                await loop.sock_sendall(client, LINE)
                return await loop.sock_recv(client, len(REPLY)) == REPLY
            finally:
                self._ours.discard(name)


def _own_name(family: int, target: SockAddr) -> SockAddr:
    """What to bind to before connecting, so that the name is known before the listener sees it: any port, any name."""
    if family == socket.AF_UNIX:
        return ""  # any name in the abstract namespace (unix(7), autobind)
    host = _LOOPBACK.get(target[0], target[0])
    return (host, 0, *target[2:])
