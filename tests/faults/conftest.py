"""Fixtures of the fault suite: the seed and the report."""

from collections.abc import Callable

import pytest

from tests.faults.measurements import Figures
from tests.support.report import ROWS, row


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Figures], None]:
    """Add a row to the report."""
    rows = request.config.stash.setdefault(ROWS, [])
    return lambda figures: rows.append(row(figures, ": "))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    """The seed of all random choices, from `--seed`."""
    chosen: str = request.config.getoption("--seed")
    request.node.add_report_section("call", "seed", f"the same choices again: --seed {chosen}")
    return chosen
