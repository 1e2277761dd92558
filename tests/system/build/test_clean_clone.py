"""A clean clone, with and without a C compiler: `make run` and a few tests."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[3]
COMPILERS = re.compile(r"(.*-)?(cc|gcc|clang|tcc|c89|c99)(-[\d.]+)?")


def path_without_compilers(directory: Path) -> str:
    """Return a directory with links to every program on PATH except C compilers."""
    directory.mkdir()
    for place in os.get_exec_path():
        for program in Path(place).glob("*"):
            link = directory / program.name
            if not COMPILERS.fullmatch(program.name) and not link.is_symlink():
                link.symlink_to(program)
    return str(directory)


@contextmanager
def made(clone: Path, environment: dict[str, str], *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `make` with these arguments, and kill it afterwards if it is still running."""
    command = ["make", "--no-print-directory", f"PYTHON={os.path.realpath(sys._base_executable)}", *arguments]  # type: ignore[attr-defined]
    with subprocess.Popen(
        command,
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("has_compiler", [True, False], ids=["with a compiler", "without a compiler"])
def test_make_run_in_a_clean_clone_serves(has_compiler: bool, tmp_path: Path) -> None:
    """`make run` sets up the clone, reports the fast path and serves; without a compiler, tests pass too."""
    if not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "echod"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(PROJECT), str(clone)], check=True)
    strange = ("ECHOD_", "MAKE", "MFLAGS", "COVERAGE_", "VENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(strange) and name != "CC"}
    outcome = "compiled"
    if not has_compiler:
        environment["PATH"] = path_without_compilers(tmp_path / "bin")
        outcome = "not built: no C compiler (apt-get install gcc libc6-dev python3-dev); echod runs in Python"

    with made(clone, environment, "run", "ARGS=-l 127.0.0.1:0") as running:
        assert running.stdout
        assert running.stderr
        events = (json.loads(line) for line in running.stderr if line.startswith("{"))
        ready = next(event for event in events if event["event"] == "ready")
        (address,) = ready["listen"]
        ping = [clone / ".venv/bin/echod", "ping", "-c", "3", address]
        assert subprocess.run(ping, env=environment, capture_output=True).returncode == 0
        os.kill(ready["pid"], signal.SIGTERM)
        assert [event["event"] for event in events][-1] == "stopped"
        assert f"fast path: {outcome}\n" in running.stdout.read()
    assert running.returncode == 0

    if not has_compiler:  # with one, CI runs all tests in a clean clone
        with made(clone, environment, "test", "TESTS=tests/unit/test_echo.py tests/unit/test_fastpath.py") as testing:
            output, errors = testing.communicate()
            assert testing.returncode == 0, output + errors
            assert f"fast path: {outcome}\n" in output
            assert " passed" in output
