"""The report of the fault suite: figures of each fault, printed at the end of the run."""

from collections.abc import Callable

import pytest

from tests.faults.scene import Figures

ROWS = pytest.StashKey[list[Figures]]()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Figures], None]:
    """Puts a row into the report."""
    return request.config.stash.setdefault(ROWS, []).append


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    """What decides all random choices: the same ones again with `--seed`."""
    chosen: str = request.config.getoption("--seed")
    request.node.add_report_section("call", "seed", f"the same choices again: --seed {chosen}")
    return chosen


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for row in config.stash.get(ROWS, []):
        terminalreporter.write_line(" · ".join(f"{name}: {value}" for name, value in row.items()))
