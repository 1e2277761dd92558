"""What the tests of the fault suite are given: what they choose by, and where they put their figures."""

from collections.abc import Callable

import pytest

from tests.faults.scene import Figures
from tests.support.report import ROWS, row


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Figures], None]:
    """Puts a row into the report."""
    rows = request.config.stash.setdefault(ROWS, [])
    return lambda figures: rows.append(row(figures, ": "))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    """What decides all random choices: the same ones again with `--seed`."""
    chosen: str = request.config.getoption("--seed")
    request.node.add_report_section("call", "seed", f"the same choices again: --seed {chosen}")
    return chosen
