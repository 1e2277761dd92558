"""A background task that raises is logged and started again; none keeps a service that has crashed from ending."""

import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, read_to_end, serving, settings

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


CRASHING = """
import sys
from echod import __main__
from echod.lifecycle import run
from echod.net import sockets
def crash(*_):
    raise RuntimeError("a bug in the dump")
run.dump_stats = crash
sockets.has_handshakes_under_way = lambda _: True
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_reload_does_not_keep_a_service_that_has_crashed_from_ending(tmp_path: Path) -> None:
    """The crash arrives while the reload waits for a removed listener, which takes its longest time."""
    file = tmp_path / "echod.toml"
    addresses = ['[[listen]]\naddress = "127.0.0.1:0"\n', '[[listen]]\naddress = "127.0.0.2:0"\n']
    file.write_text("".join(addresses))
    with Daemon("-c", str(file), command=(sys.executable, "-c", CRASHING)) as echod:
        removed = int(str(echod.wait_for("ready")["listen"][1]).rpartition(":")[2])
        file.write_text(addresses[0])
        echod.send(signal.SIGHUP)
        with pytest.raises(ConnectionRefusedError):
            while True:
                socket.create_connection(("127.0.0.2", removed), DEADLINE_S).close()
        echod.send(signal.SIGUSR1)
        assert echod.process.wait(DEADLINE_S) == 1
        echod._reader.join(DEADLINE_S)
        assert "a bug in the dump" in echod.events_named("crashed")[0]["exception"]
