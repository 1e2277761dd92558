"""The last resort of a stop: how long it may take in each phase, and what happens then."""

import os
import subprocess
import sys

from echod.guard import INSISTED_S, MARGIN_S, STARTING_S, Guard
from echod.signals import Command, Order
from tests.daemon import DEADLINE_S

STOP = Order(Command.STOP, "TERM", os.getpid())


def test_a_stop_may_take_a_drain_and_a_margin() -> None:
    """Starting: seconds; serving: the drain and a margin, as configured at that moment; insisted: moments."""
    passed_on: list[Order] = []
    drain_s = 8.0
    guard = Guard(passed_on.append, unserved=0, cut_off=3)
    assert guard.deliver(Order(Command.RELOAD, "HUP", 1)) is None
    assert guard.deliver(STOP) == STARTING_S
    guard = Guard(passed_on.append, unserved=0, cut_off=3)
    guard.serving(lambda: drain_s, last_words=lambda: None)
    drain_s = 20.0
    assert guard.deliver(STOP) == 20 + MARGIN_S
    assert guard.deliver(STOP) == INSISTED_S
    assert [order.command for order in passed_on] == [Command.RELOAD, Command.STOP, Command.STOP, Command.STOP]


def test_overdue_ends_the_process() -> None:
    """Before anyone was served it ends with 0, afterwards with 3 and its last words."""
    starting = "from echod.guard import Guard; Guard(print, unserved=0, cut_off=3).overdue()"
    serving = (
        "from echod.guard import Guard; g = Guard(print, unserved=0, cut_off=3); "
        "g.serving(lambda: 1, last_words=lambda: print('last', flush=True)); g.overdue()"
    )
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
        for code in (starting, serving)
    ]
    assert [process.returncode for process in done] == [0, 3]
    assert done[1].stdout.endswith("last\n")
