"""The last resort of a stop: how long it may take in each phase, and what happens then."""

import os
import subprocess
import sys

from echod.guard import INSISTED_S, MARGIN_S, STARTING_S, Guard
from echod.signals import Command, Order
from tests.daemon import DEADLINE_S

STOP = Order(Command.STOP, "TERM", os.getpid())


def _seconds_left(guard: Guard) -> int:
    left = guard.seconds_left()
    assert left is not None
    return round(left)


def test_a_stop_may_take_a_drain_and_a_margin() -> None:
    """Starting: seconds; serving: the drain and a margin, as configured at that moment; insisted: moments."""
    passed_on: list[Order] = []
    drain_s = 8.0
    guard = Guard(passed_on.append, unserved=0, cut_off=3)
    guard.deliver(Order(Command.RELOAD, "HUP", 1))
    assert guard.seconds_left() is None
    guard.deliver(STOP)
    assert _seconds_left(guard) == STARTING_S
    guard.serving(lambda: drain_s, last_words=lambda: None)
    assert _seconds_left(guard) == 8 + MARGIN_S, "who came before the stop is owed a drain"
    drain_s = 20.0
    assert _seconds_left(guard) == 20 + MARGIN_S
    guard.deliver(STOP)
    assert _seconds_left(guard) == INSISTED_S
    assert [order.command for order in passed_on] == [Command.RELOAD, Command.STOP, Command.STOP]


OVERDUE = """
import time
from echod import guard, signals
guard.STARTING_S = guard.MARGIN_S = -1
it = guard.Guard(lambda order: None, unserved=0, cut_off=3)
{serving}
it.deliver(signals.Order(signals.Command.STOP, "TERM", 1))
it.seconds_left()
"""


def test_overdue_ends_the_process() -> None:
    """Before anyone was served it ends with 0, afterwards with 3 and its last words."""
    serving = "it.serving(lambda: 0, last_words=lambda: print('last', flush=True))"
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
        for code in (OVERDUE.format(serving=""), OVERDUE.format(serving=serving))
    ]
    assert [process.returncode for process in done] == [0, 3], done
    assert done[1].stdout.endswith("last\n")
