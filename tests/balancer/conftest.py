"""Whether there is an HAProxy, and the report at the end."""

from collections.abc import Callable

import pytest

from tests.balancer.haproxy import PROGRAM

ROWS = pytest.StashKey[list[str]]()

Report = Callable[..., None]
"""Takes what was done, and figures by name."""


@pytest.fixture(autouse=True)
def _haproxy() -> None:
    if not PROGRAM:
        pytest.skip("no `haproxy` command: on Debian and Ubuntu, `apt-get install haproxy`")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Puts a line into the report."""
    rows = request.config.stash.setdefault(ROWS, [])

    def add(title: str, **figures: object) -> None:
        rows.append(f"{title}: " + " · ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items()))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for row in config.stash.get(ROWS, []):
        terminalreporter.write_line(row)
