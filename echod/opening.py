"""From an accepted socket to a connection in the event loop, which takes the loop a turn or two."""

import asyncio
import socket

import structlog

from echod.connection import Connection

log = structlog.get_logger()


class Openings:
    """Those under way: a task each."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._under_way: set[asyncio.Task[object]] = set()

    def start(self, connection: Connection, sock: socket.socket) -> None:
        """Open the connection on its socket; it hears of its end, too, if that fails."""
        opening = self._loop.create_task(self._open(connection, sock))
        self._under_way.add(opening)
        opening.add_done_callback(self._under_way.discard)

    async def opened(self) -> None:
        """Return when each that has been started so far is open."""
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _open(self, connection: Connection, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock)
        except (OSError, ValueError) as error:  # such as no memory for a socket: the client sees a reset
            sock.close()
            connection.connection_lost(error)
            log.warning("connection not opened", peer=connection.peer, error=str(error))
