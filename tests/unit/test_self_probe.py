"""The self-probe: what a round trip through our own listener proves, and what it does not."""

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


async def _passes(probe: SelfProbe, listener: socket.socket, reply: bytes | None) -> bool:
    """Return whether a probe passed that got this reply, or none."""
    loop = asyncio.get_running_loop()
    asked = asyncio.ensure_future(probe.passes(listener, DEADLINE_S if reply else 1))
    client, peer = await loop.sock_accept(listener)
    with client:
        assert probe.is_self_probe(peer)
        assert await loop.sock_recv(client, 100) == LINE
        if reply:
            await loop.sock_sendall(client, reply)
        return await asked


def test_a_missing_reply_is_a_failure_only_after_a_reply() -> None:
    """A packet filter may block only our own connections, which must not trigger the watchdog."""

    async def scenario(listener: socket.socket) -> list[bool]:
        probe = SelfProbe()
        return [await _passes(probe, listener, reply) for reply in (None, REPLY, None, b"no reply at all\n")]

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(scenario(listener)) == [True, True, False, False]


def test_no_other_client_is_recognized_as_a_probe() -> None:
    """A probe is recognized once; without a reply it keeps its address until it is accepted."""

    async def scenario(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        probe = SelfProbe()
        assert await probe.passes(listener, 0.5), "no reply proves nothing yet"
        (name,) = probe.names
        assert isinstance(name, tuple)
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(name)
        client, peer = await loop.sock_accept(listener)
        with client:
            assert probe.is_self_probe(peer)
            assert not probe.is_self_probe(peer), "a later client with that address is not ours"
            assert await loop.sock_recv(client, 100) == LINE
            assert await loop.sock_recv(client, 100) == b"", "our end is closed once it is accepted"
        assert probe.names == []

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(scenario(listener))


def test_unaccepted_probes_hold_few_descriptors() -> None:
    """A listener that accepts nobody costs at most seventeen descriptors."""

    async def scenario(listener: socket.socket) -> None:
        probe = SelfProbe()
        before = limits.open_files()
        for _ in range(40):
            await probe.passes(listener, 0.01)
        assert len(probe.names) <= 17
        assert limits.open_files() - before <= 17

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the last sockets are released with the probe
            runner.run(scenario(listener))
            gc.collect()


def test_a_probe_of_the_predecessor_is_expected_for_a_short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is recognized once, and not after that time."""

    async def scenario() -> None:
        probe = SelfProbe()
        probe.expect([("127.0.0.1", 1), ("127.0.0.1", 2)])
        assert probe.is_self_probe(("127.0.0.1", 1))
        assert not probe.is_self_probe(("127.0.0.1", 1))
        monkeypatch.setattr(self_probe, "_PREDECESSORS_S", -1.0)
        probe.expect([("127.0.0.1", 2)])
        assert not probe.is_self_probe(("127.0.0.1", 2))

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
