"""From ready to stopped, as one straight line: serve until told to stop, drain, say how it ended.

What each command means in each phase is decided here and nowhere else.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

import structlog

from echod.admin import Endpoint, Verdict
from echod.generation import Generation
from echod.logs import Logs
from echod.reload import Parts, Prepare, Reloads
from echod.server import Drained, Server
from echod.signals import Command, Order
from echod.sockets import ListenError
from echod.stats import Stats
from echod.supervision import supervise
from echod.systemd import Notifier
from echod.watch import BEAT_S, Watch

EXTENSION_S = 3.0
"""What a drain that goes on asks the service manager for, once a second: its end needs up to two."""

log = structlog.get_logger()


class Outcome(Enum):
    """How a run ended."""

    STOPPED = "every client got what it was owed"
    CUT_OFF = "some client was cut off"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run is given: orders to follow, a way to reload, logs to write, whom to tell that clients are served."""

    next_order: Callable[[], Awaitable[Order]]
    prepare: Prepare
    logs: Logs
    stats: Stats
    open_files: int
    notifier: Notifier
    watchdog_s: float | None
    """How often the service manager wants a sign of life."""
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
    endpoint.apply(first.admin)
    server.apply(first.config, first.listeners)
    notifier = around.notifier

    def status() -> str:
        return _status(server, around.stats)

    reloads = Reloads(first, around.prepare, Parts(server, endpoint, around.logs), around.stats)
    reloads.on_begin, reloads.on_end = notifier.reloading, lambda: notifier.ready(status())
    for warning in first.warnings:
        log.warning("configuration", warning=warning)
    log.info("ready", listen=server.addresses, pid=os.getpid())
    around.on_serving(server, reloads)
    notifier.ready(status())
    supervising = asyncio.ensure_future(supervise(notifier, around.watchdog_s, status, server.is_well))
    try:
        stop = await _serve(server, reloads, around)
    finally:
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)
    endpoint.start_draining()
    await reloads.close()
    drained = await _drain(stop, reloads.config.timeouts.drain, server, around)
    log.info("drain finished", clean=drained.clean, cut=drained.cut, unacknowledged=drained.unacknowledged)
    await endpoint.close()
    return Outcome.CUT_OFF if drained.cut else Outcome.STOPPED


async def _serve(server: Server, reloads: Reloads, around: Surroundings) -> Order:
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
                log.warning("upgrade refused", errors=["not supported by this version"])
            case _:
                assert_never(order.command)


async def _drain(stop: Order, drain_s: float, server: Server, around: Surroundings) -> Drained:
    """Drain, following the orders that still make sense."""
    log.info(
        "drain started",
        **_origin(stop),
        connections=server.open_connections,
        seconds_left=drain_s,
    )
    around.notifier.stopping(_drain_status(server.open_connections, drain_s))

    def report(connections: int, seconds_left: float) -> None:
        log.info("drain progress", connections=connections, seconds_left=round(seconds_left, 1))
        around.notifier.extend(EXTENSION_S, _drain_status(connections, seconds_left))

    draining = asyncio.ensure_future(server.drain(report))
    following = asyncio.ensure_future(_follow_while_draining(server, around))
    try:
        return await draining
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def _follow_while_draining(server: Server, around: Surroundings) -> None:
    while True:
        order = await around.next_order()
        match order.command:
            case Command.STOP:
                log.warning("drain cut short", **_origin(order))
                server.cut_off()
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
    counts = f"{server.open_connections} connections open, {stats.accepted} accepted"
    return f"{counts}; last reload refused: {stats.reload_error}" if stats.reload_error else counts


def _drain_status(connections: int, seconds_left: float) -> str:
    return f"draining: {connections} connections left, {seconds_left:.0f} s left"
