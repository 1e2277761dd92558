"""What the service manager is told while clients are served: a status line, and signs of life if it wants them.

The event loop itself gives the signs of life, and only while a client would be served.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from echod.process import tasks
from echod.process.sd_notify import Notifier

STATUS_S = 2.0
"""How often the status line is updated."""

log = structlog.get_logger()


def supervise(
    notifier: Notifier,
    watchdog_s: float | None,
    status: Callable[[], str],
    is_well: Callable[[float], Awaitable[bool]],
) -> "list[asyncio.Task[object]]":
    """Start the tasks that report to the service manager, and return them.

    `is_well` tells whether a client would be served within so many seconds.
    """
    if not notifier.is_enabled:
        return []
    reporting = [tasks.background(partial(_report, notifier, status), "status")]
    if watchdog_s:
        reporting.append(tasks.background(partial(_feed, notifier, watchdog_s / 3, is_well), "watchdog"))
    return reporting


async def _report(notifier: Notifier, status: Callable[[], str]) -> None:
    reported = ""
    while True:
        current = status()
        if current != reported:
            notifier.status(current)
            reported = current
        await asyncio.sleep(STATUS_S)


async def _feed(notifier: Notifier, interval_s: float, is_well: Callable[[float], Awaitable[bool]]) -> None:
    while True:
        if await is_well(interval_s):
            notifier.alive()
        else:
            log.error("self-check failed", advice="no reply through the own listener; the watchdog is not fed")
        await asyncio.sleep(interval_s)
