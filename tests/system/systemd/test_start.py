"""`systemctl start` returns when clients are served, and a failure has its reason in the status."""

import statistics

import pytest

from tests.support.report import Report
from tests.system.systemd.machine import ADDRESS, Machine

ROUNDS = 5


@pytest.mark.parametrize("unit", ["echod.service", "echod.socket"])
def test_start_returns_when_clients_are_served(machine: Machine, report: Report, unit: str) -> None:
    """A client that connects as soon as `systemctl start` has returned is answered."""
    answers = []
    for _ in range(ROUNDS):
        answers.append(machine.ask("start_and_ask", unit, ADDRESS))
        machine("systemctl", "stop", "echod.socket", "echod.service")
    assert {answer["reply"] for answer in answers} == {"HELLO\n"}
    start_ms, ask_ms = (statistics.median(answer[name] for answer in answers) for name in ("start_ms", "ask_ms"))
    report(
        f"1 start {unit}",
        served_at_once=f"{ROUNDS} of {ROUNDS}",
        start_ms=round(start_ms),
        first_reply_ms=round(ask_ms),
    )


def test_start_fails_with_every_configuration_error(machine: Machine, report: Report) -> None:
    """An invalid configuration is not retried; the status has the key and the value of each error."""
    machine.configure("[limits]\nconnections = 0\nline_byte = 5\n")
    assert machine.systemctl("start", "echod").returncode != 0
    status = machine.status("echod")
    assert "limits.connections: expected" in status
    assert "limits.line_byte: unknown key, did you mean limits.line_bytes? (got 5)" in status
    about = machine.show("echod", "ActiveState", "ExecMainStatus", "NRestarts")
    assert about == {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0"}
    report("1 start, bad configuration", exit_status=78, faults_in_status="2 of 2", tried_again="no")


def test_start_names_a_port_in_use_and_is_retried(machine: Machine, report: Report) -> None:
    """The status names the port; once it is free, the service starts by itself."""
    with machine.load("hold", ADDRESS) as holder:
        assert holder.next() == "held"
        assert machine.systemctl("start", "echod").returncode != 0
        assert f"{ADDRESS}: address already in use" in machine.status("echod")
    machine.wait_for(
        lambda: machine.show("echod", "ActiveState")["ActiveState"] == "active",
        "not tried again after the port got free",
    )
    report("1 start, taken port", port_in_status="yes", up_once_it_is_free="yes")
