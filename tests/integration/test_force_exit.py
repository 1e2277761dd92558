"""The last resort of a stop: how long it may take in each phase, and what happens then."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echod.process.force_exit import END_S, INSISTED_S, LOG_S, STARTING_S, TICK_S, ForcedExit
from echod.process.signals import Action, SignalEvent
from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, read_to_end, serving, settings

STOP = SignalEvent(Action.STOP, "TERM", os.getpid())


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("echod.process.force_exit.time.monotonic", clock)
    return clock


def tick(forced_exit: ForcedExit, clock: Clock, count: int) -> None:
    """Let the signal thread sleep as long as requested, this many times."""
    for _ in range(count):
        left_s = forced_exit.seconds_left()
        assert left_s is not None
        clock.now += left_s


def test_a_stop_may_take_lame_duck_drain_and_the_end(clock: Clock) -> None:
    """The limit depends on the phase: starting, serving with the timeouts of that moment, or a second signal."""
    passed_on: list[SignalEvent] = []
    stop_s = 8.0
    forced_exit = ForcedExit(passed_on.append, unserved=0, aborted=3)
    forced_exit.deliver(SignalEvent(Action.RELOAD, "HUP", 1))
    assert forced_exit.seconds_left() is None
    assert forced_exit.remaining_s() == float("inf")
    forced_exit.deliver(STOP)
    assert forced_exit.remaining_s() == STARTING_S
    tick(forced_exit, clock, 4)
    forced_exit.serving(lambda: stop_s, flush_log=lambda: None)
    assert forced_exit.remaining_s() == pytest.approx(8 + END_S - LOG_S), "who came before the stop is owed a drain"
    assert forced_exit.stop_began_at == 1000.0 + 4 * TICK_S
    stop_s = 20.0
    assert forced_exit.remaining_s() == pytest.approx(20 + END_S - LOG_S)
    forced_exit.deliver(STOP)
    forced_exit.deliver(STOP)
    assert forced_exit.remaining_s() == pytest.approx(INSISTED_S)
    assert [order.action for order in passed_on] == [Action.RELOAD] + 3 * [Action.STOP]


def test_a_pause_of_the_whole_process_does_not_count(clock: Clock) -> None:
    """If its own thread oversleeps, the loop had no processor either; a small delay does not matter."""
    forced_exit = ForcedExit(lambda _: None, unserved=0, aborted=3)
    forced_exit.serving(lambda: 2.0, flush_log=lambda: None)
    forced_exit.deliver(STOP)
    tick(forced_exit, clock, 2)
    assert forced_exit.remaining_s() == pytest.approx(2 + END_S - LOG_S - 2 * TICK_S)
    forced_exit.seconds_left()
    clock.now += TICK_S + 60
    assert forced_exit.seconds_left() == TICK_S
    assert forced_exit.remaining_s() == pytest.approx(2 + END_S - LOG_S - 3 * TICK_S)
    clock.now += 1.5 * TICK_S
    forced_exit.seconds_left()
    assert forced_exit.remaining_s() == pytest.approx(2 + END_S - LOG_S - 4.5 * TICK_S)


OVERDUE = """
from echod.process import force_exit, signals
force_exit.STARTING_S = force_exit.END_S = -1
it = force_exit.ForcedExit(lambda order: None, unserved=0, aborted=3)
{serving}
it.deliver(signals.SignalEvent(signals.Action.STOP, "TERM", 1))
it.seconds_left()
"""


def test_an_overdue_stop_ends_the_process() -> None:
    """Exit status 0 before clients were served, 3 with a log line afterwards, or the outcome of the drain."""
    serving = "it.serving(lambda: 0, flush_log=lambda: print('last', flush=True))"
    done = [
        subprocess.run(
            [sys.executable, "-c", OVERDUE.format(serving=code)], capture_output=True, text=True, timeout=DEADLINE_S
        )
        for code in ("", serving, f"{serving}; it.ended(0)")
    ]
    assert [process.returncode for process in done] == [0, 3, 0], done
    assert done[1].stdout.endswith("last\n")


def test_a_pause_across_the_deadlines_aborts_nobody() -> None:
    """A pause across the deadlines of the drain and of the forced exit: a line that arrived meanwhile is answered."""
    with serving(*settings(timeouts_drain=1)) as echod, connect(echod.port) as client:
        assert ask(client, b"hello\nhalf") == b"HELLO\n"
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started")
        echod.send(signal.SIGSTOP)
        client.sendall(b" a line\n")
        time.sleep(1 + END_S + 4)  # the pause under test
        echod.send(signal.SIGCONT)
        assert read_to_end(client) == b"HALF A LINE\n"
        client.close()
        assert echod.exit_status() == 0
        assert not echod.events_named("stop overdue")


STUCK = """
import sys, time
from echod import __main__
from echod.lifecycle import drain
def stuck(*_):
    time.sleep(3600)
drain._report = stuck
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_loop_that_gets_stuck_in_a_drain_is_ended_in_time() -> None:
    """No stop takes longer than lame duck, drain and 1.5 s; the exit status says that a client may have been aborted.

    The best of some tries, for machines where nobody gets a processor in time.
    """
    assert any(_seconds_of_a_stuck_stop() < 0.5 + 1.5 + END_S + 0.25 for _ in range(5))


def _seconds_of_a_stuck_stop() -> float:
    flags = settings(timeouts_lame_duck=0.5, timeouts_drain=1.5)
    with serving(*flags, command=(sys.executable, "-c", STUCK)) as echod, connect(echod.port) as client:
        assert ask(client, b"hello\nhalf") == b"HELLO\n"
        began = time.monotonic()
        echod.send(signal.SIGTERM)
        assert echod.exit_status() == 3
        seconds = time.monotonic() - began
        assert echod.events_named("stop overdue")
        return seconds


def test_a_stop_in_which_everything_is_slow_ends_in_time_with_the_right_status(tmp_path: Path) -> None:
    """A client that never ends its stream, one of the admin endpoint that never asks, a log that nobody reads: exit 0.

    The best of some tries, for machines where nobody gets a processor in time.
    """
    tries = (_seconds_of_a_slow_stop(tmp_path / "admin") for _ in range(5))
    assert any(seconds < 1 + END_S for seconds in tries)


def _seconds_of_a_slow_stop(admin: Path) -> float:
    flags = settings(timeouts_drain=1, timeouts_drain_quiet=5, admin_listen=f"unix:{admin}")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        with Daemon("-l", "127.0.0.1:0", *flags, through=reader) as echod, socket.socket(socket.AF_UNIX) as silent:
            try:
                with connect(echod.port) as client:
                    assert ask(client, b"hello\n") == b"HELLO\n"
                    silent.connect(str(admin))
                    reader.send_signal(signal.SIGSTOP)
                    _fill(Path(f"/proc/{echod.pid}/fd/2"))
                    began = time.monotonic()
                    echod.send(signal.SIGTERM)
                    is_clean = echod.process.wait(DEADLINE_S) == 0  # on a busy machine the stop may be forced
                    return time.monotonic() - began if is_clean else math.inf
            finally:
                reader.kill()


def _fill(pipe: Path) -> None:
    descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x" * 4096)
    os.close(descriptor)
