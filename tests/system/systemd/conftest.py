"""Fixtures of the systemd tests: a disposable machine with echod installed."""

import os
import shlex
from collections.abc import Iterator

import pytest

from tests.system.systemd.machine import RESET, THERE, Machine, download_wheels

PREFIX = "ECHOD_TEST_MACHINE"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The machine after `make install` without a network."""
    if not (prefix := os.environ.get(PREFIX)):
        pytest.skip(
            f"{PREFIX} is not set: the command prefix that runs a command on a disposable machine, see CONTRIBUTING"
        )
    machine = Machine(shlex.split(prefix))
    python = machine("python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    wheels = tmp_path_factory.mktemp("wheels")
    download_wheels(wheels, python)
    machine.copy_directory(wheels, f"{THERE}-wheels")
    machine.copy_project()
    options = f"PIP_OPTIONS=--no-index --find-links {THERE}-wheels"
    machine("make", "-C", THERE, "install", options, deadline_s=300)
    return machine


@pytest.fixture
def machine(installed: Machine) -> Iterator[Machine]:
    """The machine in the state after the installation, with nothing started."""
    installed("sh", "-c", RESET)
    yield installed
    installed("sh", "-c", RESET)


@pytest.fixture(scope="session")
def systemd_version(installed: Machine) -> int:
    return int(installed("systemctl", "--version").split()[1])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the journal with a failure."""
    outcome = yield
    result: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
    machine = getattr(item, "funcargs", {}).get("machine")
    if result.failed and result.when == "call" and machine:
        journal = machine.run("journalctl", "--quiet", "--no-pager", "--lines=60", "--output=short-precise").stdout
        result.sections.append(("the machine's journal", journal))
