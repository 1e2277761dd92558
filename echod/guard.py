"""The last resort of a stop: ends the process when the event loop doesn't.

Runs in the signal thread, so it works while the loop is stuck, a name server is silent or a log is full.
"""

import os
import time
from collections.abc import Callable
from typing import NoReturn

import structlog

from echod.signals import Command, Order

STARTING_S = 5.0
"""How long a stop may take that comes before anyone is served."""

MARGIN_S = 4.0
"""What a drain may take beyond its time: the backlog 0.5 s, the last half-close 1 s, the log 1 s, and some air."""

INSISTED_S = 2.0
"""How long a stop may take from the second signal on."""


class Guard:
    """Knows when a stop is overdue, and ends the process then. Everything but `serving` runs in the signal thread."""

    def __init__(self, put: Callable[[Order], None], *, unserved: int, cut_off: int) -> None:
        """`put` takes the orders; `unserved` and `cut_off` are exit statuses: before and since clients are served."""
        self._put = put
        self._unserved = unserved
        self._cut_off = cut_off
        self._stops: list[float] = []
        self._serving_since: float | None = None
        self._stop_s: Callable[[], float] = lambda: 0.0
        self._last_words: Callable[[], object] = lambda: None

    def serving(self, stop_s: Callable[[], float], last_words: Callable[[], object]) -> None:
        """From now on clients are served: a stop may take so long, and `last_words` are said at the end."""
        self._stop_s = stop_s
        self._last_words = last_words
        self._serving_since = time.monotonic()

    def deliver(self, order: Order) -> None:
        """Pass the order on, and remember when a stop was asked for."""
        if order.command is Command.STOP:
            self._stops.append(time.monotonic())
        self._put(order)

    def seconds_left(self) -> float | None:
        """How long the stop under way may still take, None if there is none; ends the process when it is over."""
        if not self._stops:
            return None
        left_s = self._end() - time.monotonic()
        if left_s <= 0:
            self._end_process()
        return left_s

    def _end(self) -> float:
        first, *others = self._stops
        if self._serving_since is None:
            return first + STARTING_S
        end = max(first, self._serving_since) + self._stop_s() + MARGIN_S
        return min(end, max(others[0], self._serving_since) + INSISTED_S) if others else end

    def _end_process(self) -> NoReturn:
        if self._serving_since is None:
            os._exit(self._unserved)
        structlog.get_logger().error("stop overdue", advice="the event loop is stuck; ending without it")
        self._last_words()
        os._exit(self._cut_off)
