"""Schedules work in bounded portions: steps of costly input, and reads that were postponed for want of budget."""

import asyncio
import time
from collections import deque
from typing import Protocol

from echod.server.fastpath import begin_iteration

STEPS_S = 0.003
"""The time for steps of costly input in each iteration of the event loop, however many clients send it."""

READS_S = 0.015
"""The time for postponed reads in each iteration of the event loop."""


class Worker(Protocol):
    """A connection whose costly input is answered in steps."""

    def take_step(self) -> bool:
        """Answer a slice of the input; return whether more can be answered now."""


class Reader(Protocol):
    """A connection whose read has been postponed."""

    def read_postponed(self) -> None:
        """Do the postponed read."""


class Scheduler:
    """A round-robin queue of workers, each of which takes one step at a time, and a queue of postponed reads."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._workers: deque[Worker] = deque()
        self._readers: deque[Reader] = deque()
        self._is_scheduled = False
        begin_iteration()

    def add(self, worker: Worker) -> None:
        """Queue a worker until it has no more work; it must not be in the queue already."""
        self._workers.append(worker)
        self.schedule_run()

    def postpone(self, reader: Reader) -> None:
        """Queue a read; the reader must not be in the queue already. Until the queue is empty, all reads are queued."""
        self._readers.append(reader)
        self.schedule_run()

    def schedule_run(self) -> None:
        """Schedule a run in the next iteration of the event loop, if only to detect that it begins."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        try:
            self._take_steps(time.monotonic() + STEPS_S)
            self._read_postponed(time.monotonic() + READS_S)
        finally:
            if not self._readers:  # while readers wait, the spent budget sends all other reads to the queue, too
                begin_iteration()
            if self._workers or self._readers:
                self.schedule_run()

    def _take_steps(self, end: float) -> None:
        while self._workers:
            worker = self._workers.popleft()
            if worker.take_step():
                self._workers.append(worker)
            if time.monotonic() >= end:
                break

    def _read_postponed(self, end: float) -> None:
        while self._readers:
            self._readers.popleft().read_postponed()
            if time.monotonic() >= end:
                break
