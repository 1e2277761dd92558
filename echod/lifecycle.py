"""From ready to stopped, as one straight line: serve until told to stop, drain, say how it ended.

What each command means in each phase is decided here and nowhere else.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from functools import partial
from itertools import chain
from typing import Literal, assert_never

import structlog
from msgspec import Struct

from echod import __version__, crossing
from echod.admin import Endpoint, Verdict
from echod.config import Config, Timeouts
from echod.crossing import Legacy
from echod.generation import Generation
from echod.handover import Process, Service
from echod.logs import Logs
from echod.preflight import PreflightError
from echod.reload import Parts, Prepare, Reloads
from echod.server import PROGRESS_S, Drained, Server
from echod.signals import Command, Order
from echod.sockets import ListenError
from echod.stats import Stats
from echod.successor import Successor
from echod.supervision import supervise
from echod.systemd import Notifier
from echod.upgrade import SETTLE_S, Steps, Upgrades
from echod.watch import BEAT_S, Watch

EXTENSION_S = 3.0
"""What a drain that goes on asks the service manager for, once a second: its end needs up to two."""

log = structlog.get_logger()


class Outcome(Enum):
    """How a run ended."""

    STOPPED = "every client got what it was owed"
    CUT_OFF = "some client was cut off"


class Surroundings(Struct, frozen=True):
    """What a run is given: orders to follow, a way to reload, logs to write, whom to tell that clients are served."""

    next_order: Callable[[], Awaitable[Order]]
    prepare: Prepare
    logs: Logs
    stats: Stats
    open_files: int
    notifier: Notifier
    watchdog_s: float | None
    """How often the service manager wants a sign of life."""
    successor: Successor
    legacy: Legacy | None
    """What the program before us in this process has left, if there was one."""
    on_serving: Callable[[Server, Reloads], None]


async def run(first: Generation, around: Surroundings) -> Outcome:
    """Serve the first generation until an order to stop, then drain."""
    watch = Watch()
    beating = asyncio.ensure_future(_beat(watch))
    try:
        with watch.listening():
            return await _run(first, around)
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


async def _beat(watch: Watch) -> None:
    while True:
        watch.beat()
        await asyncio.sleep(BEAT_S)


async def _run(first: Generation, around: Surroundings) -> Outcome:
    server = Server(first.config, around.stats, around.open_files)

    async def reload() -> Verdict:
        log.info("reload started", by="admin endpoint")
        return await reloads.verdict()

    endpoint = Endpoint(server.snapshot, reload)
    try:
        first.listen()
    except ListenError:
        first.discard()
        raise
    if around.legacy:
        _adopt(around.legacy, first.config, server, endpoint)
    endpoint.apply(first.admin)
    server.apply(first.config, first.listeners, first.proxied)
    notifier = around.notifier

    def status() -> str:
        return _status(server, around.stats)

    reloads = Reloads(first, around.prepare, Parts(server, endpoint, around.logs), around.stats)
    reloads.on_begin, reloads.on_end = notifier.reloading, lambda: notifier.ready(status())
    for warning in first.warnings:
        log.warning("configuration", warning=warning)
    if around.legacy:
        _tell_upgrade(around.legacy.state.process, server)
    else:
        log.info("ready", listen=server.addresses, pid=os.getpid())
        notifier.ready(status())
    around.on_serving(server, reloads)
    upgrades = Upgrades(_steps(server, endpoint, reloads, around))
    supervising = asyncio.ensure_future(supervise(notifier, around.watchdog_s, status, server.is_well))
    try:
        stop = await _serve(server, reloads, upgrades, around)
    finally:
        await upgrades.close()
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)
    endpoint.start_draining()
    await reloads.close()
    drained = await _drain(stop, reloads.config.timeouts, server, around)
    log.info("drain finished", clean=drained.clean, cut=drained.cut, unacknowledged=drained.unacknowledged)
    await endpoint.close()
    return Outcome.CUT_OFF if drained.cut else Outcome.STOPPED


def _adopt(legacy: Legacy, config: Config, server: Server, endpoint: Endpoint) -> None:
    """Go on where the program before us stopped: with its listeners first, whatever the configuration says now."""
    server.clients.selfcheck.expect(legacy.ourselves)
    endpoint.apply(legacy.admin)
    server.apply(config, legacy.listeners, legacy.proxied)
    for descriptor, peer, past in legacy.clients:
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


def _steps(server: Server, endpoint: Endpoint, reloads: Reloads, around: Surroundings) -> Steps:
    def service() -> Service:
        return Service(
            listeners=crossing.listening(server.listening, server.proxied),
            admin=crossing.listening(endpoint.listening),
            config=crossing.config(reloads.config),
            stats=around.stats.past(),
            ourselves=[crossing.address_of(name) for name in server.clients.selfcheck.names],
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
        server.clients.look()  # the next sweep is of the next program
        pasts = chain(
            (crossing.past(connection, is_counted=is_counted) for connection, is_counted in server.clients.each()),
            map(crossing.past_of_prelude, server.clients.preludes),
        )
        descriptors = [connection.descriptor for connection, _ in server.clients.each()]
        descriptors += [prelude.sock.fileno() for prelude in server.clients.preludes]
        again = [Order(Command.UPGRADE, "USR2", 0)] if is_wanted_again else []
        around.successor.replace(service(), pasts, descriptors, again)

    return Steps(prove, settle, endpoint.wake, replace)


async def _serve(server: Server, reloads: Reloads, upgrades: Upgrades, around: Surroundings) -> Order:
    """Follow orders until one says to stop; return it."""
    while True:
        order = await around.next_order()
        match order.command:
            case Command.STOP:
                return order
            case Command.RELOAD:
                log.info("reload started", **_origin(order))
                reloads.request()
            case Command.DUMP_STATS:
                around.logs.always("stats", **server.snapshot())
            case Command.UPGRADE:
                log.info("upgrade started", **_origin(order))
                upgrades.request()
            case _:
                assert_never(order.command)


async def _drain(stop: Order, timeouts: Timeouts, server: Server, around: Surroundings) -> Drained:
    """Drain, after the time as a lame duck, following the orders that still make sense."""
    is_cut = asyncio.Event()
    following = asyncio.ensure_future(_follow_while_draining(server, around, is_cut))
    cutting = asyncio.ensure_future(is_cut.wait())
    try:
        if timeouts.lame_duck:
            await _lame_duck(stop, timeouts.lame_duck, server, around.notifier, cutting)
        log.info("drain started", **_origin(stop), connections=server.open_connections, seconds_left=timeouts.drain)
        around.notifier.stopping(_drain_status(server.open_connections, timeouts.drain))
        draining = asyncio.ensure_future(server.drain(partial(_report, around.notifier)))
        await asyncio.wait({draining, cutting}, return_when=asyncio.FIRST_COMPLETED)
        if cutting.done():
            server.cut_off()
        return await draining
    finally:
        for task in (following, cutting):
            task.cancel()
        await asyncio.gather(following, cutting, return_exceptions=True)


async def _lame_duck(
    stop: Order, seconds: float, server: Server, notifier: Notifier, cutting: "asyncio.Future[Literal[True]]"
) -> None:
    """Go on accepting, while whoever asks is told that we are leaving; until a second signal."""
    log.info("lame duck started", **_origin(stop), connections=server.open_connections, seconds_left=seconds)
    server.is_leaving = True
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    notifier.stopping(_lame_duck_status(server.open_connections, seconds))
    while (left_s := end - loop.time()) > 0 and not cutting.done():
        await asyncio.wait({cutting}, timeout=min(left_s, PROGRESS_S))
        notifier.extend(EXTENSION_S, _lame_duck_status(server.open_connections, max(0.0, end - loop.time())))


def _report(notifier: Notifier, connections: int, seconds_left: float) -> None:
    log.info("drain progress", connections=connections, seconds_left=round(seconds_left, 1))
    notifier.extend(EXTENSION_S, _drain_status(connections, seconds_left))


async def _follow_while_draining(server: Server, around: Surroundings, is_cut: asyncio.Event) -> None:
    while True:
        order = await around.next_order()
        match order.command:
            case Command.STOP:
                log.warning("drain cut short", **_origin(order))
                is_cut.set()
            case Command.RELOAD:
                log.info("reload ignored", why="draining")
            case Command.DUMP_STATS:
                around.logs.always("stats", **server.snapshot())
            case Command.UPGRADE:
                log.warning("upgrade refused", errors=["draining"])
            case _:
                assert_never(order.command)


def _origin(order: Order) -> dict[str, str | int]:
    """Which signal, and whose: the kernel, as for Ctrl-C, has no pid."""
    return {"signal": order.signal} | ({"sender_pid": order.sender_pid} if order.sender_pid else {})


def _status(server: Server, stats: Stats) -> str:
    counts = f"{_connections(server.open_connections)} open, {stats.accepted} accepted"
    return f"{counts}; last reload refused: {stats.reload_error}" if stats.reload_error else counts


def _connections(count: int) -> str:
    return "1 connection" if count == 1 else f"{count} connections"


def _lame_duck_status(connections: int, seconds_left: float) -> str:
    return f"lame duck: {_connections(connections)}, accepting for {seconds_left:.0f} s more"


def _drain_status(connections: int, seconds_left: float) -> str:
    return f"draining: {_connections(connections)} left, {seconds_left:.0f} s left"
