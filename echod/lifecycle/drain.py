"""The stop of a service that has clients: the lame-duck time, then the drain.

All deadlines are measured from the signal, even if a busy event loop handles it late.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, assert_never

import structlog
from msgspec import Struct

from echod.admin.endpoint import Endpoint
from echod.config.schema import Timeouts
from echod.process.sd_notify import Notifier
from echod.process.signals import Action, SignalEvent, SignalQueue
from echod.server.server import PROGRESS_S, DrainResult, Server

EXTENSION_S = 3.0
"""The extension that a running drain requests from the service manager once a second; its end takes up to 2 s."""

log = structlog.get_logger()


class Means(Struct, frozen=True):
    """The objects that a stop needs."""

    server: Server
    endpoint: Endpoint
    notifier: Notifier
    orders: SignalQueue
    dump_stats: Callable[[], None]


async def drain(stop: SignalEvent, began_at: float, timeouts: Timeouts, means: Means) -> DrainResult:
    """Wait out the lame-duck time, drain the server, and close the admin endpoint; return how the drain ended.

    Signals that arrive meanwhile are handled as their phase allows. `began_at` (time.monotonic) is when the stop was
    requested.
    """
    is_cut = asyncio.Event()
    following = asyncio.ensure_future(_follow(means, is_cut))
    cutting = asyncio.ensure_future(is_cut.wait())
    deadline = began_at + timeouts.lame_duck + timeouts.drain
    try:
        if timeouts.lame_duck:
            await _lame_duck(stop, began_at + timeouts.lame_duck, means, cutting)
        return await _drain(stop, timeouts.drain, min(deadline, time.monotonic() + timeouts.drain), means, cutting)
    finally:
        for task in (following, cutting):
            task.cancel()
        await asyncio.gather(following, cutting, return_exceptions=True)
        if any(order.command is Action.DUMP_STATS for order in means.orders.take()):
            means.dump_stats()


async def _lame_duck(stop: SignalEvent, end: float, means: Means, cutting: "asyncio.Future[Literal[True]]") -> None:
    """Keep accepting while `/readyz` reports draining, until `end` or a second signal."""
    server, notifier = means.server, means.notifier
    seconds = round(max(0.0, end - time.monotonic()), 1)
    log.info("lame duck started", **stop.origin, connections=server.open_connections, seconds_left=seconds)
    server.is_leaving = True
    notifier.stopping(_lame_duck_status(server.open_connections, seconds))
    while (left_s := end - time.monotonic()) > 0 and not cutting.done():
        await asyncio.wait({cutting}, timeout=min(left_s, PROGRESS_S))
        notifier.extend(EXTENSION_S, _lame_duck_status(server.open_connections, max(0.0, end - time.monotonic())))


async def _drain(
    stop: SignalEvent, drain_s: float, deadline: float, means: Means, cutting: "asyncio.Future[Literal[True]]"
) -> DrainResult:
    server = means.server
    server.is_leaving = True
    log.info("drain started", **stop.origin, connections=server.open_connections, seconds_left=drain_s)
    means.notifier.stopping(_drain_status(server.open_connections, drain_s))
    draining = asyncio.ensure_future(server.drain(partial(_report, means.notifier), deadline))
    closing = asyncio.ensure_future(_close(means.endpoint, draining, deadline))
    either: set[asyncio.Future[Any]] = {draining, cutting}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if cutting.done():
        server.abort_all()
    drained, _ = await asyncio.gather(draining, closing)
    return drained


async def _close(endpoint: Endpoint, draining: "asyncio.Future[DrainResult]", deadline: float) -> None:
    """Close the admin endpoint when the drain has finished, or at its deadline, while the last clients close."""
    await asyncio.wait({draining}, timeout=max(0.0, deadline - time.monotonic()))
    await endpoint.close()


def _report(notifier: Notifier, count: int, seconds_left: float) -> None:
    log.info("drain progress", connections=count, seconds_left=round(seconds_left, 1))
    notifier.extend(EXTENSION_S, _drain_status(count, seconds_left))


async def _follow(means: Means, is_cut: asyncio.Event) -> None:
    while True:
        order = await means.orders.get()
        match order.command:
            case Action.STOP:
                log.warning("drain cut short", **order.origin)
                is_cut.set()
            case Action.RELOAD:
                log.info("reload ignored", why="draining")
            case Action.DUMP_STATS:
                means.dump_stats()
            case Action.UPGRADE:
                log.warning("upgrade refused", errors=["draining"])
            case _:
                assert_never(order.command)


def connections(count: int) -> str:
    """Format a number of connections, with the right plural."""
    return "1 connection" if count == 1 else f"{count} connections"


def _lame_duck_status(count: int, seconds_left: float) -> str:
    return f"lame duck: {connections(count)}, accepting for {seconds_left:.0f} s more"


def _drain_status(count: int, seconds_left: float) -> str:
    return f"draining: {connections(count)} left, {seconds_left:.0f} s left"
