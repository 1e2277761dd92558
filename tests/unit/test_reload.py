"""Reloads with a server, an admin endpoint and a service manager that only record what they are told."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from echod.admin.endpoint import ReloadResult
from echod.config.schema import Config
from echod.lifecycle import reload
from echod.lifecycle.generation import Generation
from echod.lifecycle.reload import DRAINING, Reloader, put_in_force
from echod.net.sockets import ListenError
from echod.process.phase import Life, Phase
from echod.telemetry.stats import Stats
from tests.support.daemon import DEADLINE_S


def generation() -> Generation:
    return Generation(Config(), (), {}, {}, None)


class Fakes:
    """The server, the admin endpoint and the runtime of a `Reloader`."""

    def __init__(self, prepare: Callable[[], Generation] = generation) -> None:
        self.listening: dict[Any, Any] = {}
        self.addresses: list[str] = []
        self.open_connections = 0
        self.stats = Stats({})
        self.life = Life()
        self.prepared = 0
        self.notified: list[str] = []
        self.notifier = SimpleNamespace(
            reloading=lambda: self.notified.append("reloading"), ready=lambda _: self.notified.append("ready")
        )
        self.logs = SimpleNamespace(apply=lambda *_: None)
        self._prepare = prepare

    def reloader(self) -> Reloader:
        it: Any = self
        return Reloader(generation(), it, it, it)

    def prepare(self, _kept: object) -> Generation:
        self.prepared += 1
        return self._prepare()

    @contextmanager
    def change(self, *_: object) -> Iterator[None]:
        yield

    async def retired(self) -> None:
        pass


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, DEADLINE_S))


def test_requests_at_once_become_one_reload_that_names_the_first() -> None:
    async def scenario() -> None:
        fakes = Fakes()
        reloads = fakes.reloader()
        assert reloads.is_idle
        reloads.request(by="the first")
        reloads.request(by="the second")
        assert not reloads.is_idle
        await reloads.idle()
        assert (fakes.prepared, fakes.stats.reloads_applied) == (1, 1)
        assert fakes.notified == ["reloading", "ready"]
        await reloads.close()

    with capture_logs() as events:
        run(scenario())
    assert [(event["event"], event.get("by")) for event in events] == [
        ("reload started", "the first"),
        ("reload applied", None),
    ]


def test_a_request_during_a_reload_becomes_another_one_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause keeps a flood of requests from taking CPU time from clients."""

    async def scenario() -> None:
        fakes = Fakes()
        monkeypatch.setattr(reload, "PAUSE_S", 2 * DEADLINE_S)
        reloads = fakes.reloader()
        assert await reloads.reload() == ReloadResult()
        again = asyncio.ensure_future(reloads.reload())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(again), 0.1)
        assert not reloads.is_idle
        assert fakes.prepared == 1
        await reloads.close()
        assert await again == DRAINING

    with capture_logs() as events:
        run(scenario())
    assert events[-1]["event"] == "reload ignored"


def test_an_unforeseen_error_refuses_the_reload() -> None:
    """It is logged with its traceback, and counted."""

    def fail() -> Generation:
        raise ZeroDivisionError("unforeseen")

    async def scenario() -> None:
        fakes = Fakes(fail)
        reloads = fakes.reloader()
        result = await reloads.reload()
        assert result.errors == ("ZeroDivisionError('unforeseen')",)
        assert (fakes.stats.reloads_refused, fakes.stats.reload_error) == (1, result.errors[0])
        await reloads.close()

    with capture_logs() as events:
        run(scenario())
    assert [event["event"] for event in events if event["log_level"] == "error"] == ["reload failed", "reload refused"]


def test_nothing_is_reloaded_after_a_stop_was_requested() -> None:
    async def scenario() -> None:
        fakes = Fakes()
        reloads = fakes.reloader()
        fakes.life.enter(Phase.LAME_DUCK)
        assert await reloads.reload() == DRAINING
        assert not fakes.prepared
        await reloads.close()

    run(scenario())


def test_a_requester_that_is_gone_disturbs_no_other() -> None:
    async def scenario() -> None:
        reloads = Fakes().reloader()
        gone, waiting = (asyncio.ensure_future(reloads.reload()) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        assert await waiting == ReloadResult()
        await reloads.close()

    run(scenario())


def test_a_generation_that_cannot_be_put_in_force_is_discarded() -> None:
    class Failing:
        admin = listeners = config = None
        is_discarded = False

        def listen(self) -> None:
            raise ListenError("taken")

        def discard(self) -> None:
            self.is_discarded = True

    failing, it = Failing(), SimpleNamespace()
    given: list[Any] = [failing, it, it]
    with pytest.raises(ListenError):
        put_in_force(*given)
    assert failing.is_discarded
