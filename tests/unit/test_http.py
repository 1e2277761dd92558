"""One exchange of the admin endpoint alone."""

import asyncio
import inspect
import socket

from echod.admin.cpu_share import CpuShare
from echod.admin.http import Answer, Exchange


def test_an_answer_that_nobody_waits_for_any_more_is_closed() -> None:
    """If an exchange closes before its answer has begun, Python must not warn of a coroutine that was never awaited."""

    async def answer() -> Answer:
        raise AssertionError

    async def scenario() -> None:
        ours, client = socket.socketpair()
        with client:
            share = CpuShare(0.2, lambda: None, lambda: None)
            exchange = Exchange(ours, "", share, lambda *_: None, lambda _: None)
            exchange.start()
            late = answer()
            exchange.reply_later(late)
            exchange.close()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert inspect.getcoroutinestate(late) == inspect.CORO_CLOSED

    asyncio.run(scenario())
