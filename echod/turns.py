"""Lets connections take turns: those whose input is costly to answer, and all of them where very many have input."""

import asyncio
import time
from collections import deque
from typing import Protocol

from echod.fastpath import serve_directly

SLICE_S = 0.003
"""So much of each turn of the event loop goes to costly input, however many clients send it."""


READ_S = 0.015
"""So much of each turn goes to clients that wait to be read from."""


class Worker(Protocol):
    """Somebody with work to do in small steps."""

    def take_turn(self) -> bool:
        """Do one step; return whether there is more to do."""


class Reader(Protocol):
    """Somebody with input that is still to be read."""

    def read_postponed(self) -> None:
        """Read once."""


class Turns:
    """A queue of workers, of which the one at the head does a step and goes to the end, and a queue of readers."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Worker] = deque()
        self._reads: deque[Reader] = deque()
        self._is_scheduled = False
        serve_directly()

    def add(self, worker: Worker) -> None:
        """Let the worker take turns until it has nothing more to do; it must not be waiting already."""
        self._queue.append(worker)
        self.check()

    def postpone(self, reader: Reader) -> None:
        """Let the reader read in its turn; it must not be waiting already. Nobody reads directly until all have."""
        self._reads.append(reader)
        self.check()

    def check(self) -> None:
        """Go on in the next turn of the event loop, be it only to see that there is one."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        try:
            self._work(time.monotonic() + SLICE_S)
            self._read(time.monotonic() + READ_S)
        finally:
            if not self._reads:
                serve_directly()
            if self._queue or self._reads:
                self.check()

    def _work(self, end: float) -> None:
        while self._queue:
            worker = self._queue.popleft()
            if worker.take_turn():
                self._queue.append(worker)
            if time.monotonic() >= end:
                break

    def _read(self, end: float) -> None:
        while self._reads:
            self._reads.popleft().read_postponed()
            if time.monotonic() >= end:
                break
