"""The last resort of a stop: ends the process if the event loop does not.

Runs in the signal thread, so it works even if the loop is stuck, a name server does not respond or the log is full.
"""

import math
import os
import time
from collections.abc import Callable
from typing import NoReturn

import structlog

from echod.process.signals import Action, SignalEvent

STARTING_S = 5.0
"""How long a stop may take if it begins before clients are served."""

END_S = 1.5
"""How long a stop may take beyond the lame-duck time and the drain; the final half-close takes 1 s of it."""

LOG_S = 0.1
"""The part of END_S that is reserved for logging why the process is ended."""

INSISTED_S = 2.0
"""How long a stop may take from the second signal on."""

TICK_S = 0.25
"""How often the time is checked during a stop."""


class ForcedExit:
    """Ends the process when a stop is overdue.

    The signal thread calls `deliver` and `seconds_left`; the main thread calls the rest. The time during which the
    whole process is stopped, for example by SIGSTOP or in a frozen container, does not count: whenever its own thread
    slept much longer than requested, the excess is subtracted from its clock.
    """

    def __init__(self, put: Callable[[SignalEvent], None], *, unserved: int, aborted: int) -> None:
        """`put` receives events; `unserved` and `aborted` are the exit statuses before and after serving begins."""
        self._put = put
        self._status = unserved
        self._aborted = aborted
        self._stops: list[float] = []  # the first two, by `_now`
        self._paused_s = 0.0
        self._checked_at = 0.0
        self._serving_since: float | None = None
        self._stop_s: Callable[[], float] = lambda: 0.0
        self._flush_log: Callable[[], object] = lambda: None

    def serving(self, stop_s: Callable[[], float], flush_log: Callable[[], object]) -> None:
        """Note that clients are served: a stop may take `stop_s()` plus END_S; call `flush_log` if it is overdue."""
        self._stop_s = stop_s
        self._flush_log = flush_log
        self._status = self._aborted
        self._serving_since = self._now()

    def ended(self, status: int) -> None:
        """Set the exit status for an overdue stop, once the outcome for the clients is known."""
        self._status = status

    @property
    def stop_began_at(self) -> float:
        """When the current stop began (time.monotonic); the present time if there is none."""
        return self._began() + self._paused_s if self._stops else time.monotonic()

    def deliver(self, event: SignalEvent) -> None:
        """Pass the event on, and record when a stop was requested."""
        if event.action is Action.STOP and len(self._stops) < 2:
            if not self._stops:
                self._checked_at = time.monotonic()
            self._stops.append(self._now())
        self._put(event)

    def seconds_left(self) -> float | None:
        """Return the seconds until the next call, or None without a stop; end the process if the stop is overdue."""
        if not self._stops:
            return None
        self._discount_pause()
        left_s = self._end() - self._now()
        if left_s <= 0:
            self._end_process()
        return min(left_s, TICK_S)

    def remaining_s(self) -> float:
        """How many seconds the current stop may still take; infinite if there is none."""
        return self._end() - self._now() if self._stops else math.inf

    def _now(self) -> float:
        return time.monotonic() - self._paused_s

    def _discount_pause(self) -> None:
        now = time.monotonic()
        overslept_s = now - self._checked_at - TICK_S
        self._checked_at = now
        if overslept_s > TICK_S:
            self._paused_s += overslept_s

    def _began(self) -> float:
        return max(self._stops[0], self._serving_since or 0.0)

    def _end(self) -> float:
        if self._serving_since is None:
            return self._stops[0] + STARTING_S
        end = self._began() + self._stop_s() + END_S - LOG_S
        if len(self._stops) < 2:
            return end
        return min(end, max(self._stops[1], self._serving_since) + INSISTED_S)

    def _end_process(self) -> NoReturn:
        if self._serving_since is not None:
            structlog.get_logger().error("stop overdue", advice="the event loop is stuck; ending without it")
            self._flush_log()
        os._exit(self._status)
