"""A stuck loop is detected from a thread, and the log says where it is stuck."""

import signal
import sys
import time

from tests.support.daemon import ask, connect, serving

STUCK_FOR_A_WHILE = (
    "import sys, time; from echod import __main__\nfrom echod.protocol import echo\n"
    "class SlowEcho(echo.Echo):\n"
    "    def receive(self, chunk):\n"
    "        if chunk == 'be slöw\\n'.encode(): time.sleep(2.5)\n"
    "        return super().receive(chunk)\n"
    "echo.Echo = SlowEcho\n"
    "sys.exit(__main__.main(sys.argv[1:]))"
)


def test_a_loop_stuck_for_more_than_a_second_is_logged_with_its_stack() -> None:
    """`loop stuck` says for how long and where, `loop turns again` when it is over; clients wait."""
    with serving(command=(sys.executable, "-c", STUCK_FOR_A_WHILE)) as echod, connect(echod.port) as client:
        assert ask(client, "be slöw\n".encode()) == "BE SLÖW\n".encode()
        stuck = echod.wait_for("loop stuck")
        assert stuck["seconds"] >= 1
        assert "in _receive" in stuck["stack"]
        assert echod.wait_for("loop turns again")["seconds"] >= 2
        assert ask(client, b"be quick\n") == b"BE QUICK\n"
        assert len(echod.events_named("loop stuck")) == 1


def test_a_process_that_was_stopped_is_not_reported_as_stuck() -> None:
    """A process that was stopped and continued was not stuck."""
    with serving() as echod, connect(echod.port) as client:
        echod.send(signal.SIGSTOP)
        time.sleep(1.5)  # the pause under test
        echod.send(signal.SIGCONT)
        assert ask(client, b"hello\n") == b"HELLO\n"
        time.sleep(0.6)  # enough time for a wrong log line
        assert not echod.events_named("loop stuck")
