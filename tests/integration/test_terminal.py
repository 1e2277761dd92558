"""`echod serve` at a terminal."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echod.telemetry.greeting import greeting
from tests.support.daemon import DEADLINE_S, clean_environment, connect


def _read_until(reader: int, text: bytes) -> bytes:
    seen = b""
    end = time.monotonic() + DEADLINE_S
    while text not in seen:
        assert time.monotonic() < end, seen
        try:
            seen += os.read(reader, 10_000)
        except OSError:  # Linux: the other side is gone
            break
    return seen


@pytest.mark.parametrize("has_log_file", [False, True], ids=["log here", "log in a file"])
def test_a_terminal_is_greeted_with_what_to_type_next(has_log_file: bool, tmp_path: Path) -> None:
    """On a terminal it shows what to type next, wherever its log goes; Ctrl-C drains and stops."""
    reader, terminal = pty.openpty()
    log = ["--set", f"log.file={tmp_path}/log"] if has_log_file else []
    command = [sys.executable, "-m", "echod", "serve", "-l", "127.0.0.1:0", *log]
    echod = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=clean_environment())
    os.close(terminal)
    try:
        seen = _read_until(reader, b"(twice: at once)")
        port = re.search(rb"nc 127.0.0.1 (\d+)", seen)
        assert port, seen
        assert f"kill -HUP {echod.pid} ".encode() in seen
        connect(int(port[1])).close()
        echod.send_signal(signal.SIGINT)
        if not has_log_file:
            assert b"drain finished" in _read_until(reader, b"stopped")
        assert echod.wait(DEADLINE_S) == 0
        assert not has_log_file or '"stopped"' in (tmp_path / "log").read_text()
    finally:
        echod.kill()
        echod.wait()
        os.close(reader)


def test_the_greeting_names_a_client_for_every_address() -> None:
    """Each address is shown as a command that connects to it; columns are aligned for any pid."""
    text = greeting(["0.0.0.0:8888", "[::]:8889", "[::1]:1", "unix:/run/e.sock"], 7)
    assert [line.strip() for line in text.splitlines() if " nc " in line] == [
        "nc 127.0.0.1 8888",
        "nc ::1 8889",
        "nc ::1 1",
        "nc -U /run/e.sock",
    ]
    columns = {
        line.index(words)
        for line in greeting([], 1_234_567).splitlines()
        for words in ("reload the", "log the", "drain and")
        if words in line
    }
    assert len(columns) == 1
