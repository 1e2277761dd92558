"""A pseudo-terminal to run a command in, with an emulation of its screen."""

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping

from tests.support.daemon import DEADLINE_S, clean_environment

_PIECE = re.compile(r"\x1b\[(?P<argument>[?0-9;]*)(?P<kind>[A-Za-z])|(?P<end>[\r\n])|(?P<text>[^\x1b\r\n]+)")


class Screen:
    """The characters on the screen, in rows; an unknown escape sequence is an error."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.is_cursor_shown = True
        self.is_other = False
        self.colours: set[str] = set()
        self._main = [""]
        self._lines = self._main
        self._row = self._column = self._main_row = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._rest = ""

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._lines).rstrip("\n")

    def feed(self, data: bytes) -> None:
        said = self._rest + self._decoder.decode(data)
        while found := _PIECE.match(said):
            said = said[found.end() :]
            if found["kind"]:
                self._control(found["argument"], found["kind"])
            elif found["end"]:
                self._end(found["end"])
            else:
                self._write(found["text"])
        assert len(said) < 20, f"no sequence: {said!r}"
        self._rest = said

    def _end(self, kind: str) -> None:
        self._column = 0
        if kind == "\n":
            self._row += 1
            assert not self.is_other or self._row < self.rows, "the other screen has scrolled"
        while len(self._lines) <= self._row:
            self._lines.append("")

    def _write(self, text: str) -> None:
        line = self._lines[self._row].ljust(self._column)
        self._lines[self._row] = line[: self._column] + text + line[self._column + len(text) :]
        self._column += len(text)
        assert not self.is_other or self._column <= self.columns, "a line has run over the edge"

    def _control(self, argument: str, kind: str) -> None:
        match argument, kind:
            case "?1049", "h":
                self.is_other = True
                self._main_row, self._lines, self._row, self._column = self._row, [""], 0, 0
            case "?1049", "l":
                self.is_other = False
                self._lines, self._row, self._column = self._main, self._main_row, 0
            case "?25", "h" | "l":
                self.is_cursor_shown = kind == "h"
            case "", "H":
                self._row = self._column = 0
            case "", "K":
                self._lines[self._row] = self._lines[self._row][: self._column]
            case "", "J":
                del self._lines[self._row + 1 :]
                self._control("", "K")
            case _, "m":
                self.colours.add(argument)
            case _:
                raise AssertionError(f"unknown sequence: {argument!r} {kind}")


class Terminal:
    """An `echod` command in its own terminal, as the foreground job of a session."""

    def __init__(self, *arguments: str, rows: int = 24, columns: int = 80, more: Mapping[str, str]) -> None:
        self.screen = Screen(rows, columns)
        self._reader, terminal = pty.openpty()
        self.resize(rows, columns)
        self.process = subprocess.Popen(
            # A shell in between owns the session: Ctrl-Z has no effect on an orphaned process group.
            [sys.executable, "-c", _SHELL, sys.executable, "-m", "echod", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=clean_environment() | {"TERM": "xterm"} | dict(more),
            start_new_session=True,
        )
        os.close(terminal)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._reader)

    def resize(self, rows: int, columns: int) -> None:
        self.screen.rows, self.screen.columns = rows, columns
        fcntl.ioctl(self._reader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, key: bytes) -> None:
        os.write(self._reader, key)

    def see(self, pattern: str) -> re.Match[str]:
        """Wait until the screen shows the pattern."""
        self.wait(lambda: bool(re.search(pattern, self.screen.text, re.MULTILINE)), f"no {pattern!r}")
        found = re.search(pattern, self.screen.text, re.MULTILINE)
        assert found
        return found

    def wait(self, look: Callable[[], bool], complaint: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not look():
            is_news = self.look(max(end - time.monotonic(), 0))
            assert is_news, f"{complaint} in\n{self.screen.text}"

    def look(self, wait_s: float = 0) -> bool:
        """Read new output; return whether there was any."""
        readable, _, _ = select.select([self._reader], [], [], wait_s)
        data = self._read() if readable else b""
        self.screen.feed(data)
        return bool(data)

    def end(self, number: signal.Signals) -> None:
        """Send a signal to the command."""
        os.kill(os.tcgetpgrp(self._reader), number)

    def exit_status(self) -> int:
        """Read all output up to the exit, and return the status."""
        while data := self._read():
            self.screen.feed(data)
        return self.process.wait(DEADLINE_S)

    def _read(self) -> bytes:
        with contextlib.suppress(OSError):  # EIO: the command has exited
            return os.read(self._reader, 65536)
        return b""


# Runs a job as a shell does: in its own foreground process group. Prints when the job is stopped; Enter continues it.
_SHELL = """
import fcntl, os, signal, struct, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = os.fork()
if job == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execvp(sys.argv[1], sys.argv[1:])
while True:
    _, status = os.waitpid(job, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        break
    os.tcsetpgrp(0, os.getpgrp())
    os.write(1, b"stopped\\n")
    os.read(0, 100)
    os.tcsetpgrp(0, job)
    os.killpg(job, signal.SIGCONT)
os._exit(os.waitstatus_to_exitcode(status) % 256)
"""


@contextlib.contextmanager
def at_terminal(*arguments: str, rows: int = 24, columns: int = 80, **more: str) -> Iterator[Terminal]:
    """Run `echod` at a terminal; keywords are added to the environment."""
    terminal = Terminal(*arguments, rows=rows, columns=columns, more=more)
    try:
        yield terminal
    finally:
        terminal.close()
