"""The live connections: open them, apply a configuration to them, drain them.

Owns their set and the listeners; every change of them happens here. Signals, files, arguments and the service manager
are not known: the lifecycle calls the verbs, and what people should hear of goes to the log.
"""

import asyncio
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog

from echod import deadlines
from echod.admission import Admission
from echod.config import Config, Timeouts
from echod.connection import Connection
from echod.handover import Past
from echod.listeners import Listeners
from echod.selfcheck import SelfCheck
from echod.sockets import Bound, Key, SockAddr
from echod.stats import Stats

SWEEP_SLICE = 256
"""Connections looked at in a row, about 0.5 ms; others are served in between."""

PROGRESS_S = 0.9
"""A drain reports its progress this often: at least once a second, however busy the loop is."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Drained:
    """How a drain ended: connections that got what they were owed, and that were cut off."""

    clean: int
    cut: int
    unacknowledged: int
    """Of the clean ones, those whose kernel had not confirmed every byte yet when their second was over."""


class Server:
    """Serves what its listeners bring; made and used inside a running loop."""

    def __init__(self, config: Config, stats: Stats, open_files: int) -> None:
        """`open_files` is how many descriptors the process may have."""
        self._config = config
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._admission = Admission(stats, open_files)
        self._listeners = Listeners(self._on_accept, self._admission.starved)
        self.selfcheck = SelfCheck()
        self._openings: set[asyncio.Task[object]] = set()
        self._emptied = asyncio.Event()
        self._unacknowledged = 0
        self._is_full = False
        self._is_draining = False
        self.is_leaving = False
        self._is_cutting = False
        self._forget_connection = self._on_closed  # one bound method for all, not one a connection
        self._forget_uncounted = self._on_uncounted_closed
        self._sweeper = self._loop.create_task(self._sweep(), name="sweep")

    # -- what others ask -------------------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[str]:
        """The addresses really listened on."""
        return self._listeners.addresses

    @property
    def listening(self) -> dict[Key, Bound]:
        """The sockets of the listeners in force."""
        return self._listeners.bound

    @property
    def open_connections(self) -> int:
        """How many clients are connected, those that are turned away not counted."""
        return len(self._connections)

    def snapshot(self) -> dict[str, Any]:
        """The statistics at this moment."""
        return self._stats.snapshot("draining" if self.is_leaving else "serving", self._connections)

    async def is_well(self, deadline_s: float) -> bool:
        """Whether a client would be served within `deadline_s`; True too if one would have to wait by intention."""
        listener = self._listeners.open_socket
        if self._is_draining or listener is None or len(self._connections) >= self._config.limits.connections:
            return True
        return await self.selfcheck.passes(listener, deadline_s)

    def clients(self) -> Iterator[tuple[Connection, bool]]:
        """Each connection that is open, and whether it counts in the statistics."""
        yield from ((connection, True) for connection in self._connections)
        yield from ((connection, False) for connection in self._admission.uncounted)

    # -- a configuration -------------------------------------------------------------------------------------------

    def apply(self, config: Config, sockets: Mapping[Key, Bound | None]) -> None:
        """Put `config` in force with these listeners: a socket is a new one, None stays as it is, the others retire."""
        self._listeners.apply(sockets, config.timeouts.drain)
        self._config = config
        for connection in self._connections:
            connection.echo.line_bytes = config.limits.line_bytes  # for the line begun too
        self._pause_or_resume()

    async def retired(self) -> None:
        """Return when each listener that went away has served its backlog and is closed."""
        await self._listeners.retired()

    # -- connections come and go -----------------------------------------------------------------------------------

    def _on_accept(self, sock: socket.socket, peer: SockAddr) -> None:
        line_bytes = self._config.limits.line_bytes
        now = self._loop.time()
        host = peer[0] if isinstance(peer, tuple) else None
        if self.selfcheck.is_ours(peer):
            connection = Connection(sock, peer, line_bytes, now, self._forget_uncounted)
            self._admission.uncounted.add(connection)
        elif refusal := self._admission.refusal(host, len(self._connections), self._config.limits):
            connection = Connection(sock, peer, line_bytes, now, self._forget_uncounted)
            self._admission.turn_away(connection, *refusal)
            self._pause_or_resume()
        else:
            connection = Connection(sock, peer, line_bytes, now, self._forget_connection)
            self._connections.add(connection)
            self._admission.let_in(host)
            self._stats.accepted += 1
            if self._is_draining:
                connection.start_draining(now)
        self._start(connection, sock)

    def adopt(self, sock: socket.socket, peer: SockAddr, past: Past) -> None:
        """Go on with a client of the program before us, whatever the limits; it is in the counts already."""
        forget = self._forget_connection if past.is_counted else self._forget_uncounted
        connection = Connection(sock, peer, self._config.limits.line_bytes, self._loop.time(), forget)
        connection.resume(past)
        if past.is_counted:
            self._connections.add(connection)
            self._admission.let_in(connection.host)
        else:
            self._admission.uncounted.add(connection)
        self._start(connection, sock)

    async def opened(self) -> None:
        """Return when each client that has come so far is served."""
        await asyncio.gather(*self._openings, return_exceptions=True)

    def _start(self, connection: Connection, sock: socket.socket) -> None:
        opening = self._loop.create_task(self._open(connection, sock))
        self._openings.add(opening)
        opening.add_done_callback(self._openings.discard)

    async def _open(self, connection: Connection, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock)
        except (
            OSError,
            ValueError,
        ) as error:  # such as no memory for a socket: the client sees a reset, the log says why
            sock.close()
            connection.connection_lost(error)
            log.warning("connection not opened", peer=connection.peer, error=str(error))

    def _on_uncounted_closed(self, connection: Connection) -> None:
        self._admission.forget(connection)
        if self._is_full:
            self._pause_or_resume()
        self._check_emptied()

    def _pause_or_resume(self) -> None:
        """Accept or not, as there are descriptors to turn clients away with: to be called whenever that may change."""
        self._is_full = self._admission.is_full(self._config.limits, len([*self._listeners]))
        if self._is_full:
            self._listeners.pause("turning away")
        else:
            self._listeners.resume("turning away")

    def _on_closed(self, connection: Connection) -> None:
        reason = connection.reason
        assert reason is not None
        self._connections.discard(connection)
        self._admission.let_out(connection.host)
        self._stats.close(reason, connection)
        self._unacknowledged += connection.unacknowledged_bytes > 0
        log.info(
            "connection closed",
            peer=connection.peer,
            reason=reason,
            lines=connection.lines,
            bytes_in=connection.bytes_in,
            bytes_out=connection.bytes_out,
            duration_s=round(self._loop.time() - connection.opened_at, 6),
        )
        self._check_emptied()

    def _check_emptied(self) -> None:
        if not self._connections and not self._admission.uncounted:
            self._emptied.set()

    # -- time ------------------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Hold each connection against the timeouts again and again, and see how late the loop is."""
        while True:
            interval_s = _sweep_interval(self._config.timeouts)
            due = self._loop.time() + interval_s
            await asyncio.sleep(interval_s)
            self._admission.tell(len(self._connections))
            # The worst of late, forgotten by and by.
            self._stats.loop_lag_s = max(self._loop.time() - due, self._stats.loop_lag_s * 0.9)
            for part in _slices(self._connections):
                now = self._loop.time()
                for connection in part:
                    deadlines.tend(connection, now, self._config.timeouts)
                await asyncio.sleep(0)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def drain(self, report: Callable[[int, float], None]) -> Drained:
        """Stop accepting, let each client have what it is owed, and return when all are gone.

        `report` is called at least once a second with the connections and the seconds that are left.
        """
        before = dict(self._stats.closed)
        started_at = self._loop.time()
        self._is_draining = self.is_leaving = True
        self._sweeper.cancel()
        for connection in self._connections:
            connection.start_draining(started_at)
        self._listeners.apply({}, self._config.timeouts.drain)
        self._pause_or_resume()
        await self._settle(started_at, report)
        while self._connections or self._admission.uncounted:  # cut off, which takes a turn of the loop or two
            await asyncio.sleep(0)
        await self._listeners.retired()
        await self.opened()
        await asyncio.gather(self._sweeper, return_exceptions=True)
        return self._drained(before)

    def cut_off(self) -> None:
        """End a drain now: close the listeners and cut off whoever is still owed a reply."""
        self._is_cutting = True
        self._listeners.close_now()
        for connection in [*self._connections, *self._admission.uncounted]:
            connection.end_now()
        self._emptied.set()

    async def _settle(self, started_at: float, report: Callable[[int, float], None]) -> None:
        """Finish each connection once it is quiet, and what is left at the end of the drain, until none is left."""
        timeouts = self._config.timeouts
        deadline = started_at + timeouts.drain
        tick_s = min(max(timeouts.drain_quiet / 10, 0.01), 0.1)
        reported_at = started_at
        is_over = False
        while (self._listeners.are_retiring or self._connections or self._admission.uncounted) and not self._is_cutting:
            now = self._loop.time()
            if now >= deadline and not self._listeners.are_retiring and not is_over:
                is_over = True
                for connection in [*self._connections, *self._admission.uncounted]:
                    deadlines.end_at_line_boundary(connection)
            if now - reported_at >= PROGRESS_S:
                reported_at = now
                report(len(self._connections), max(0.0, deadline - now))
            await self._settle_quiet(timeouts)
            with suppress(TimeoutError):
                async with asyncio.timeout(tick_s):
                    await self._emptied.wait()
            self._emptied.clear()

    async def _settle_quiet(self, timeouts: Timeouts) -> None:
        for part in _slices(self._connections):
            now = self._loop.time()
            for connection in part:
                deadlines.tend(connection, now, timeouts)
                deadlines.settle(connection, now, timeouts.drain_quiet)
            await asyncio.sleep(0)

    def _drained(self, before: Mapping[str, int]) -> Drained:
        ended = {reason: count - before[reason] for reason, count in self._stats.closed.items()}
        cut = ended["cut"] + ended["write timeout"]
        return Drained(sum(ended.values()) - cut, cut, self._unacknowledged)


def _sweep_interval(timeouts: Timeouts) -> float:
    """A timeout is at most two sweeps late: an eighth of the shortest one, but two seconds at most."""
    limits = [limit for limit in (timeouts.idle, timeouts.line, timeouts.write) if limit]
    return min(1.0, max(0.02, min(limits, default=16.0) / 16))


def _slices(connections: Iterable[Connection]) -> Iterable[list[Connection]]:
    whole = list(connections)
    return (whole[start : start + SWEEP_SLICE] for start in range(0, len(whole), SWEEP_SLICE))
