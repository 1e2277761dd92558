"""Repeated output of a table: redrawn in place on a terminal, one below the other elsewhere."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from echod.cli.stats_table import Line, rendered

_ENTER = "\x1b[?1049h\x1b[?25l"
"""Switch to the alternate screen and hide the cursor (private modes of xterm, which all terminals support)."""

_LEAVE = "\x1b[?25h\x1b[?1049l"

_NOTICED = {signal.SIGTSTP, signal.SIGWINCH}

Write = Callable[[str], None]


class Paper:
    """Output that is not a terminal, or a dumb one: each table is printed below the one before."""

    is_overwritten = False

    def __init__(self, write: Write) -> None:
        self._write = write

    def draw(self, lines: Sequence[Line]) -> None:
        """Print the lines and an empty line."""
        self._write("".join(f"{rendered(line, None, in_colour=False)}\n" for line in (*lines, ())))

    def wait_until(self, due: float) -> None:
        """Wait until that time (time.monotonic)."""
        time.sleep(max(due - time.monotonic(), 0.0))


class Screen:
    """A terminal on which each table replaces the one before."""

    is_overwritten = True

    def __init__(self, write: Write, descriptor: int, *, in_colour: bool) -> None:
        self._write = write
        self._descriptor = descriptor
        self._in_colour = in_colour
        self._lines: Sequence[Line] = ()

    def draw(self, lines: Sequence[Line]) -> None:
        """Show as many of the lines as fit, in place of the previous ones."""
        self._lines = lines
        width, height = self._size()
        shown = [rendered(line, width, in_colour=self._in_colour) for line in lines[:height]]
        # Overwriting each line and erasing only its rest avoids flicker.
        self._write("\x1b[H" + "\n".join(f"{line}\x1b[K" for line in shown) + "\x1b[J")

    def wait_until(self, due: float) -> None:
        """Wait until that time (time.monotonic); redraw if the terminal is resized, and after Ctrl-Z."""
        while noticed := signal.sigtimedwait(_NOTICED, max(due - time.monotonic(), 0.0)):
            # If it is interrupted and resumed only after its timeout, as with SIGSTOP and SIGCONT, sigtimedwait of
            # CPython 3.13 and earlier returns uninitialized memory, which may hold an earlier Ctrl-Z.
            if noticed.si_signo == signal.SIGTSTP and time.monotonic() < due:
                self._write(_LEAVE)
                signal.raise_signal(signal.SIGSTOP)
                self._write(_ENTER)
            self.draw(self._lines)

    def leave(self) -> None:
        """Restore the terminal, and leave the last table on it."""
        width, _ = self._size()
        last = "".join(f"{rendered(line, width, in_colour=self._in_colour)}\n" for line in self._lines)
        with suppress(OSError):  # the terminal is gone
            self._write(_LEAVE + last)

    def _size(self) -> tuple[int, int]:
        columns, rows = os.get_terminal_size(self._descriptor)
        return columns or 80, rows or 24


@contextmanager
def screen(write: Write, descriptor: int, *, in_colour: bool) -> Iterator[Screen]:
    """Take over the terminal for drawing, and restore it at the end of the context."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOTICED)
    drawn = Screen(write, descriptor, in_colour=in_colour)
    try:
        write(_ENTER)
        yield drawn
    finally:
        drawn.leave()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
