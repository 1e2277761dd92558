"""A stop with a server, an admin endpoint and a service manager that only record what they are told."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from echod.lifecycle import drain
from echod.lifecycle.drain import Stop
from echod.process.signals import SignalQueue, event_of
from echod.server.server import DrainResult
from tests.support.daemon import DEADLINE_S

RESULT = DrainResult(clean=1, cut=2, unacknowledged=0)


class Fakes:
    """The server, the admin endpoint and the runtime of a stop."""

    def __init__(self) -> None:
        self.signals = SignalQueue()
        self.notified: list[tuple[str, str]] = []
        self.notified_thrice = asyncio.Event()
        self.dumps = 0
        self.may_end = asyncio.Event()
        self.admin_closed = asyncio.Event()
        self.is_aborted = False
        self.report: Callable[[int, float], None] = lambda *_: None
        self.open_connections = 2
        self.logs = SimpleNamespace(always=self._dump)
        self.notifier = SimpleNamespace(
            stopping=partial(self._notify, "stopping"),
            extend=lambda seconds, status: self._notify(f"extend {seconds}", status),
        )

    def stop(self) -> Stop:
        it: Any = self
        return Stop(signal("TERM"), it, it, it)

    def _notify(self, what: str, status: str) -> None:
        self.notified.append((what, status))
        if len(self.notified) == 3:
            self.notified_thrice.set()

    def _dump(self, event: str) -> None:
        assert event == "stats"
        self.dumps += 1

    def snapshot(self) -> dict[str, object]:
        return {}

    async def drain(self, report: Callable[[int, float], None], _deadline: float) -> DrainResult:
        self.report = report
        await self.may_end.wait()
        return RESULT

    def abort_all(self) -> None:
        self.is_aborted = True
        self.may_end.set()

    async def close(self) -> None:
        self.admin_closed.set()


def signal(name: str) -> Any:
    return event_of(name, 0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, DEADLINE_S))


async def several_iterations() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_drain_returns_its_result_and_leaves_no_task() -> None:
    async def scenario() -> None:
        fakes, before = Fakes(), asyncio.all_tasks()
        async with fakes.stop() as stop:
            fakes.may_end.set()
            assert await stop.drain(8.0, time.monotonic() + 8.0) == RESULT
        assert asyncio.all_tasks() == before
        assert not fakes.is_aborted
        assert fakes.admin_closed.is_set()

    run(scenario())


def test_the_admin_endpoint_answers_until_the_drain_has_finished() -> None:
    async def scenario() -> None:
        fakes = Fakes()
        async with fakes.stop() as stop:
            draining = asyncio.ensure_future(stop.drain(60.0, time.monotonic() + 60.0))
            await several_iterations()
            assert not fakes.admin_closed.is_set()
            fakes.may_end.set()
            await draining
            assert fakes.admin_closed.is_set()

    run(scenario())


def test_the_admin_endpoint_closes_at_the_deadline_while_the_last_clients_close() -> None:
    async def scenario() -> None:
        fakes = Fakes()
        async with fakes.stop() as stop:
            draining = asyncio.ensure_future(stop.drain(0.0, time.monotonic()))
            await fakes.admin_closed.wait()
            assert not draining.done()
            fakes.may_end.set()
            await draining

    run(scenario())


def test_a_second_stop_signal_aborts_the_drain() -> None:
    async def scenario() -> None:
        fakes = Fakes()
        async with fakes.stop() as stop:
            draining = asyncio.ensure_future(stop.drain(60.0, time.monotonic() + 60.0))
            await several_iterations()
            assert not fakes.is_aborted
            fakes.signals.put(signal("INT"))
            assert await draining == RESULT
        assert fakes.is_aborted

    with capture_logs() as events:
        run(scenario())
    assert [event["event"] for event in events] == ["drain started", "drain cut short"]


@pytest.mark.parametrize(("name", "dumps"), [("USR1", 1), ("HUP", 0)])
def test_a_dump_that_is_requested_at_the_last_moment_is_still_logged(name: str, dumps: int) -> None:
    """Other signals mean nothing any more."""

    async def scenario() -> None:
        fakes = Fakes()
        async with fakes.stop():
            fakes.signals.put(signal(name))
        assert fakes.dumps == dumps
        assert not fakes.signals.take()

    run(scenario())


def test_progress_is_logged_and_extends_the_time_of_the_service_manager() -> None:
    async def scenario() -> None:
        fakes = Fakes()
        async with fakes.stop() as stop:
            draining = asyncio.ensure_future(stop.drain(8.0, time.monotonic() + 8.0))
            await several_iterations()
            fakes.report(1, 4.04)
            fakes.may_end.set()
            await draining
        assert fakes.notified == [
            ("stopping", "draining: 2 connections left, 8 s left"),
            ("extend 3.0", "draining: 1 connection left, 4 s left"),
        ]

    with capture_logs() as events:
        run(scenario())
    assert events[0] == {
        "event": "drain started",
        "log_level": "info",
        "signal": "TERM",
        "connections": 2,
        "seconds_left": 8.0,
    }
    assert events[1] == {"event": "drain progress", "log_level": "info", "connections": 1, "seconds_left": 4.0}


def test_the_lame_duck_time_is_reported_and_extends_the_time_of_the_service_manager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The status counts down to the end, and a stop signal ends the wait."""
    monkeypatch.setattr(drain, "PROGRESS_S", 0.01)

    async def scenario() -> None:
        fakes = Fakes()
        end = time.monotonic() + 60.0
        async with fakes.stop() as stop:
            waiting = asyncio.ensure_future(stop.lame_duck(end))
            await fakes.notified_thrice.wait()
            assert not waiting.done()
            fakes.signals.put(signal("TERM"))
            await waiting
        began, *extended = fakes.notified
        statuses = [f"lame duck: 2 connections, accepting for {left} s more" for left in range(40, 61)]
        assert began == ("stopping", statuses[-1])
        assert {reported for reported, _ in extended} == {"extend 3.0"}
        assert {status for _, status in extended} <= {*statuses}

    with capture_logs() as events:
        run(scenario())
    assert [event["event"] for event in events] == ["lame duck started", "drain cut short"]
    assert 59 < events[0]["seconds_left"] <= 60


def test_a_lame_duck_time_that_has_passed_is_not_waited_for() -> None:
    """The event loop may handle the signal late."""

    async def scenario() -> None:
        fakes = Fakes()
        async with fakes.stop() as stop:
            await stop.lame_duck(time.monotonic() - 5.0)
        assert fakes.notified == [("stopping", "lame duck: 2 connections, accepting for 0 s more")]

    with capture_logs() as events:
        run(scenario())
    assert [event["seconds_left"] for event in events] == [0.0]
