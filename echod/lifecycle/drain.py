"""The stop of a service that has clients: the lame-duck time, then the drain.

All deadlines are measured from the signal, even if a busy event loop handles it late.
"""

import asyncio
import time
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, assert_never

import structlog

from echod.admin.endpoint import AdminServer
from echod.lifecycle.runtime import Runtime
from echod.lifecycle.status import connections, dump_stats
from echod.process import tasks
from echod.process.sd_notify import Notifier
from echod.process.signals import Action, SignalEvent
from echod.server.server import PROGRESS_S, DrainResult, Server

EXTENSION_S = 3.0
"""The extension that a running drain requests from the service manager once a second; its end takes up to 2 s."""

log = structlog.get_logger()


class Stop:
    """One stop. While the context is open, signals are handled as a stop allows; a second stop signal cuts it short."""

    def __init__(self, event: SignalEvent, server: Server, admin_server: AdminServer, runtime: Runtime) -> None:
        """`event` requested the stop."""
        self._event = event
        self._server = server
        self._admin_server = admin_server
        self._runtime = runtime
        self._cut_short = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._handling = tasks.background(self._handle_signals, "signals")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await tasks.end([self._handling])
        if any(event.action is Action.DUMP_STATS for event in self._runtime.signals.take()):
            dump_stats(self._server, self._runtime)

    async def _handle_signals(self) -> None:
        while True:
            event = await self._runtime.signals.get()
            match event.action:
                case Action.STOP:
                    log.warning("drain cut short", **event.origin)
                    self._cut_short.set()
                case Action.RELOAD:
                    log.info("reload ignored", why="draining")
                case Action.DUMP_STATS:
                    dump_stats(self._server, self._runtime)
                case Action.UPGRADE:
                    log.warning("upgrade refused", errors=["draining"])
                case _:
                    assert_never(event.action)

    async def lame_duck(self, end: float) -> None:
        """Keep accepting clients until `end` (time.monotonic), or until the stop is cut short."""
        server, notifier = self._server, self._runtime.notifier
        seconds = round(max(0.0, end - time.monotonic()), 1)
        log.info("lame duck started", **self._event.origin, connections=server.open_connections, seconds_left=seconds)
        notifier.stopping(_lame_duck_status(server.open_connections, seconds))
        while (left_s := end - time.monotonic()) > 0 and not self._cut_short.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, PROGRESS_S)):
                    await self._cut_short.wait()
            notifier.extend(EXTENSION_S, _lame_duck_status(server.open_connections, max(0.0, end - time.monotonic())))

    async def drain(self, drain_s: float, deadline: float) -> DrainResult:
        """Drain the server for at most `drain_s`, until `deadline` (time.monotonic), and close the admin endpoint.

        Once the stop is cut short, clients that are still owed a reply are aborted.
        """
        server, notifier = self._server, self._runtime.notifier
        log.info("drain started", **self._event.origin, connections=server.open_connections, seconds_left=drain_s)
        notifier.stopping(_drain_status(server.open_connections, drain_s))
        draining = asyncio.ensure_future(server.drain(partial(_report, notifier), deadline))
        closing = asyncio.ensure_future(_close(self._admin_server, draining, deadline))
        cutting = asyncio.ensure_future(self._cut_short.wait())
        either: set[asyncio.Future[Any]] = {draining, cutting}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        cutting.cancel()
        if self._cut_short.is_set():
            server.abort_all()
        drained, _ = await asyncio.gather(draining, closing)
        return drained


async def _close(admin_server: AdminServer, draining: "asyncio.Future[DrainResult]", deadline: float) -> None:
    """Close the admin endpoint when the drain has finished, or at its deadline, while the last clients close."""
    await asyncio.wait({draining}, timeout=max(0.0, deadline - time.monotonic()))
    await admin_server.close()


def _report(notifier: Notifier, count: int, seconds_left: float) -> None:
    log.info("drain progress", connections=count, seconds_left=round(seconds_left, 1))
    notifier.extend(EXTENSION_S, _drain_status(count, seconds_left))


def _lame_duck_status(count: int, seconds_left: float) -> str:
    return f"lame duck: {connections(count)}, accepting for {seconds_left:.0f} s more"


def _drain_status(count: int, seconds_left: float) -> str:
    return f"draining: {connections(count)} left, {seconds_left:.0f} s left"
