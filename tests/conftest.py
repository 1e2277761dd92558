"""Options of every test run, fixtures shared by several suites, and the report that is printed at the end."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.installed import Installed
from tests.support.report import ROWS, Report, row

EXAMPLES = 30
"""How many examples hypothesis tries for a property that names no number; sixteen times as many with `--full`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every case and repetition, not a sample of them")
    parser.addoption("--seed", default="1", help="seed of the random choices of the clients; any text")


def pytest_configure(config: pytest.Config) -> None:
    """Set the number of examples; no deadline for an example, because its time depends on the machine."""
    hypothesis.settings.register_profile(
        "echod",
        max_examples=EXAMPLES * (16 if config.getoption("--full") else 1),
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("echod")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--full`, leave out the cases that are marked with `full`."""
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to repeat as often as `make ci` does."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A temporary directory that every user may enter, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory(prefix="echod-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    """An installed echod, beside which other versions can be installed."""
    return Installed(tmp_path)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Add a line to the report at the end of the run."""
    rows = request.config.stash.setdefault(ROWS, [])

    def add(title: str, **figures: object) -> None:
        shown = {name.replace("_", " "): value for name, value in figures.items()}
        rows.append(f"{title}: {row(shown, ' ')}")

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(ROWS, []):
        terminalreporter.write_line(line)
