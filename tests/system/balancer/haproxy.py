"""A real HAProxy with the configuration of docs/scaling.md, observed through its stats socket and always ended."""

import csv
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tests.support.daemon import DEADLINE_S

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"

PROGRAM = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
"""Debian's directory of haproxy is not in every PATH."""

POLL_S = 0.005
"""Interval between two looks at the state of a server, in seconds."""


def fenced(name: str, page: Path = PAGE) -> str:
    """Return the block of a page, docs/scaling.md by default, whose first line begins with `# NAME`."""
    (block,) = re.findall(
        rf"^```\w*\n(# {re.escape(name)}\b[^\n]*\n.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return str(block)


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """Return the text with each change; the text to be changed must occur exactly once."""
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {text}"
        text = text.replace(old, new)
    return text


class HAProxy:
    """An HAProxy process, whose stats socket is beside its configuration."""

    def __init__(self, configuration: str, directory: Path) -> None:
        self._socket = directory / "stats"
        file = directory / "haproxy.cfg"
        file.write_text(replaced(configuration, {"/run/haproxy/admin.sock": str(self._socket)}))
        self._log = (directory / "haproxy.log").open("w+")
        self._process = subprocess.Popen(
            [PROGRAM or "haproxy", "-db", "-dW", "-f", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Self:
        end = time.monotonic() + DEADLINE_S
        while not self._socket.exists():  # created before the ports are bound, answers afterwards
            assert self._process.poll() is None, self._said()
            assert time.monotonic() < end, self._said()
            time.sleep(POLL_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def servers(self) -> dict[str, dict[str, str]]:
        """Return the columns of `show stat` for each server."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(DEADLINE_S)
            asking.connect(str(self._socket))
            asking.sendall(b"show stat -1 4 -1\n")
            with asking.makefile() as answer:
                rows = list(csv.DictReader(answer.read().removeprefix("# ").strip().splitlines()))
        return {row["svname"]: row for row in rows}

    def wait_for(self, server: str, status: str, code: str = "") -> float:
        """Wait until the server is `UP` or `DOWN` after a check with this code; return the time."""
        end = time.monotonic() + DEADLINE_S
        while True:
            row = self.servers()[server]
            is_checked = not row["check_status"].endswith("INI")  # `* INI` while the first check is under way
            if is_checked and row["status"].startswith(status) and row["check_code"].startswith(code):
                return time.monotonic()
            assert time.monotonic() < end, f"{server} is not {status}: {row}"
            time.sleep(POLL_S)

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()
