"""The life of a service from its first client to its last: serve until told to stop, then drain.

What each signal means while clients are served is decided here; during a stop, in `drain`.
"""

import asyncio
import os
import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import assert_never

import structlog

from echod import __version__
from echod.admin.endpoint import AdminServer
from echod.lifecycle.drain import Stop
from echod.lifecycle.generation import Generation
from echod.lifecycle.reload import Reloader, put_in_force
from echod.lifecycle.runtime import Runtime
from echod.lifecycle.status import dump_stats
from echod.lifecycle.watchdog import supervise
from echod.net.sockets import DEFAULT_SETTINGS
from echod.process import tasks
from echod.process.phase import Phase
from echod.process.signals import Action, SignalEvent
from echod.process.stall_detector import BEAT_S, StallDetector
from echod.server.arrival import Arrival
from echod.server.server import Server
from echod.upgrade.coordinator import Upgrader
from echod.upgrade.snapshot import Predecessor
from echod.upgrade.state_file import ProcessState

log = structlog.get_logger()


class Outcome(Enum):
    """How a run ended."""

    STOPPED = "every client got what it was owed"
    ABORTED = "some client was aborted"


async def run(first: Generation, runtime: Runtime, on_serving: Callable[[Server, Reloader], None]) -> Outcome:
    """Serve the first generation until a signal to stop, then drain; `on_serving` is called once clients are served.

    Raises ListenError if it cannot be served.
    """
    stall_detector = StallDetector()
    beating = tasks.background(partial(_beat, stall_detector), "beat")
    try:
        with stall_detector.watching():
            return await _run(first, runtime, on_serving)
    finally:
        await tasks.end([beating])


async def _beat(stall_detector: StallDetector) -> None:
    while True:
        stall_detector.beat()
        await asyncio.sleep(BEAT_S)


async def _run(first: Generation, runtime: Runtime, on_serving: Callable[[Server, Reloader], None]) -> Outcome:
    server = Server(first.config, runtime.stats, runtime.open_files, runtime.life)
    admin_server = AdminServer(server.snapshot, lambda: reloads.reload(by="admin endpoint"), runtime.life)
    if runtime.predecessor:
        _take_over(runtime.predecessor, first, server, admin_server)
    put_in_force(first, server, admin_server)
    reloads = Reloader(first, server, admin_server, runtime)
    for warning in first.warnings:
        log.warning("configuration", warning=warning)
    if runtime.predecessor:
        _log_upgrade(runtime.predecessor.state.process, server)
    else:
        log.info("ready", listen=server.addresses, pid=os.getpid())
        runtime.notifier.ready(reloads.status)
    runtime.life.enter(Phase.SERVING)
    on_serving(server, reloads)
    stop = await _serve(server, admin_server, reloads, runtime)
    await reloads.close()
    timeouts = reloads.config.timeouts
    lame_duck_end = runtime.stop_began_at() + timeouts.lame_duck
    async with Stop(stop, server, admin_server, runtime) as stopping:
        if timeouts.lame_duck:
            await stopping.lame_duck(lame_duck_end)
        runtime.life.enter(Phase.DRAINING)
        deadline = min(lame_duck_end, time.monotonic()) + timeouts.drain
        drained = await stopping.drain(timeouts.drain, deadline)
    log.info("drain finished", clean=drained.clean, cut=drained.cut, unacknowledged=drained.unacknowledged)
    return Outcome.ABORTED if drained.cut else Outcome.STOPPED


def _take_over(predecessor: Predecessor, first: Generation, server: Server, admin_server: AdminServer) -> None:
    """Continue where the predecessor stopped: first with its listeners, whatever the configuration says now."""
    server.clients.self_probe.expect(predecessor.self_probes)
    with admin_server.change(predecessor.admin_listeners), server.change(first.config, predecessor.listeners):
        pass
    # For clients that are not admitted yet, the settings of now hold, and those of before if the listener is gone.
    settings = {each.settings.name: each.settings for each in predecessor.listeners.values()} | first.settings
    for descriptor, peer, state in predecessor.clients:
        listener = settings.get(state.listener, DEFAULT_SETTINGS)
        server.clients.adopt(Arrival(descriptor, peer, state.is_unix, listener), state)


def _log_upgrade(predecessor: ProcessState, server: Server) -> None:
    log.info(
        "upgrade done",
        version=__version__,
        previous_version=predecessor.version,
        connections=server.open_connections,
        gap_ms=round((time.monotonic() - predecessor.stopped_at) * 1000, 1),
        listen=server.addresses,
        pid=os.getpid(),
    )


async def _serve(server: Server, admin_server: AdminServer, reloads: Reloader, runtime: Runtime) -> SignalEvent:
    """Handle signals until one requests a stop; return it."""
    upgrades = Upgrader(runtime.handover, server, admin_server, reloads, runtime.stats)
    supervising = supervise(runtime.notifier, runtime.watchdog_s, lambda: reloads.status, server.is_well)
    try:
        while True:
            event = await runtime.signals.get()
            match event.action:
                case Action.STOP:
                    runtime.life.enter(Phase.LAME_DUCK)
                    return event
                case Action.RELOAD:
                    reloads.request(**event.origin)
                case Action.DUMP_STATS:
                    dump_stats(server, runtime)
                case Action.UPGRADE:
                    log.info("upgrade started", **event.origin)
                    upgrades.request()
                case _:
                    assert_never(event.action)
    finally:
        await upgrades.close()
        await tasks.end(supervising)
