"""A round trip to ourselves: what it proves, and what it doesn't."""

import asyncio
import contextlib
import gc
import socket
import warnings

import pytest
import uvloop
from structlog.testing import capture_logs

from echod.process import limits
from echod.server import self_probe
from echod.server.self_probe import LINE, REPLY, SelfProbe
from tests.support.daemon import DEADLINE_S


async def _passes(check: SelfProbe, listener: socket.socket, reply: bytes | None) -> bool:
    """Let one check be answered by `reply`, or by nothing; whether it passed."""
    loop = asyncio.get_running_loop()
    asked = asyncio.ensure_future(check.passes(listener, DEADLINE_S if reply else 1))
    client, peer = await loop.sock_accept(listener)
    with client:
        assert check.is_self_probe(peer)
        assert await loop.sock_recv(client, 100) == LINE
        if reply:
            await loop.sock_sendall(client, reply)
        return await asked


def test_no_reply_counts_only_where_there_was_one() -> None:
    """A filter may keep us, and us alone, from our port: that starves no watchdog. A reply that stays away does."""

    async def scenario(listener: socket.socket) -> list[bool]:
        check = SelfProbe()
        return [await _passes(check, listener, reply) for reply in (None, REPLY, None, b"no reply at all\n")]

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(scenario(listener)) == [True, True, False, False]


def test_nobody_else_is_taken_for_our_check() -> None:
    """A check is recognized once. One that got no reply in time keeps its address until it is accepted."""

    async def scenario(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        check = SelfProbe()
        assert await check.passes(listener, 0.05), "no reply proves nothing yet"
        (name,) = check.names
        assert isinstance(name, tuple)
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(name)
        client, peer = await loop.sock_accept(listener)
        with client:
            assert check.is_self_probe(peer)
            assert not check.is_self_probe(peer), "a later client with that address is not ours"
            assert await loop.sock_recv(client, 100) == LINE
            assert await loop.sock_recv(client, 100) == b"", "our end is closed once it is accepted"
        assert check.names == []

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(scenario(listener))


def test_checks_that_are_never_accepted_are_few() -> None:
    """A listener that accepts nobody costs no more than a handful of descriptors, and none afterwards."""

    async def scenario(listener: socket.socket) -> None:
        check = SelfProbe()
        before = limits.open_files()
        for _ in range(40):
            await check.passes(listener, 0.01)
        assert len(check.names) <= 17
        assert limits.open_files() - before <= 17

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the last ones go with the check
            runner.run(scenario(listener))
            gc.collect()


def test_the_check_of_the_predecessor_is_expected_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is recognized once, or not at all if it is not accepted soon."""

    async def scenario() -> None:
        check = SelfProbe()
        check.expect([("127.0.0.1", 1), ("127.0.0.1", 2)])
        assert check.is_self_probe(("127.0.0.1", 1))
        assert not check.is_self_probe(("127.0.0.1", 1))
        monkeypatch.setattr(self_probe, "_PREDECESSORS_S", -1.0)
        check.expect([("127.0.0.1", 2)])
        assert not check.is_self_probe(("127.0.0.1", 2))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


def test_an_impossible_probe_is_logged_once_and_proves_nothing() -> None:
    """A refused connection, as of a port that is being closed, says nothing about the service."""

    async def scenario() -> list[bool]:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            probe = SelfProbe()
            return [await probe.passes(bound, DEADLINE_S) for _ in range(2)]

    with capture_logs() as logged, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(scenario()) == [True, True]
    assert logged == [{"event": "self-probe impossible", "log_level": "debug", "why": "connection refused"}]
