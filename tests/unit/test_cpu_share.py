"""CPU shares on a real event loop, with work that uses real CPU time."""

import asyncio
import time

import pytest
import uvloop

from echod.admin.cpu_share import CpuShare
from tests.support.daemon import DEADLINE_S


class Worker:
    """Work that repeats as often as its share allows."""

    def __init__(self, share: float, piece_s: float) -> None:
        self.spent_s = 0.0
        self.has_paused_often = asyncio.Event()
        self._pauses = 0
        self._piece_s = piece_s
        self._is_paused = False
        self._loop = asyncio.get_running_loop()
        self.share = CpuShare(share, self._pause, self._resume)

    def start(self) -> None:
        if not self._is_paused:
            self.share.run(self._work)
            self._loop.call_soon(self.start)

    def _work(self) -> None:
        end = time.thread_time() + self._piece_s
        while time.thread_time() < end:
            pass
        self.spent_s += self._piece_s

    def _pause(self) -> None:
        assert not self._is_paused
        self._is_paused = True
        self._pauses += 1
        if self._pauses == 20:
            self.has_paused_often.set()

    def _resume(self) -> None:
        assert self._is_paused
        self._is_paused = False
        self.start()


@pytest.mark.parametrize("piece_s", [0.0001, 0.005])
def test_work_gets_its_share_and_no_more(piece_s: float) -> None:
    """Endless work, in small or large pieces, uses its share of the time and continues after each pause."""

    async def main() -> None:
        began = time.monotonic()
        worker = Worker(0.1, piece_s)
        worker.start()
        async with asyncio.timeout(DEADLINE_S):
            await worker.has_paused_often.wait()
        assert worker.spent_s <= 0.1 * (time.monotonic() - began) + 0.001 + piece_s

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_what_comes_alone_is_never_suspended() -> None:
    """Work below its share is never paused."""

    async def main() -> None:
        suspended: list[None] = []
        share = CpuShare(0.5, lambda: suspended.append(None), lambda: None)
        for _ in range(100):
            share.run(lambda: None)
            await asyncio.sleep(0.002)  # the pace of the work
        assert not suspended

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_work_that_fails_is_charged() -> None:
    """An exception is passed on, and its time is charged."""

    def fail() -> None:
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass
        raise ValueError("failed")

    async def main() -> None:
        share = CpuShare(0.1, lambda: None, lambda: None)
        with pytest.raises(ValueError, match="failed"):
            share.run(fail)
        assert share.is_suspended

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
