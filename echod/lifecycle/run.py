"""From ready to stopped, as one straight line: serve until told to stop, drain, say how it ended.

What each command means in each phase is decided here and nowhere else.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from itertools import chain
from typing import assert_never

import structlog
from msgspec import Struct

from echod import __version__
from echod.admin.endpoint import Endpoint, ReloadResult
from echod.config.schema import Config
from echod.lifecycle.drain import Means, connections, drain
from echod.lifecycle.generation import Generation
from echod.lifecycle.reload import Parts, Prepare, Reloader
from echod.lifecycle.watchdog import supervise
from echod.net.sockets import ListenError
from echod.process.sd_notify import Notifier
from echod.process.signals import Action, SignalEvent, SignalQueue
from echod.process.stall_detector import BEAT_S, StallDetector
from echod.server.server import Server
from echod.telemetry.logs import Logs
from echod.telemetry.stats import Stats
from echod.upgrade import snapshot
from echod.upgrade.coordinator import SETTLE_S, Steps, Upgrader
from echod.upgrade.exec import Replacement
from echod.upgrade.preflight import PreflightError
from echod.upgrade.snapshot import Predecessor
from echod.upgrade.state_file import Process, Service

DUMP_REST_S = 0.01
"""The shortest pause after a statistics dump; a pause is also at least DUMP_BREATH times as long as the dump took."""

DUMP_BREATH = 9
"""This limits dumps to a tenth of the event loop's time, however many signals request them."""

log = structlog.get_logger()


class Outcome(Enum):
    """How a run ended."""

    STOPPED = "every client got what it was owed"
    ABORTED = "some client was cut off"


class Runtime(Struct, frozen=True):
    """What a run is given: orders to follow, a way to reload, logs to write, whom to tell that clients are served."""

    orders: SignalQueue
    stop_began_at: Callable[[], float]
    """When the current stop began (time.monotonic); its lame-duck time and its drain are measured from then."""
    prepare: Prepare
    logs: Logs
    stats: Stats
    open_files: int
    notifier: Notifier
    watchdog_s: float | None
    """How often the service manager wants a sign of life."""
    successor: Replacement
    predecessor: Predecessor | None
    """What the program before us in this process has left, if there was one."""
    on_serving: Callable[[Server, Reloader], None]


async def run(first: Generation, around: Runtime) -> Outcome:
    """Serve the first generation until an order to stop, then drain."""
    watch = StallDetector()
    beating = asyncio.ensure_future(_beat(watch))
    try:
        with watch.listening():
            return await _run(first, around)
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


async def _beat(watch: StallDetector) -> None:
    while True:
        watch.beat()
        await asyncio.sleep(BEAT_S)


async def _run(first: Generation, around: Runtime) -> Outcome:
    server = Server(first.config, around.stats, around.open_files)

    async def reload() -> ReloadResult:
        log.debug("reload requested", by="admin endpoint")
        return await reloads.verdict()

    endpoint = Endpoint(server.snapshot, reload)
    try:
        first.listen()
    except ListenError:
        first.discard()
        raise
    if around.predecessor:
        _adopt(around.predecessor, first.config, server, endpoint)
    endpoint.apply(first.admin)
    server.apply(first.config, first.listeners)
    notifier = around.notifier

    def status() -> str:
        return _status(server, around.stats, reloads.restart_needed)

    reloads = Reloader(first, around.prepare, Parts(server, endpoint, around.logs), around.stats)
    reloads.on_begin, reloads.on_end = notifier.reloading, lambda: notifier.ready(status())
    for warning in first.warnings:
        log.warning("configuration", warning=warning)
    if around.predecessor:
        _tell_upgrade(around.predecessor.state.process, server)
    else:
        log.info("ready", listen=server.addresses, pid=os.getpid())
        notifier.ready(status())
    around.on_serving(server, reloads)
    upgrades = Upgrader(_steps(server, endpoint, reloads, around))
    supervising = asyncio.ensure_future(supervise(notifier, around.watchdog_s, status, server.is_well))
    try:
        stop = await _serve(server, reloads, upgrades, around)
    finally:
        await upgrades.close()
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)
    endpoint.start_draining()
    await reloads.close()
    means = Means(server, endpoint, notifier, around.orders, partial(_dump_stats, server, around))
    drained = await drain(stop, around.stop_began_at(), reloads.config.timeouts, means)
    log.info("drain finished", clean=drained.clean, cut=drained.cut, unacknowledged=drained.unacknowledged)
    return Outcome.ABORTED if drained.cut else Outcome.STOPPED


def _adopt(predecessor: Predecessor, config: Config, server: Server, endpoint: Endpoint) -> None:
    """Go on where the program before us stopped: with its listeners first, whatever the configuration says now."""
    server.clients.self_probe.expect(predecessor.ourselves)
    endpoint.apply(predecessor.admin)
    server.apply(config, predecessor.listeners)
    for descriptor, peer, past in predecessor.clients:
        server.clients.adopt(descriptor, peer, past)


def _tell_upgrade(before: Process, server: Server) -> None:
    log.info(
        "upgrade done",
        version=__version__,
        previous_version=before.version,
        connections=server.open_connections,
        gap_ms=round((time.monotonic() - before.left_at) * 1000, 1),
        listen=server.addresses,
        pid=os.getpid(),
    )


def _steps(server: Server, endpoint: Endpoint, reloads: Reloader, around: Runtime) -> Steps:
    def service() -> Service:
        return Service(
            listeners=snapshot.listening(server.listening),
            admin=snapshot.listening(endpoint.listening),
            config=snapshot.config(reloads.config),
            stats=around.stats.past(),
            ourselves=[snapshot.address_of(name) for name in server.clients.self_probe.names],
        )

    async def prove() -> str:
        while True:
            async with asyncio.timeout(SETTLE_S):
                await reloads.idle()
            generation = around.stats.config_generation
            try:
                return await around.successor.prove(service())
            except PreflightError:
                if reloads.is_idle and generation == around.stats.config_generation:
                    raise
                # It was told of listeners that are no more, or not of one whose address is taken since, by us.

    async def settle() -> None:
        while True:
            await reloads.idle()
            await asyncio.gather(server.retired(), endpoint.retired())  # who waits in those would be reset
            if await endpoint.rest() and reloads.is_idle:
                return
            endpoint.wake()

    def replace(*, is_wanted_again: bool) -> None:
        server.clients.sample()  # the next sweep is of the next program
        pasts = chain(
            (snapshot.past(connection, is_counted=is_counted) for connection, is_counted in server.clients.each()),
            map(snapshot.state_of_handshake, server.clients.handshakes),
        )
        descriptors = [connection.descriptor for connection, _ in server.clients.each()]
        descriptors += [handshake.sock.fileno() for handshake in server.clients.handshakes]
        again = [SignalEvent(Action.UPGRADE, "USR2", 0)] if is_wanted_again else []
        around.successor.replace(service(), pasts, descriptors, again)

    return Steps(prove, settle, endpoint.wake, replace)


async def _serve(server: Server, reloads: Reloader, upgrades: Upgrader, around: Runtime) -> SignalEvent:
    """Follow orders until one says to stop; return it."""
    while True:
        order = await around.orders.get()
        match order.command:
            case Action.STOP:
                return order
            case Action.RELOAD:
                reloads.request(**order.origin)
            case Action.DUMP_STATS:
                _dump_stats(server, around)
            case Action.UPGRADE:
                log.info("upgrade started", **order.origin)
                upgrades.request()
            case _:
                assert_never(order.command)


def _dump_stats(server: Server, around: Runtime) -> None:
    began = time.perf_counter()
    around.logs.always("stats", **server.snapshot())
    cost_s = time.perf_counter() - began
    around.orders.rest(Action.DUMP_STATS, max(DUMP_REST_S, DUMP_BREATH * cost_s))


def _status(server: Server, stats: Stats, restart_needed: Sequence[str]) -> str:
    parts = [f"{connections(server.open_connections)} open, {stats.accepted} accepted"]
    if restart_needed:
        parts.append(f"not in force before a restart: {', '.join(restart_needed)}")
    if stats.reload_error:
        parts.append(f"last reload refused: {stats.reload_error}")
    return "; ".join(parts)
