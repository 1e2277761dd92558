"""A real HAProxy with the configuration of docs/scaling.md: started, asked at its stats socket, never left behind."""

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
"""Where Debian has it isn't in everybody's PATH."""

POLL_S = 0.005
"""From one look at the state of a server to the next."""


def fenced(name: str) -> str:
    """The block of docs/scaling.md whose first line begins with `# NAME`."""
    (block,) = re.findall(
        rf"^```\w*\n(# {re.escape(name)}\b[^\n]*\n.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    return str(block)


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """The text with each change made; what is to be changed must be there, once."""
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {text}"
        text = text.replace(old, new)
    return text


class HAProxy:
    """One HAProxy, whose stats socket is beside its configuration."""

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
        while not self._socket.exists():  # made before the ports are bound, and answered after
            assert self._process.poll() is None, self._said()
            assert time.monotonic() < end, self._said()
            time.sleep(POLL_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def servers(self) -> dict[str, dict[str, str]]:
        """What HAProxy knows of each server: the columns of `show stat`."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(DEADLINE_S)
            asking.connect(str(self._socket))
            asking.sendall(b"show stat -1 4 -1\n")
            with asking.makefile() as answer:
                rows = list(csv.DictReader(answer.read().removeprefix("# ").strip().splitlines()))
        return {row["svname"]: row for row in rows}

    def wait_for(self, server: str, status: str, code: str = "") -> float:
        """When the server was seen `UP` or `DOWN`, by a check whose answer had that code."""
        end = time.monotonic() + DEADLINE_S
        while True:
            row = self.servers()[server]
            is_checked = row["check_status"] != "INI"
            if is_checked and row["status"].startswith(status) and row["check_code"].startswith(code):
                return time.monotonic()
            assert time.monotonic() < end, f"{server} is not {status}: {row}"
            time.sleep(POLL_S)

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()
