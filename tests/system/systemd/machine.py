"""A disposable machine booted by systemd; a command with a prefix runs on it as root."""

import contextlib
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from tests.support.daemon import DEADLINE_S

PROJECT = Path(__file__).parents[3]
THERE = "/opt/echod-test"
"""The directory of the project on the machine."""

PARTS = ("echod", "tests", "systemd", "tools", "requirements", "docs")
FILES = ("Makefile", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")

CONFIG = "/etc/echod/echod.toml"
ADDRESS = "127.0.0.1:8888"
PORT = 8888

RESET = f"""
cd /run/systemd/system 2>/dev/null && rm -rf echod*.d
systemctl daemon-reload
systemctl stop echod.socket echod.service 'echod@*.service'
systemctl reset-failed 'echod*' 2>/dev/null
cp {THERE}/systemd/echod.toml {CONFIG}
"""


class Load:
    """Clients on the machine that run until ended; each answer is a JSON document."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._stdin.close()
        try:
            self._process.wait(DEADLINE_S)
        finally:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout
            self._process.stdout.close()

    @property
    def _stdin(self) -> Any:
        assert self._process.stdin
        return self._process.stdin

    def next(self) -> Any:
        """Return the next document."""
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def tell(self) -> None:
        """Request the next document."""
        self._stdin.write("\n")
        self._stdin.flush()

    def ask(self) -> Any:
        self.tell()
        return self.next()

    def finish(self) -> Any:
        """End the clients, and return the last document."""
        self._stdin.close()
        return self.next()


class Machine:
    """Runs commands on the machine."""

    def __init__(self, prefix: list[str]) -> None:
        self._prefix = prefix

    def run(
        self, *command: str, data: bytes | None = None, deadline_s: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command and return the result, whatever its exit status."""
        done = subprocess.run(
            [*self._prefix, *command],
            input=data,
            stdin=subprocess.DEVNULL if data is None else None,
            capture_output=True,
            timeout=deadline_s,
        )
        return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())

    def __call__(self, *command: str, data: bytes | None = None, deadline_s: float = 120) -> str:
        """Run a command, which must succeed, and return its output."""
        done = self.run(*command, data=data, deadline_s=deadline_s)
        assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout[-3000:]} {done.stderr[-3000:]}"
        return done.stdout

    # -- files ---------------------------------------------------------------------------------------------------------

    def write(self, path: str, text: str) -> None:
        self("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat >"$1"', "sh", path, data=text.encode())

    def configure(self, text: str) -> None:
        """Replace the configuration."""
        self.write(CONFIG, text)

    def drop_in(self, unit: str, text: str) -> None:
        """Change a unit until the end of the test."""
        self.write(f"/run/systemd/system/{unit}.d/test.conf", text)
        self("systemctl", "daemon-reload")

    def copy_project(self) -> None:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for part in (*PARTS, *FILES):
                archive.add(PROJECT / part, part, filter=_unless_made)
        self("sh", "-c", f"rm -rf {THERE} && mkdir -p {THERE} && tar -C {THERE} -xf -", data=stream.getvalue())

    def copy_directory(self, directory: Path, path: str) -> None:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            archive.add(directory, ".")
        self("sh", "-c", f"mkdir -p {path} && tar -C {path} -xf -", data=stream.getvalue())

    # -- units ---------------------------------------------------------------------------------------------------------

    def systemctl(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.run("systemctl", *arguments)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit."""
        lines = self("systemctl", "show", unit, *(f"--property={name}" for name in properties)).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def status(self, unit: str) -> str:
        """Return the output of `systemctl status`."""
        return self.systemctl("status", "--no-pager", "--full", unit).stdout

    def wait_for(self, look: Callable[[], Any], complaint: str) -> Any:
        """Wait until the function returns something true, and return that."""
        end = time.monotonic() + DEADLINE_S
        while not (found := look()):
            assert time.monotonic() < end, complaint
            time.sleep(0.05)
        return found

    def cursor(self) -> str:
        """Return the current end of the journal."""
        return self("journalctl", "--quiet", "--lines=0", "--show-cursor").split("cursor: ")[1].strip()

    def journal(self, unit: str, cursor: str) -> list[str]:
        """Return the journal of a unit since then, with systemd's messages about it."""
        arguments = ("--quiet", "--no-pager", "--output=cat", f"--after-cursor={cursor}", f"--unit={unit}")
        return self("journalctl", *arguments).splitlines()

    def events(self, unit: str, name: str, cursor: str) -> list[dict[str, Any]]:
        """Return the log events with this name since then."""
        lines = (line for line in self.journal(unit, cursor) if line.startswith("{"))
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def stats(self, unit: str) -> dict[str, Any]:
        cursor = self.cursor()
        self("systemctl", "kill", "--signal=USR1", "--kill-whom=main", unit)
        found: dict[str, Any] = self.wait_for(lambda: self.events(unit, "stats", cursor), f"no stats of {unit}")[0]
        return found

    # -- clients -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def load(self, verb: str, *arguments: object) -> Iterator[Load]:
        """Start clients on the machine, see load.py."""
        process = subprocess.Popen(
            [*self._prefix, *_python("load", verb, *arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with Load(process) as it:
            yield it

    def ask(self, verb: str, *arguments: object) -> dict[str, Any]:
        """Run a client on the machine, and return its answer."""
        answer: dict[str, Any] = json.loads(self(*_python("load", verb, *arguments)))
        return answer


def _python(module: str, *arguments: object) -> list[str]:
    return ["env", "-C", THERE, "python3", "-m", f"tests.system.systemd.{module}", *map(str, arguments)]


def _unless_made(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


def download_wheels(directory: Path, python: str) -> None:
    """Download the wheels that `make install` needs for this Python version, such as 3.13."""
    locks = [part for name in ("build", "run") for part in ("-r", str(PROJECT / f"requirements/{name}.lock"))]
    pip, wheels = (sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"), ("--only-binary=:all:",)
    subprocess.run(
        [*pip, "download", "--dest", str(directory), "--require-hashes", *wheels, "--python-version", python, *locks],
        check=True,
    )
