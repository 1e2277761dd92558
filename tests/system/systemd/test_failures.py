"""Recovery of a service that is stuck or killed."""

import time

import pytest

from tests.support.report import Report
from tests.system.systemd.machine import ADDRESS, THERE, Machine

WATCHDOG_S = 3


def test_a_stuck_loop_is_killed_by_the_watchdog_and_replaced(machine: Machine, report: Report) -> None:
    """The journal shows the stack of the stuck loop, and the next process serves."""
    machine.drop_in(
        "echod.service",
        f"[Service]\nWatchdogSec={WATCHDOG_S}\nEnvironment=PYTHONPATH={THERE}/tests/system/systemd/stuck\n",
    )
    machine("systemctl", "start", "echod")
    cursor = machine.cursor()
    pid = machine.show("echod", "MainPID")
    began = time.monotonic()
    machine.ask("freeze", ADDRESS)
    seconds = time.monotonic() - began
    journal = "\n".join(machine.journal("echod", cursor))
    assert "Watchdog timeout" in journal
    assert "in receive_or_freeze" in journal.partition("Fatal Python error: Aborted")[2]
    assert machine.show("echod", "NRestarts") == {"NRestarts": "1"}
    assert machine.show("echod", "MainPID") != pid
    report("5 watchdog, stuck loop", watchdog_s=WATCHDOG_S, serving_again_after_s=round(seconds, 1))


def test_a_stopped_process_is_killed_by_the_watchdog_and_replaced(machine: Machine, report: Report) -> None:
    machine.drop_in("echod.service", f"[Service]\nWatchdogSec={WATCHDOG_S}\n")
    machine("systemctl", "start", "echod")
    began = time.monotonic()
    machine("systemctl", "kill", "--signal=STOP", "--kill-whom=main", "echod")
    _wait_until_replaced(machine)
    machine.ask("until_served", ADDRESS)
    seconds = time.monotonic() - began
    report("5 watchdog, stopped process", watchdog_s=WATCHDOG_S, serving_again_after_s=round(seconds, 1))


@pytest.mark.parametrize("with_socket", [True, False], ids=["with the socket unit", "without"])
def test_a_killed_process_is_replaced(machine: Machine, report: Report, with_socket: bool) -> None:
    if with_socket:
        machine("systemctl", "start", "echod.socket")
    machine("systemctl", "start", "echod")
    began = time.monotonic()
    machine("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "echod")
    _wait_until_replaced(machine)
    machine.ask("until_served", ADDRESS)
    seconds = time.monotonic() - began
    report(f"5 kill -9 {'with' if with_socket else 'without'} the socket unit", serving_again_after_s=round(seconds, 1))


def _wait_until_replaced(machine: Machine) -> None:
    """Wait for the next process; the killed one may answer a last client.

    Behind the watchdog's SIGABRT systemd sends SIGCONT: the main thread of a stopped process goes on for the
    milliseconds in which another writes the stacks, and serves who waits in the backlog.
    """
    after = {"NRestarts": "1", "ActiveState": "active"}
    machine.wait_for(lambda: machine.show("echod", *after) == after, "the process was not replaced")
