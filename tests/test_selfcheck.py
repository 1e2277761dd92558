"""A round trip to ourselves: what it proves, and what it doesn't."""

import asyncio
import contextlib
import socket

import uvloop

from echod.selfcheck import LINE, REPLY, SelfCheck
from tests.daemon import DEADLINE_S


async def _passes(check: SelfCheck, listener: socket.socket, reply: bytes | None) -> bool:
    """Let one check be answered by `reply`, or by nothing; whether it passed."""
    loop = asyncio.get_running_loop()
    asked = asyncio.ensure_future(check.passes(listener, DEADLINE_S if reply else 1))
    client, peer = await loop.sock_accept(listener)
    with client:
        assert check.is_ours(peer)
        assert await loop.sock_recv(client, 100) == LINE
        if reply:
            await loop.sock_sendall(client, reply)
        return await asked


def test_no_reply_counts_only_where_there_was_one() -> None:
    """A filter may keep us, and us alone, from our port: that starves no watchdog. A reply that stays away does."""

    async def scenario(listener: socket.socket) -> list[bool]:
        check = SelfCheck()
        return [await _passes(check, listener, reply) for reply in (None, REPLY, None, b"no reply at all\n")]

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(scenario(listener)) == [True, True, False, False]


def test_a_check_that_can_t_be_made_tells_nothing() -> None:
    """A refusal, as of a port that is being closed, says nothing about the service."""

    async def scenario() -> bool:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            return await SelfCheck().passes(bound, DEADLINE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(scenario())
