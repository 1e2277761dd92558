"""Background tasks that fail loudly."""

import asyncio

import pytest
from structlog.testing import capture_logs

from echod.process import tasks


def test_a_task_that_raises_is_logged_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RESTART_S", 0)
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ValueError(runs)

    async def scenario() -> None:
        await tasks.background(work, "work")

    with capture_logs() as events:
        asyncio.run(scenario())
    assert runs == 3
    assert [(event["event"], event["task"]) for event in events] == 2 * [("background task failed", "work")]


def test_a_task_that_runs_once_is_logged_and_not_started_again() -> None:
    async def work() -> None:
        raise ValueError

    async def scenario() -> None:
        await tasks.background_once(work, "work")

    with capture_logs() as events:
        asyncio.run(scenario())
    assert [event["event"] for event in events] == ["background task failed"]


def test_a_task_that_is_ended_is_not_started_again() -> None:
    async def scenario() -> None:
        task = tasks.background(asyncio.Event().wait, "work")
        await asyncio.sleep(0)
        await tasks.end([task])
        assert task.cancelled()

    with capture_logs() as events:
        asyncio.run(scenario())
    assert events == []
