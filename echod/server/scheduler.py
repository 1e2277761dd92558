"""Schedules work in bounded slices: costly input, and postponed reads when very many connections have input at once."""

import asyncio
import time
from collections import deque
from typing import Protocol

from echod.server.fastpath import begin_turn

SLICE_S = 0.003
"""The time that costly input may use in each iteration of the event loop, however many clients send it."""


READ_S = 0.015
"""The time that postponed reads may use in each iteration of the event loop."""


class Worker(Protocol):
    """A connection whose costly input is answered in small steps."""

    def take_step(self) -> bool:
        """Do one step; return whether more work is left."""


class Reader(Protocol):
    """A connection whose read has been postponed."""

    def read_postponed(self) -> None:
        """Do the postponed read."""


class Scheduler:
    """A round-robin queue of workers, each of which does one step at a time, and a queue of postponed reads."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Worker] = deque()
        self._reads: deque[Reader] = deque()
        self._is_scheduled = False
        begin_turn()

    def add(self, worker: Worker) -> None:
        """Queue the worker until it has no more work; it must not be in the queue already."""
        self._queue.append(worker)
        self.check()

    def postpone(self, reader: Reader) -> None:
        """Queue a read; the reader must not be queued already. Until the queue is empty, all reads are queued."""
        self._reads.append(reader)
        self.check()

    def check(self) -> None:
        """Schedule a run in the next iteration of the event loop, if only to detect that the loop iterates."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        try:
            self._work(time.monotonic() + SLICE_S)
            self._read(time.monotonic() + READ_S)
        finally:
            if not self._reads:  # while clients wait here, the work counted so far sends all others here, too
                begin_turn()
            if self._queue or self._reads:
                self.check()

    def _work(self, end: float) -> None:
        while self._queue:
            worker = self._queue.popleft()
            if worker.take_step():
                self._queue.append(worker)
            if time.monotonic() >= end:
                break

    def _read(self, end: float) -> None:
        while self._reads:
            self._reads.popleft().read_postponed()
            if time.monotonic() >= end:
                break
