"""The load generator, and what the guard measured, printed at the end of the run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.harness import Harness
from tests.bench.peers import MissingError

ROWS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """Built once."""
    try:
        return Harness(tmp_path_factory.mktemp("bench"))
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For the files of a test."""
    return tmp_path


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line at the end of the run."""
    return request.config.stash.setdefault(ROWS, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for row in config.stash.get(ROWS, []):
        terminalreporter.write_line(row)
