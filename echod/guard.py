"""The last resort of a stop: ends the process when the event loop doesn't.

Runs in the signal thread, so it works while the loop is stuck, a name server is silent or a log is full.
"""

import os
from collections.abc import Callable

import structlog

from echod.signals import Command, Order

STARTING_S = 5.0
"""How long a stop may take that comes before anyone is served."""

MARGIN_S = 4.0
"""What a drain may take beyond its time: the backlog 0.5 s, the last half-close 1 s, the log 1 s, and some air."""

INSISTED_S = 2.0
"""How long a stop may take from the second signal on."""


class Guard:
    """Tells how long a stop may take, and ends the process when it takes longer."""

    def __init__(self, put: Callable[[Order], None], *, unserved: int, cut_off: int) -> None:
        """`unserved` and `cut_off` are the exit statuses before and after clients are served."""
        self._put = put
        self._unserved = unserved
        self._cut_off = cut_off
        self._stops = 0
        self._drain_s: Callable[[], float] | None = None
        self._last_words: Callable[[], object] = lambda: None

    def serving(self, drain_s: Callable[[], float], last_words: Callable[[], object]) -> None:
        """From now on clients are served: a stop may take as long as a drain, and `last_words` are said at the end."""
        self._drain_s = drain_s
        self._last_words = last_words

    def deliver(self, order: Order) -> float | None:
        """Pass the order on; return in how many seconds the process must be gone, None for no limit."""
        self._put(order)
        if order.command is not Command.STOP:
            return None
        self._stops += 1
        if self._stops > 1:
            return INSISTED_S
        return STARTING_S if self._drain_s is None else self._drain_s() + MARGIN_S

    def overdue(self) -> None:
        """End the process without asking anyone."""
        if self._drain_s is None:
            os._exit(self._unserved)
        structlog.get_logger().error("stop overdue", advice="the event loop is stuck; ending without it")
        self._last_words()
        os._exit(self._cut_off)
