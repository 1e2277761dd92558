"""A live upgrade under systemd, which keeps the main process and goes unnoticed."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.report import Report
from tests.system.systemd.machine import ADDRESS, Machine

ROUNDS = 10
WATCHDOG_S = 3
PACKAGE = "/usr/local/lib/echod/lib/python3*/site-packages/echod"


def upgrade(machine: Machine, event: str = "upgrade done") -> dict[str, Any]:
    """Request an upgrade as an operator does, and return the event with its result."""
    cursor = machine.cursor()
    machine("systemctl", "kill", "--signal=USR2", "--kill-whom=main", "echod")
    found: dict[str, Any] = machine.wait_for(lambda: machine.events("echod", event, cursor), f"no {event}")[0]
    return found


@pytest.fixture
def another(machine: Machine) -> Iterator[Machine]:
    """The machine, with a copy of echod that a test may change."""
    machine("sh", "-c", f"cp -a {PACKAGE} /opt/echod-saved")
    yield machine
    machine("sh", "-c", f"set -- {PACKAGE}; rm -rf $1; mv /opt/echod-saved $1")


@pytest.mark.parametrize("with_socket", [True, False], ids=["with the socket unit", "without"])
def test_10_upgrades_go_unnoticed_by_systemd(machine: Machine, report: Report, with_socket: bool) -> None:
    """Upgrades keep MainPID, connections and sockets, feed the watchdog, and leave reload and stop working."""
    machine.drop_in("echod.service", f"[Service]\nWatchdogSec={WATCHDOG_S}\n")
    machine.configure("[timeouts]\ndrain = 1\n")
    if with_socket:
        machine("systemctl", "start", "echod.socket")
    machine("systemctl", "start", "echod")
    before = machine.show("echod", "MainPID", "NRestarts", "ActiveEnterTimestamp")
    began = time.monotonic()
    with (
        machine.load("busy", ADDRESS, 20) as busy,
        machine.load("unfinished", ADDRESS) as begun,
        machine.load("stream", ADDRESS, 3) as passing,
    ):
        assert (busy.next()["ended"], begun.next(), passing.next()) == (0, "begun", "streaming")
        gaps = [upgrade(machine)["gap_ms"] for _ in range(ROUNDS)]
        while time.monotonic() < began + 2 * WATCHDOG_S:
            time.sleep(0.1)  # without a keep-alive the watchdog would have acted
        machine("systemctl", "reload", "echod")
        after = busy.ask()
        assert (after["ended"], after["complaints"]) == (0, [])
        begun.tell()
        machine("systemctl", "is-active", "echod")
        streamed = passing.finish()
        assert machine.show("echod", "MainPID", "NRestarts", "ActiveEnterTimestamp") == before
        assert machine.stats("echod")["upgrades"] == ROUNDS
        machine("systemctl", "stop", "echod")
        assert begun.next() == {"received": "SECOND\n"}
        assert busy.ask()["complaints"] == []
    assert (streamed["refused"], streamed["reset"], streamed["complaints"]) == (0, 0, [])
    assert machine.show("echod", "Result") == {"Result": "success"}
    report(
        f"{ROUNDS} upgrades {'with' if with_socket else 'without'} the socket unit",
        same_pid="yes",
        served_meanwhile=streamed["served"],
        refused=0,
        reset=0,
        gap_ms=statistics.median(gaps),
        longest_ms=max(gaps),
    )


def test_from_one_version_to_another(another: Machine) -> None:
    """An upgrade runs the installed version; a broken version is refused, with the reason in the journal."""
    another("systemctl", "start", "echod")
    first = another.stats("echod")["version"]
    with another.load("unfinished", ADDRESS) as begun:
        assert begun.next() == "begun"
        another("sh", "-c", f"echo '__version__ = \"2.0.0\"' >>$(echo {PACKAGE})/__init__.py")
        done = upgrade(another)
        assert (done["previous_version"], done["version"]) == (first, "2.0.0")
        another("sh", "-c", f"echo 'def' >>$(echo {PACKAGE})/service.py")
        refused = upgrade(another, "upgrade refused")
        assert "SyntaxError" in refused["errors"][0]
        begun.tell()
        assert another.stats("echod")["version"] == "2.0.0"
        assert another.show("echod", "NRestarts") == {"NRestarts": "0"}
        another("systemctl", "stop", "echod")
        assert begun.next() == {"received": "SECOND\n"}
