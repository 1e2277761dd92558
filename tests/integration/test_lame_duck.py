"""The lame-duck time: `/readyz` says draining while echod still accepts, so that balancers can react."""

import signal
import time
from pathlib import Path

from tests.integration.test_admin_endpoint import get
from tests.support.daemon import Daemon, ask, connect, read_to_end, send_until_stuck, serving, settings

LAME_DUCK_S = 3


def readiness(admin: Path) -> int:
    """Return the status of `/readyz`."""
    return get(f"unix:{admin}", "/readyz").status


def leave(echod: Daemon) -> float:
    """Request a stop; return when."""
    told_at = time.monotonic()
    echod.send(signal.SIGTERM)
    echod.wait_for("lame duck started")
    return told_at


def test_a_lame_duck_accepts_clients_and_reports_draining(tmp_path: Path) -> None:
    """The port stays open, `/readyz` and `state` say draining; `drain` counts from the end of the lame-duck time."""
    admin = tmp_path / "admin"
    flags = settings(timeouts_lame_duck=LAME_DUCK_S, timeouts_drain_quiet=0.2, admin_listen=f"unix:{admin}")
    with serving(*flags) as echod, connect(echod.port) as early:
        assert ask(early, b"early\n") == b"EARLY\n"
        assert readiness(admin) == 200
        began = leave(echod)
        assert readiness(admin) == 503
        assert echod.stats()["state"] == "draining"
        time.sleep(0.6)  # longer than `drain_quiet`: nobody is finished yet
        with connect(echod.port) as late:
            assert (ask(late, b"late\n"), ask(early, b"still\n")) == (b"LATE\n", b"STILL\n")
            assert not echod.events_named("drain started")
            drain = echod.wait_for("drain started")
            assert time.monotonic() - began >= LAME_DUCK_S
            assert (drain["seconds_left"], drain["connections"]) == (8, 2)
            assert (read_to_end(early), read_to_end(late)) == (b"", b"")
        assert echod.exit_status() == 0
        assert echod.wait_for("drain finished")["clean"] == 2


def test_a_second_signal_ends_the_lame_duck_time() -> None:
    """A second signal aborts at once, as in a drain; exit status 3 if anyone was owed a reply."""
    with serving(*settings(timeouts_lame_duck=60)) as echod, connect(echod.port) as idle, connect(echod.port) as stuck:
        assert ask(idle, b"hello\n") == b"HELLO\n"
        send_until_stuck(stuck)
        began = leave(echod)
        echod.send(signal.SIGTERM)
        assert echod.exit_status() == 3
        assert time.monotonic() - began < 6, "a drain would take 8"
        assert echod.wait_for("drain finished")["cut"] == 1


def test_signals_are_handled_as_in_a_drain() -> None:
    """HUP is logged and ignored, USR1 dumps, USR2 is refused."""
    with serving(*settings(timeouts_lame_duck=60)) as echod:
        leave(echod)
        for number, event in ((signal.SIGHUP, "reload ignored"), (signal.SIGUSR2, "upgrade refused")):
            echod.send(number)
            echod.wait_for(event)
        assert echod.stats()["state"] == "draining"
        echod.send(signal.SIGINT)
        assert echod.exit_status() == 0
