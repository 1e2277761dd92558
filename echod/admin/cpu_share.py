"""A CPU budget for work that clients cause: its time is measured, and it is suspended while its share is used up."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVarTuple, Unpack

_Arguments = TypeVarTuple("_Arguments")

BURST_S = 0.001
"""How far the work may run ahead of its share, so that a single request is never suspended."""

OVERHEAD_S = 0.00001
"""Charged for each callback in addition to its own time: the cost in the kernel and the loop (measured with uvloop)."""


class CpuShare:
    """Runs callbacks and limits their CPU time to a share of elapsed time.

    Calls `suspend` when the callbacks are `BURST_S` ahead of their share, and `resume` once the share has caught up.
    The owner starts no new work in between; callbacks that run anyway, such as timers, are charged too. Create it
    inside a running loop.
    """

    def __init__(self, share: float, suspend: Callable[[], object], resume: Callable[[], object]) -> None:
        self._share = share
        self._suspend = suspend
        self._resume = resume
        self._loop = asyncio.get_running_loop()
        self._paid_at = 0.0
        """When the share will have covered everything charged so far (time.monotonic)."""
        self.is_suspended = False

    def run(self, work: Callable[[Unpack[_Arguments]], object], *arguments: *_Arguments) -> None:
        """Do the work and charge its CPU time; calls must not be nested."""
        began = time.thread_time()
        try:
            work(*arguments)
        finally:
            self._charge(time.thread_time() - began + OVERHEAD_S)

    def _charge(self, seconds: float) -> None:
        now = time.monotonic()
        self._paid_at = max(self._paid_at, now) + seconds / self._share
        if not self.is_suspended and self._paid_at - now > BURST_S / self._share:
            self.is_suspended = True
            self.run(self._suspend)
            self._loop.call_later(self._paid_at - now, self._resume_if_paid)

    def _resume_if_paid(self) -> None:
        left_s = self._paid_at - time.monotonic()
        if left_s > 0:
            self._loop.call_later(left_s, self._resume_if_paid)
            return
        self.is_suspended = False
        self.run(self._resume)
