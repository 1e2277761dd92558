"""A terminal that is drawn on again and again, and left as it was found; or the plain output, if it is none."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from echod.cli.stats_table import Line, rendered

_ENTER = "\x1b[?1049h\x1b[?25l"
"""The other screen, no cursor (xterm's private modes, which all terminals know)."""

_LEAVE = "\x1b[?25h\x1b[?1049l"

_NOTICED = {signal.SIGTSTP, signal.SIGWINCH}

Write = Callable[[str], None]


class Paper:
    """Output that is no terminal, or a dumb one: what is drawn comes one below the other."""

    is_overwritten = False

    def __init__(self, write: Write) -> None:
        self._write = write

    def draw(self, lines: Sequence[Line]) -> None:
        """Show the lines, and an empty one."""
        self._write("".join(f"{rendered(line, None, in_colour=False)}\n" for line in (*lines, ())))

    def wait_until(self, due: float) -> None:
        """Let time go by until then, by the monotonic clock."""
        time.sleep(max(due - time.monotonic(), 0.0))


class Screen:
    """A terminal."""

    is_overwritten = True

    def __init__(self, write: Write, descriptor: int, *, in_colour: bool) -> None:
        self._write = write
        self._descriptor = descriptor
        self._in_colour = in_colour
        self._lines: Sequence[Line] = ()

    def draw(self, lines: Sequence[Line]) -> None:
        """Show the lines in the place of those before, as far as there is room."""
        self._lines = lines
        width, height = self._size()
        shown = [rendered(line, width, in_colour=self._in_colour) for line in lines[:height]]
        # Each line is overwritten and its rest erased, so nothing flickers.
        self._write("\x1b[H" + "\n".join(f"{line}\x1b[K" for line in shown) + "\x1b[J")

    def wait_until(self, due: float) -> None:
        """Let time go by until then, by the monotonic clock; draw anew if the terminal is resized, or after Ctrl-Z."""
        while noticed := signal.sigtimedwait(_NOTICED, max(due - time.monotonic(), 0.0)):
            # If it is interrupted and resumed only after its timeout, as with SIGSTOP and SIGCONT, sigtimedwait of
            # CPython 3.13 and earlier returns uninitialized memory, which may hold an earlier Ctrl-Z.
            if noticed.si_signo == signal.SIGTSTP and time.monotonic() < due:
                self._write(_LEAVE)
                signal.raise_signal(signal.SIGSTOP)
                self._write(_ENTER)
            self.draw(self._lines)

    def leave(self) -> None:
        """Give the terminal back, with what was shown last on it."""
        width, _ = self._size()
        last = "".join(f"{rendered(line, width, in_colour=self._in_colour)}\n" for line in self._lines)
        with suppress(OSError):  # it is gone, so nobody sees it
            self._write(_LEAVE + last)

    def _size(self) -> tuple[int, int]:
        columns, rows = os.get_terminal_size(self._descriptor)
        return columns or 80, rows or 24


@contextmanager
def screen(write: Write, descriptor: int, *, in_colour: bool) -> Iterator[Screen]:
    """The terminal, to draw on as long as the context is open."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOTICED)
    drawn = Screen(write, descriptor, in_colour=in_colour)
    try:
        write(_ENTER)
        yield drawn
    finally:
        drawn.leave()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
