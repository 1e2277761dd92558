"""Background tasks that nobody awaits: one that raises is logged and started again, so it never stops silently."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import structlog

RESTART_S = 1.0
"""The pause before a failed task is started again, so that one that always fails does not flood the log."""

log = structlog.get_logger()


def background(work: Callable[[], Awaitable[object]], name: str) -> "asyncio.Task[object]":
    """Run `work()` as a task until it returns or is cancelled; if it raises, log the error and run it again."""
    return asyncio.get_running_loop().create_task(_repeat(work, name), name=name)


def background_once(work: Callable[[], Awaitable[object]], name: str) -> "asyncio.Task[object]":
    """Run `work()` once as a task; if it raises, log the error."""
    return asyncio.get_running_loop().create_task(_run(work, name), name=name)


async def end(tasks: "Iterable[asyncio.Task[object]]") -> None:
    """Cancel the tasks and return when they have ended."""
    ending = [*tasks]
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


async def _repeat(work: Callable[[], Awaitable[object]], name: str) -> None:
    while True:
        if await _run(work, name):
            return
        await asyncio.sleep(RESTART_S)


async def _run(work: Callable[[], Awaitable[object]], name: str) -> bool:
    """Return whether the work ended without an error."""
    try:
        await work()
    except Exception:
        log.exception("background task failed", task=name)
        return False
    return True
