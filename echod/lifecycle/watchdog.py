"""What the service manager hears while clients are served: a status line, and signs of life if it wants any.

The event loop itself gives the signs of life, and only while a client would be served.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from echod.process.sd_notify import Notifier

STATUS_S = 2.0
"""How often the status line is brought up to date."""

log = structlog.get_logger()


async def supervise(
    notifier: Notifier,
    watchdog_s: float | None,
    status: Callable[[], str],
    is_well: Callable[[float], Awaitable[bool]],
) -> None:
    """Report until cancelled; `is_well` is asked whether a client would be served within so many seconds."""
    if not notifier.is_enabled:
        return
    feeding = asyncio.ensure_future(_feed(notifier, watchdog_s / 3, is_well)) if watchdog_s else None
    try:
        await _report(notifier, status)
    finally:
        if feeding:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


async def _report(notifier: Notifier, status: Callable[[], str]) -> None:
    told = ""
    while True:
        if (now := status()) != told:
            notifier.status(told := now)
        await asyncio.sleep(STATUS_S)


async def _feed(notifier: Notifier, interval_s: float, is_well: Callable[[float], Awaitable[bool]]) -> None:
    while True:
        if await is_well(interval_s):
            notifier.alive()
        else:
            log.error("self-check failed", advice="no reply through the own listener; the watchdog is not fed")
        await asyncio.sleep(interval_s)
