"""Runs blocking work in a thread: a slow name server, disk or import must delay neither clients nor a stop."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class NoThreadError(Exception):
    """No thread can be started; the message says why and what to do."""


async def in_thread(work: Callable[[], Result], discard: Callable[[Result], object] = lambda _: None) -> Result:
    """Run `work` in a thread and return or raise its result; `discard` receives a result that is no longer awaited.

    Raise NoThreadError if the limit of threads is reached. The thread is a daemon thread, not an executor's: at its end
    the event loop would wait for an executor.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            _deliver(loop, _fail, done, error)
        else:
            if not _deliver(loop, _fulfil, done, result, discard):
                discard(result)

    try:
        threading.Thread(target=run, name="worker", daemon=True).start()
    except RuntimeError as error:
        raise NoThreadError(f"{error}; raise TasksMax= or the limit of processes (ulimit -u)") from error
    try:
        return await done
    except asyncio.CancelledError:
        if done.done() and not done.cancelled() and not done.exception():
            discard(done.result())  # it arrived in the same iteration of the loop as the cancellation
        raise


def _deliver(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object) -> bool:
    """Hand a result to the loop from another thread; False if the loop is closed."""
    try:
        loop.call_soon_threadsafe(callback, *arguments)
    except RuntimeError:
        return False
    return True


def _fulfil(done: "asyncio.Future[Any]", result: Any, discard: Callable[[Any], object]) -> None:
    if done.cancelled():
        discard(result)
    else:
        done.set_result(result)


def _fail(done: "asyncio.Future[Any]", error: Exception) -> None:
    if not done.cancelled():
        done.set_exception(error)
