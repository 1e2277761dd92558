"""Options of the test run, the report at its end, and what tests of several suites are given."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.installed import Installed
from tests.support.report import ROWS, Report, row

# How long an example takes, or to think of one, is the machine's business: a limit of 200 ms each is no claim of ours.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="what is a sample otherwise, in full")
    parser.addoption("--seed", default="1", help="what the clients of the fault suite choose by; any text")


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory as `tmp_path`, but one that every user can look into: pytest keeps its own to itself."""
    with tempfile.TemporaryDirectory(prefix="echod-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    """An echod that is installed, and can be so again."""
    return Installed(tmp_path)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Puts a line into the report."""
    rows = request.config.stash.setdefault(ROWS, [])

    def add(title: str, **figures: object) -> None:
        shown = {name.replace("_", " "): value for name, value in figures.items()}
        rows.append(f"{title}: {row(shown, ' ')}")

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(ROWS, []):
        terminalreporter.write_line(line)
