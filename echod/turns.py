"""Lets connections whose input is costly to answer take turns, so that all others are served in between."""

import asyncio
import time
from collections import deque
from typing import Protocol

SLICE_S = 0.003
"""So much of each turn of the event loop goes to costly input, however many clients send it."""


class Worker(Protocol):
    """Somebody with work to do in small steps."""

    def take_turn(self) -> bool:
        """Do one step; return whether there is more to do."""


class Turns:
    """A queue of workers; the one at its head does a step and goes to its end."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Worker] = deque()
        self._is_scheduled = False

    def add(self, worker: Worker) -> None:
        """Let the worker take turns until it has nothing more to do; it must not be waiting already."""
        self._queue.append(worker)
        self._schedule()

    def _schedule(self) -> None:
        if self._queue and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        end = time.monotonic() + SLICE_S
        try:
            while self._queue:
                worker = self._queue.popleft()
                if worker.take_turn():
                    self._queue.append(worker)
                if time.monotonic() >= end:
                    break
        finally:
            self._schedule()
