"""`systemctl reload` returns with the new configuration in force, or fails with nothing changed."""

import json
import time

from tests.support.report import Report
from tests.system.systemd.machine import ADDRESS, Machine

ROUNDS = 20
TAKEN = "127.0.0.1:7777"
ADMIN = "unix:/run/echod/admin"


def limited(line_bytes: int, *, listen: str = "") -> str:
    """Return a configuration with this limit of a line, which shows whether it is in force."""
    return f"{listen}[limits]\nline_bytes = {line_bytes}\n"


def in_force(machine: Machine, line_bytes: int) -> bool:
    """Return whether a line one byte longer than this limit is an error."""
    reply = machine.ask("say_line", ADDRESS, line_bytes + 1)["reply"]
    return bool(reply == f"ERROR line longer than {line_bytes} bytes\n")


def test_20_valid_reloads_are_in_force_when_they_return(machine: Machine, report: Report) -> None:
    """After each reload the next line meets the new limit; the process and its connections stay."""
    machine("systemctl", "start", "echod")
    before = machine.show("echod", "MainPID")
    took = []
    with machine.load("busy", ADDRESS, 5) as clients:
        assert clients.next()["ended"] == 0
        for number in range(ROUNDS):
            machine.configure(limited(100 + number))
            began = time.monotonic()
            machine("systemctl", "reload", "echod")
            took.append(time.monotonic() - began)
            assert in_force(machine, 100 + number), number
        assert clients.ask()["ended"] == 0
    assert machine.show("echod", "MainPID") == before
    report(
        "2 reload, good",
        in_force_at_return=f"{ROUNDS} of {ROUNDS}",
        connections_lost=0,
        slowest_ms=round(1000 * max(took)),
    )


def test_20_invalid_reloads_fail_and_change_nothing(machine: Machine, report: Report) -> None:
    """An invalid file or a port in use fails the reload, with the error in the status and nothing changed."""
    machine.configure(limited(99))
    machine("systemctl", "start", "echod")
    before = machine.show("echod", "MainPID", "NRestarts")
    faults = {
        "[limits]\nline_bytes = 0\n": "limits.line_bytes: expected `int` >= 1 (got 0)".replace("`", ""),
        limited(5, listen=f"[[listen]]\naddress = '{TAKEN}'\n"): f"{TAKEN}: address already in use",
    }
    with machine.load("hold", TAKEN) as holder, machine.load("busy", ADDRESS, 5) as clients:
        assert holder.next() == "held"
        assert clients.next()["ended"] == 0
        for number in range(ROUNDS):
            text, fault = list(faults.items())[number % 2]
            machine.configure(text)
            assert machine.systemctl("reload", "echod").returncode != 0, fault
            status = machine.status("echod")
            assert "last reload refused: " in status, status
            assert fault in status, status
            assert machine.show("echod", "ActiveState") == {"ActiveState": "active"}
            assert in_force(machine, 99), number
        assert clients.ask()["ended"] == 0
    assert machine.show("echod", "MainPID", "NRestarts") == before
    reloads = json.loads(machine("echod", "stats", "--json", "--admin", ADMIN))["reloads"]
    assert (reloads["applied"], reloads["refused"]) == (0, ROUNDS), "the daemon knows of each"
    assert fault in reloads["last_error"]
    machine.configure(limited(98))
    machine("systemctl", "reload", "echod")
    assert in_force(machine, 98)
    report(
        "2 reload, bad file or taken port", refused_with_the_fault_in_status=f"{ROUNDS} of {ROUNDS}", connections_lost=0
    )


def test_the_status_names_keys_that_need_a_restart(machine: Machine) -> None:
    """A reload that leaves a key to a restart succeeds, and the status names the key."""
    listen = f"[[listen]]\naddress = '{ADDRESS}'\n"
    machine.configure(listen)
    machine("systemctl", "start", "echod")
    machine.configure(listen + "reuse_port = true\n")
    for _ in range(2):
        machine("systemctl", "reload", "echod")
        assert "not in force before a restart: listen[0].reuse_port" in machine.status("echod")
    machine("systemctl", "restart", "echod")
    machine("systemctl", "reload", "echod")
    assert "not in force" not in machine.show("echod", "StatusText")["StatusText"]
