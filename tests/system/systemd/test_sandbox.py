"""The sandbox of the unit files, as systemd rates it and in practice."""

import json
import re

import pytest

from tests.support.report import Report
from tests.system.systemd.machine import THERE, Machine

FILTER = "[Service]\nIPAddressAllow=localhost\nIPAddressDeny=any\n"


def exposure(machine: Machine, unit: str) -> float:
    said = machine("systemd-analyze", "security", "--no-pager", unit)
    match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert match, said
    return float(match[1])


@pytest.mark.parametrize("unit", ["echod.service", "echod@.service", "echod.socket"])
def test_systemd_analyze_verify_prints_nothing(machine: Machine, unit: str) -> None:
    """`systemd-analyze verify` prints nothing, not even about unknown keys, for which it returns 0."""
    done = machine.run("systemd-analyze", "verify", unit.replace("@", "@1"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_exposure_level_is_low(machine: Machine, report: Report) -> None:
    """The exposure level is 1.1 as shipped, and 0.9 with the address filter that the unit shows."""
    machine("systemctl", "start", "echod", "echod.socket", "--no-block")
    shipped = exposure(machine, "echod.service")
    machine.drop_in("echod.service", FILTER)
    filtered = exposure(machine, "echod.service")
    assert (shipped, filtered) <= (1.1, 0.9)
    assert exposure(machine, "echod@1.service") <= 0.9 + 0.2
    report("6 systemd-analyze", exposure_as_shipped=shipped, with_the_address_filter=filtered)


def test_the_sandbox_denies_files_privileges_and_packets(machine: Machine, report: Report) -> None:
    """Every attempt succeeds outside of the sandbox, and fails inside."""
    outside = json.loads(machine("python3", f"{THERE}/tests/system/systemd/probe.py"))["attempts"]
    assert set(outside.values()) == {"done"}, outside
    machine.drop_in(
        "echod.service",
        f"[Service]\nStandardOutput=journal\nExecStartPre=/usr/bin/env python3 {THERE}/tests/system/systemd/probe.py\n",
    )
    cursor = machine.cursor()
    machine("systemctl", "start", "echod")
    (line,) = (line for line in machine.journal("echod", cursor) if line.startswith('{"attempts"'))
    inside = json.loads(line)
    assert not [name for name, outcome in inside["attempts"].items() if outcome == "done"], inside
    status = inside["status"]
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    pid = machine.show("echod", "MainPID")["MainPID"]
    main = machine("grep", "-E", "^(Uid|Cap|NoNewPrivs|Seccomp:)", f"/proc/{pid}/status").split()
    assert main[main.index("Uid:") + 1] not in ("0", "65534"), main
    assert main[main.index("NoNewPrivs:") + 1] == "1"
    assert {int(main[index + 1], 16) for index, word in enumerate(main) if word.startswith("Cap")} == {0}
    report("6 from inside", attempts=len(outside), possible_outside=len(outside), possible_inside=0)
