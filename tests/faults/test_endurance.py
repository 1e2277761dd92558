"""A short endurance run, see endurance.py."""

from collections.abc import Callable

import pytest

from tests.faults.endurance import run
from tests.faults.measurements import Figures

SECONDS, RELOADS, UPGRADES = 15.0, 40, 5


@pytest.mark.timeout(180)
def test_connections_reloads_and_upgrades_at_once_leak_nothing(report: Callable[[Figures], None]) -> None:
    """Every connection and line is counted, every reply is right; descriptors, threads and memory are as before."""
    outcome = run(SECONDS, RELOADS, UPGRADES)
    report({"fault": "all that comes and goes", **outcome.figures})
    assert not outcome.findings, outcome.findings
