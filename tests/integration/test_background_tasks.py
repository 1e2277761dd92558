"""A background task that raises is logged and started again: the service keeps what it promises."""

import signal
import sys

from tests.support.daemon import DEADLINE_S, ask, connect, read_to_end, serving, settings

FAILING_SWEEP = """
import sys
from echod import __main__
from echod.server import timeouts
enforce, failures = timeouts.enforce_timeouts, [RuntimeError("a bug in the sweep")]
def fail_once(*arguments):
    if failures:
        raise failures.pop()
    enforce(*arguments)
timeouts.enforce_timeouts = fail_once
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_timeouts_are_still_enforced_after_the_sweep_has_raised() -> None:
    command = (sys.executable, "-c", FAILING_SWEEP)
    with serving(*settings(timeouts_idle=0.5), command=command) as echod, connect(echod.port) as client:
        assert ask(client, b"hello\n") == b"HELLO\n"
        failed = echod.wait_for("background task failed", task="sweep")
        assert "RuntimeError: a bug in the sweep" in failed["exception"]
        assert read_to_end(client) == b"ERROR idle for 0.5 s\n"
        echod.send(signal.SIGTERM)  # not `stop`, which asserts that the log holds no traceback
        assert echod.process.wait(DEADLINE_S) == 0
