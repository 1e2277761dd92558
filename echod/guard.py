"""The last resort of a stop: ends the process when the event loop doesn't.

Runs in the signal thread, so it works while the loop is stuck, a name server is silent or a log is full.
"""

import math
import os
import time
from collections.abc import Callable
from typing import NoReturn

import structlog

from echod.signals import Command, Order

STARTING_S = 5.0
"""How long a stop may take that comes before anyone is served."""

END_S = 1.5
"""How long a stop may take beyond its lame duck and its drain: the last half-close takes 1 s of it."""

LAST_WORDS_S = 0.1
"""The part of END_S that the guard keeps for itself, to say why it ends the process."""

INSISTED_S = 2.0
"""How long a stop may take from the second signal on."""

TICK_S = 0.25
"""How often the guard looks at the time while a stop is under way."""


class Guard:
    """Knows when a stop is overdue, and ends the process then.

    `deliver` and `seconds_left` are called in the signal thread, the rest in the main thread. A pause of the whole
    process, such as SIGSTOP or a frozen container, is not the loop's fault and doesn't count: the guard's clock stands
    still whenever its own thread has slept much longer than it asked for.
    """

    def __init__(self, put: Callable[[Order], None], *, unserved: int, cut_off: int) -> None:
        """`put` takes the orders; `unserved` and `cut_off` are exit statuses: before and since clients are served."""
        self._put = put
        self._status = unserved
        self._cut_off = cut_off
        self._stops: list[float] = []  # the first two, by the guard's clock
        self._paused_s = 0.0
        self._looked_at = 0.0
        self._serving_since: float | None = None
        self._stop_s: Callable[[], float] = lambda: 0.0
        self._last_words: Callable[[], object] = lambda: None

    def serving(self, stop_s: Callable[[], float], last_words: Callable[[], object]) -> None:
        """From now on clients are served: a stop may take `stop_s` and END_S; `last_words` are said at the end."""
        self._stop_s = stop_s
        self._last_words = last_words
        self._status = self._cut_off
        self._serving_since = self._now()

    def ended(self, status: int) -> None:
        """How the stop has ended for the clients is known: from now on an overdue end has that exit status."""
        self._status = status

    @property
    def stop_began_at(self) -> float:
        """The time (time.monotonic) from which on the stop under way counts; now if there is none."""
        return self._began() + self._paused_s if self._stops else time.monotonic()

    def deliver(self, order: Order) -> None:
        """Pass the order on, and remember when a stop was asked for."""
        if order.command is Command.STOP and len(self._stops) < 2:
            if not self._stops:
                self._looked_at = time.monotonic()
            self._stops.append(self._now())
        self._put(order)

    def seconds_left(self) -> float | None:
        """After how many seconds to ask again, None if no stop is under way; ends the process when one is overdue."""
        if not self._stops:
            return None
        self._discount_pause()
        left_s = self._end() - self._now()
        if left_s <= 0:
            self._end_process()
        return min(left_s, TICK_S)

    def remaining_s(self) -> float:
        """How long the stop under way may still take; infinite if there is none."""
        return self._end() - self._now() if self._stops else math.inf

    def _now(self) -> float:
        return time.monotonic() - self._paused_s

    def _discount_pause(self) -> None:
        now = time.monotonic()
        overslept_s = now - self._looked_at - TICK_S
        self._looked_at = now
        if overslept_s > TICK_S:
            self._paused_s += overslept_s

    def _began(self) -> float:
        return max(self._stops[0], self._serving_since or 0.0)

    def _end(self) -> float:
        if self._serving_since is None:
            return self._stops[0] + STARTING_S
        end = self._began() + self._stop_s() + END_S - LAST_WORDS_S
        if len(self._stops) < 2:
            return end
        return min(end, max(self._stops[1], self._serving_since) + INSISTED_S)

    def _end_process(self) -> NoReturn:
        if self._serving_since is not None:
            structlog.get_logger().error("stop overdue", advice="the event loop is stuck; ending without it")
            self._last_words()
        os._exit(self._status)
