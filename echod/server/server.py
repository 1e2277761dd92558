"""The service: clients come through listeners, a configuration is applied to them, they are drained.

Owns the listeners, and decides what time and a stop do to clients; who is let in is decided elsewhere. Signals, files,
arguments and the service manager are not known: the lifecycle calls the verbs.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import structlog
from msgspec import Struct

from echod.config.schema import Config, Timeouts
from echod.net.listener_set import ListenerSet
from echod.net.sockets import BoundSocket, ListenerKey, Prepared
from echod.process.limits import allowed_memory_bytes
from echod.process.tasks import background
from echod.server import timeouts
from echod.server.clients import Clients
from echod.server.connection import Connection
from echod.server.fastpath import acceptor
from echod.telemetry.stats import Stats

SWEEP_SLICE = 256
"""Connections looked at in a row, about 0.5 ms; others are served in between."""

PROGRESS_S = 0.9
"""A drain reports its progress this often: at least once a second, however busy the loop is."""

MEMORY_SHARE = 4
"""If limits.held_bytes is 0, the limit is the memory that the process may use, divided by this number."""

log = structlog.get_logger()


class DrainResult(Struct, frozen=True):
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
        self.clients = Clients(config.limits, stats, open_files)
        self._listeners = ListenerSet(self.clients.accept, self.clients.admission.starved, acceptor)
        self.is_leaving = False
        self._is_cutting = False
        self._sweeper = background(self._sweep, "sweep")

    # -- what others ask -------------------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[str]:
        """The addresses really listened on."""
        return self._listeners.addresses

    @property
    def listening(self) -> dict[ListenerKey, BoundSocket]:
        """The sockets of the listeners in force."""
        return self._listeners.bound

    @property
    def open_connections(self) -> int:
        """How many clients are connected, those that are turned away not counted."""
        return len(self.clients.served)

    def snapshot(self) -> dict[str, Any]:
        """The statistics at this moment."""
        return self._stats.snapshot("draining" if self.is_leaving else "serving", self.clients.served)

    async def is_well(self, deadline_s: float) -> bool:
        """Whether a client would be served within `deadline_s`; True too if one would have to wait by intention."""
        listener = self._listeners.open_socket
        if self.clients.is_draining or listener is None or len(self.clients) >= self._config.limits.connections:
            return True
        return await self.clients.self_probe.passes(listener, deadline_s)

    # -- a configuration -------------------------------------------------------------------------------------------

    def apply(self, config: Config, listeners: Prepared) -> None:
        """Put the configuration in force, and listen on exactly these listeners; raises ListenError."""
        self._listeners.apply(listeners, config.timeouts.drain)
        self._config = config
        self.clients.limits = config.limits
        self.clients.admission.listeners = len(listeners)
        self.clients.memory.set_limit(config.limits.held_bytes or allowed_memory_bytes() // MEMORY_SHARE)
        for connection in self.clients.served:
            connection.set_line_bytes(config.limits.line_bytes)
        self.clients.unpark_all()  # the idle timeout may have changed

    async def retired(self) -> None:
        """Return when each listener that went away has served its backlog and is closed."""
        await self._listeners.retired()

    # -- time ------------------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Hold each connection against the timeouts again and again, and see how late the loop is."""
        while True:
            interval_s = _sweep_interval(self._config.timeouts)
            due = self._loop.time() + interval_s
            await asyncio.sleep(interval_s)
            self.clients.admission.tell(len(self.clients.served))
            # The worst of late, forgotten by and by.
            self._stats.loop_lag_s = max(self._loop.time() - due, self._stats.loop_lag_s * 0.9)
            self.clients.unpark_due(self._loop.time())
            self.clients.memory.retry()
            for part in _slices(self.clients.active):
                now = self._loop.time()
                for connection in part:
                    timeouts.enforce_timeouts(connection, now, self._config.timeouts)
                    if connection.is_silent(now):
                        self.clients.park(connection, self._config.timeouts.idle)
                await asyncio.sleep(0)
            self.clients.shrink()

    # -- the end ---------------------------------------------------------------------------------------------------

    async def drain(self, report: Callable[[int, float], None], deadline: float) -> DrainResult:
        """Stop accepting, finish each connection until the deadline, and return when all are closed.

        The deadline is one of time.monotonic; what is left then has one second more to end its stream.
        `report` is called at least once a second with the connections and the seconds that are left.
        """
        before = dict(self._stats.closed)
        started_at = self._loop.time()
        self.is_leaving = True
        self._sweeper.cancel()
        self.clients.start_draining()
        self._listeners.apply({}, max(0.0, deadline - started_at))
        await self._settle(started_at, deadline, report)
        await self._listeners.retired()
        await asyncio.gather(self._sweeper, return_exceptions=True)
        return self._drained(before)

    def abort_all(self) -> None:
        """End a drain now: close the listeners and abort each client that is still owed a reply."""
        self._is_cutting = True
        self._listeners.close_now()
        self.clients.handshakes.give_up()
        for connection in self.clients.connections:
            connection.end_now()
        self.clients.emptied.set()

    async def _settle(self, started_at: float, deadline: float, report: Callable[[int, float], None]) -> None:
        """Finish each connection once it is quiet, and what is left at the end of the drain, until none is left."""
        limits = self._config.timeouts
        tick_s = min(max(limits.drain_quiet / 10, 0.01), 0.1)
        reported_at = started_at
        is_over = False
        while (self._listeners.are_retiring or self.clients.are_any) and not self._is_cutting:
            now = self._loop.time()
            if now >= deadline and not self._listeners.are_retiring and not is_over:
                is_over = True
                await asyncio.sleep(0)  # one full iteration: answer input that arrived in time
                self.clients.handshakes.give_up()
                for connection in self.clients.connections:
                    timeouts.end_at_line_boundary(connection)
            if now - reported_at >= PROGRESS_S:
                reported_at = now
                report(len(self.clients.served), max(0.0, deadline - now))
            await self._settle_quiet(limits)
            with suppress(TimeoutError):
                async with asyncio.timeout(tick_s):
                    await self.clients.emptied.wait()
            self.clients.emptied.clear()

    async def _settle_quiet(self, limits: Timeouts) -> None:
        for part in _slices(self.clients.served):
            now = self._loop.time()
            for connection in part:
                timeouts.enforce_timeouts(connection, now, limits)
                timeouts.settle(connection, now, limits.drain_quiet)
            await asyncio.sleep(0)
        self.clients.memory.retry()

    def _drained(self, before: Mapping[str, int]) -> DrainResult:
        ended = {reason: count - before[reason] for reason, count in self._stats.closed.items()}
        cut = ended["cut"] + ended["write timeout"]
        return DrainResult(sum(ended.values()) - cut, cut, self.clients.unacknowledged)


def _sweep_interval(timeouts: Timeouts) -> float:
    """A timeout is at most two sweeps late: an eighth of the shortest one, but two seconds at most."""
    limits = [limit for limit in (timeouts.idle, timeouts.line, timeouts.write) if limit]
    return min(1.0, max(0.02, min(limits, default=16.0) / 16))


def _slices(connections: Iterable[Connection]) -> Iterable[list[Connection]]:
    whole = list(connections)
    return (whole[start : start + SWEEP_SLICE] for start in range(0, len(whole), SWEEP_SLICE))
