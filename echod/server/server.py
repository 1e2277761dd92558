"""The server: accepts clients through its listeners, applies a configuration, enforces timeouts, and drains.

Owns the listeners and the periodic sweep over the connections; `Clients` decides who is admitted. Knows no signals,
files, arguments or service manager: the lifecycle calls its methods.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import structlog
from msgspec import Struct

from echod.config.schema import Config, Timeouts
from echod.net import sockets
from echod.net.listener_set import ListenerSet
from echod.net.sockets import BoundSocket, ListenerKey, Prepared
from echod.process.limits import allowed_memory_bytes
from echod.process.phase import Life
from echod.process.tasks import background
from echod.server import timeouts
from echod.server.clients import Clients
from echod.server.connection import Connection
from echod.server.connection import State as ConnectionPhase
from echod.server.fastpath import acceptor
from echod.telemetry.reasons import CloseReason
from echod.telemetry.stats import State, Stats

SWEEP_BATCH = 256
"""Connections that a sweep visits at once, about 0.5 ms; clients are served between the batches."""

PROGRESS_S = 0.9
"""A drain reports its progress this often: at least once a second, however busy the loop is."""

TLS_POLL_S = 0.02
"""How often an upgrade checks whether the TLS connections have ended."""

MEMORY_SHARE = 4
"""If limits.held_bytes is 0, the limit is the memory that the process may use, divided by this number."""

log = structlog.get_logger()


class DrainResult(Struct, frozen=True):
    """How the connections ended in a drain."""

    clean: int
    """Connections that got every reply they were owed."""
    cut: int
    """Connections that were aborted while they were owed replies."""
    unacknowledged: int
    """Clean connections whose client had not acknowledged every byte when the linger ended."""


class Server:
    """Serves the clients of its listeners; create and use it inside a running event loop."""

    def __init__(self, config: Config, stats: Stats, open_files: int, life: Life) -> None:
        """`open_files` is the process's limit of descriptors."""
        self._life = life
        self._config = config
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self.clients = Clients(config.limits, stats, open_files, life)
        self._listeners = ListenerSet(self.clients.accept, self.clients.admission.log_starved, acceptor)
        self._is_aborting = False
        self._sweeper = background(self._sweep, "sweep")

    # -- queries ---------------------------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[str]:
        """The addresses of the listeners in force, with the actual ports."""
        return self._listeners.addresses

    @property
    def listening(self) -> dict[ListenerKey, BoundSocket]:
        """The sockets of the listeners in force."""
        return self._listeners.bound

    @property
    def open_connections(self) -> int:
        """How many admitted clients are connected."""
        return len(self.clients.served)

    def snapshot(self) -> dict[str, Any]:
        """Return the statistics of this moment."""
        state: State = "draining" if self._life.is_leaving else "serving"
        return self._stats.snapshot(state, self.clients.served, self._certificate_ends())

    def _certificate_ends(self) -> dict[str, float]:
        # Not those that retire: one of them may have closed its socket in this iteration of the event loop.
        tls = (bound.settings.tls for bound in self.listening.values())
        return {address: each.not_after for address, each in zip(self.addresses, tls, strict=True) if each}

    async def is_well(self, deadline_s: float) -> bool:
        """Whether a client would be served within `deadline_s`; also True while clients have to wait by intention."""
        listener = self._listeners.open_socket
        if self._life.is_draining or listener is None or len(self.clients) >= self._config.limits.connections:
            return True
        return await self.clients.self_probe.passes(listener, deadline_s)

    # -- configuration ---------------------------------------------------------------------------------------------

    @contextmanager
    def change(self, config: Config, listeners: Prepared) -> Iterator[None]:
        """Put the configuration and exactly these listeners in force once the context ends.

        If it ends with an error, nothing has changed. Raises ListenError when it is entered.
        """
        held_bytes = config.limits.held_bytes or allowed_memory_bytes() // MEMORY_SHARE
        with self._listeners.change(listeners, config.timeouts.drain):
            yield
        self._config = config
        self.clients.limits = config.limits
        self.clients.handshake_s = config.timeouts.handshake
        self.clients.admission.listeners = len(listeners)
        self.clients.memory.set_limit(held_bytes)
        for connection in self.clients.served:
            connection.set_line_bytes(config.limits.line_bytes)
        self.clients.unpark_all()  # the idle timeout may have changed

    async def retired(self) -> None:
        """Return when every removed listener has served its backlog and is closed."""
        await self._listeners.retired()

    # -- timeouts --------------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Enforce the timeouts of every connection periodically, and measure how late the event loop is."""
        while True:
            interval_s = _sweep_interval(self._config.timeouts)
            due = self._loop.time() + interval_s
            await asyncio.sleep(interval_s)
            self.clients.admission.log_rejected(len(self.clients.served))
            self.clients.admission.forget_idle()
            # The recent maximum, which decays.
            self._stats.loop_lag_s = max(self._loop.time() - due, self._stats.loop_lag_s * 0.9)
            self.clients.unpark_due(self._loop.time())
            self.clients.memory.retry()
            for batch in _batches(self.clients.active):
                now = self._loop.time()
                for connection in batch:
                    timeouts.enforce_timeouts(connection, now, self._config.timeouts)
                    if connection.is_silent(now):
                        self.clients.park(connection, self._config.timeouts.idle)
                await asyncio.sleep(0)
            self.clients.shrink_active()

    # -- drain -----------------------------------------------------------------------------------------------------

    async def drain(self, report: Callable[[int, float], None], deadline: float) -> DrainResult:
        """Stop accepting, finish each connection, and return when all are closed.

        At `deadline`, in seconds of time.monotonic, the remaining connections are ended; their clients have one more
        second to end their streams. Calls `report` at least once a second with the connections and seconds left.
        """
        before = dict(self._stats.closed)
        started_at = self._loop.time()
        self._sweeper.cancel()
        self.clients.start_draining()
        self._listeners.apply({}, max(0.0, deadline - started_at))
        await self._finish_all(started_at, deadline, report)
        await self._listeners.retired()
        await asyncio.gather(self._sweeper, return_exceptions=True)
        ended = {reason: count - before[reason] for reason, count in self._stats.closed.items()}
        cut = ended[CloseReason.CUT.value] + ended[CloseReason.WRITE_TIMEOUT.value]
        return DrainResult(sum(ended.values()) - cut, cut, self.clients.unacknowledged)

    def abort_all(self) -> None:
        """End a drain now: close the listeners and abort each client that is still owed a reply."""
        self._is_aborting = True
        self._listeners.close_now()
        self.clients.fail_handshakes("the drain has ended")
        for connection in self.clients.connections:
            connection.end_now()
        self.clients.emptied.set()

    async def _finish_all(self, started_at: float, deadline: float, report: Callable[[int, float], None]) -> None:
        """Finish each connection once it is quiet, and the remaining ones at the deadline, until all are closed."""
        limits = self._config.timeouts
        poll_s = min(max(limits.drain_quiet / 10, 0.01), 0.1)
        reported_at = started_at
        is_over = False
        while (self._listeners.are_retiring or self.clients.has_any) and not self._is_aborting:
            now = self._loop.time()
            if now >= deadline and not self._listeners.are_retiring and not is_over:
                is_over = True
                await asyncio.sleep(0)  # one full iteration: answer input that arrived in time
                self.clients.fail_handshakes("the drain has ended")
                for connection in self.clients.connections:
                    timeouts.end_at_line_boundary(connection)
            if now - reported_at >= PROGRESS_S:
                reported_at = now
                report(len(self.clients.served), max(0.0, deadline - now))
            await self._finish_quiet(limits)
            with suppress(TimeoutError):
                async with asyncio.timeout(poll_s):
                    await self.clients.emptied.wait()
            self.clients.emptied.clear()

    async def _finish_quiet(self, limits: Timeouts) -> None:
        for batch in _batches(self.clients.served):
            now = self._loop.time()
            for connection in batch:
                timeouts.enforce_timeouts(connection, now, limits)
                timeouts.finish_if_quiet(connection, now, limits.drain_quiet)
            await asyncio.sleep(0)
        self.clients.memory.retry()

    # -- live upgrade ----------------------------------------------------------------------------------------------

    async def finish_tls(self) -> int:
        """Finish the TLS connections as in a drain, because they cannot cross an upgrade; return how many there were.

        Takes as long as a drain may take. All other clients are served meanwhile. New clients of TLS listeners wait in
        the backlog until `resume_tls` is called.
        """
        limits = self._config.timeouts
        for listener in self._listeners:
            if listener.bound.settings.is_tls:
                listener.pause("upgrade")
        self.clients.hold_tls()
        self.clients.unpark_all()
        deadline = self._loop.time() + limits.drain
        finished: set[Connection] = set()
        while self.clients.has_tls:
            now = self._loop.time()
            if now >= deadline:
                for handshake in [*self.clients.tls_handshakes]:
                    handshake.fail("an upgrade has begun")
            for connection in self.clients.tls:
                if connection not in finished:
                    finished.add(connection)
                    connection.start_draining(now)
                timeouts.enforce_timeouts(connection, now, limits)
                if now >= deadline + sockets.LINGER_S:
                    connection.end_now()
                elif now >= deadline and connection.state is ConnectionPhase.OPEN:
                    timeouts.end_at_line_boundary(connection)
                else:
                    timeouts.finish_if_quiet(connection, now, limits.drain_quiet)
            await asyncio.sleep(TLS_POLL_S)
        return sum(connection.is_counted for connection in finished)

    def resume_tls(self) -> None:
        """Accept clients on TLS listeners again, after an upgrade that failed."""
        for listener in self._listeners:
            listener.resume("upgrade")
        self.clients.release_tls()


def _sweep_interval(timeouts: Timeouts) -> float:
    """Return the seconds between sweeps: a timeout ends late by at most an eighth of the shortest, or two seconds."""
    limits = [limit for limit in (timeouts.idle, timeouts.line, timeouts.write) if limit]
    return min(1.0, max(0.02, min(limits, default=16.0) / 16))


def _batches(connections: Iterable[Connection]) -> Iterable[list[Connection]]:
    everyone = list(connections)
    return (everyone[start : start + SWEEP_BATCH] for start in range(0, len(everyone), SWEEP_BATCH))
