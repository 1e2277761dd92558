"""Where log lines go: a bounded queue and one thread that writes, so that no reader and no disk can stop the server.

A line that finds the queue full is dropped and counted, never waited for. The descriptor's flags are left alone: it is
shared with whoever started this process.
"""

import os
import select
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue

QUEUED_LINES = 8192
"""At a few hundred bytes a line some megabytes; what a reader may be behind before lines are dropped."""

PREDECESSOR_S = 1.0
"""How long a new place waits for the last lines to the old one; those that it has not taken then are lost."""

_BATCH_BYTES = 65_536
_GATHER_S = 0.01
"""How long the writer rests after a write: lines of a busy moment then share one write and one wake-up (9 µs each).
Not if somebody waits for it: a stop does, and in the moment of an upgrade all clients do."""

_LOOK_S = 0.05
"""How often the writer checks whether to abandon a destination that accepts nothing."""


class LogWriter:
    """The destination of log lines; it can be replaced while lines are being written.

    One thread writes to all successive destinations, and at most one new destination waits for it. So the sink has one
    thread and two descriptors, however often the destination changes and however long an old one stalls. Only a write
    that never returns, for example to a network file system that hangs, prevents the switch to a new destination.
    """

    def __init__(self, descriptor: int, *, is_owned: bool = False) -> None:
        self._newest = _Place(descriptor, is_owned=is_owned)
        self._next: _Place | None = None  # the newest, if the writer has not reached it yet
        self._leave_at = float("inf")  # when the writer abandons the previous place, whatever it has accepted
        self._waiting = 0  # lines neither written nor lost
        self._behind = 0  # the same, for the place that is next
        self._dropped = 0
        self._turn = threading.RLock()  # protects all of these; reentrant, because a destructor may log
        self._is_awaited = threading.Event()
        self._queue: SimpleQueue[bytes | _Mark] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(self._newest,), name="log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines lost so far: no room in the queue, or the descriptor took none."""
        return self._dropped

    def write(self, line: bytes) -> None:
        """Queue a line; never blocks."""
        with self._turn:
            if (self._behind if self._next else self._waiting) >= QUEUED_LINES:
                self._dropped += 1
                return
            if self._next:
                self._behind += 1
            else:
                self._waiting += 1
            self._queue.put(line)

    def flush(self, timeout_s: float) -> int:
        """Wait until what is queued is written, for at most `timeout_s`; return how many lines are not."""
        mark = _Mark()
        self._put(mark)
        mark.reached.wait(timeout_s)
        return self._waiting + self._behind

    def redirect(self, descriptor: int, *, is_owned: bool) -> None:
        """Send the lines written from now on to `descriptor`; the one before gets its lines, and is closed if owned.

        Lines keep their order, for the new place may be the old one reopened. But a place that takes nothing is left
        after PREDECESSOR_S. Standard error that is redirected to standard error stays as it is.
        """
        place = _Place(descriptor, is_owned=is_owned)
        with self._turn:
            if not is_owned and place.descriptor == self._newest.descriptor:
                return
            skipped, self._next, self._newest = self._next, place, place
            if not skipped:
                self._leave_at = time.monotonic() + PREDECESSOR_S
                self._put(_Mark(is_change=True))
        if skipped:
            skipped.close()

    def close(self, timeout_s: float) -> bool:
        """Write what is queued, for at most `timeout_s`; return whether the writer came to the end of it."""
        self._put(_Mark(is_end=True))
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _put(self, mark: "_Mark") -> None:
        self._is_awaited.set()
        self._queue.put(mark)

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self, place: "_Place") -> None:
        place.begin()
        while True:
            batch, mark = self._gather()
            for piece in _pieces(batch, place.piece_bytes):
                self._write(place, piece)
            if mark and mark.is_change:
                place.close()
                place = self._change()
                place.begin()
            if mark and mark.is_end:
                place.close()
                return
            if mark:
                self._is_awaited.clear()
                mark.reached.set()
            self._is_awaited.wait(_GATHER_S)

    def _gather(self) -> "tuple[list[bytes], _Mark | None]":
        """Wait for a line and take those behind it; then the mark that ended them, if one did."""
        batch: list[bytes] = []
        size = 0
        item = self._queue.get()
        while isinstance(item, bytes):
            batch.append(item)
            size += len(item)
            if size >= _BATCH_BYTES:
                return batch, None
            try:
                item = self._queue.get_nowait()
            except Empty:
                return batch, None
        return batch, item

    def _write(self, place: "_Place", lines: list[bytes]) -> None:
        lost = place.write(lines, self._is_to_leave)
        with self._turn:
            self._waiting -= len(lines)
            self._dropped += lost

    def _is_to_leave(self) -> bool:
        return time.monotonic() >= self._leave_at

    def _change(self) -> "_Place":
        with self._turn:
            place, self._next, self._leave_at = self._next, None, float("inf")
            self._waiting, self._behind = self._behind, 0
        assert place
        return place


class _Mark:
    """Something between two lines of the queue; tells when the writer has reached it."""

    def __init__(self, *, is_change: bool = False, is_end: bool = False) -> None:
        self.is_change = is_change
        self.is_end = is_end
        self.reached = threading.Event()


class _Place:
    """A descriptor that lines are written to; used by one thread at a time."""

    def __init__(self, descriptor: int, *, is_owned: bool) -> None:
        self.descriptor = descriptor
        self._is_owned = is_owned
        self._is_torn = False
        # A file takes what it is given, or fails. A pipe that is ready takes so much at once and doesn't wait for its
        # reader (pipe(7)), and whoever ends a write that waits tears no line.
        self._is_file = _is_file(descriptor)
        self.piece_bytes = 2 * _BATCH_BYTES if self._is_file else select.PIPE_BUF
        self._readiness = select.poll()
        self._readiness.register(descriptor, select.POLLOUT)

    def begin(self) -> None:
        """Look at what is there, now that no other descriptor of it is written to."""
        self._is_torn = self._is_owned and _ends_torn(self.descriptor)

    def write(self, lines: list[bytes], is_to_leave: Callable[[], bool]) -> int:
        """Write the lines, unless it is time to leave; return how many are lost."""
        data = b"\n" * self._is_torn + b"".join(lines)
        done = 0
        while done < len(data) and self._is_ready(is_to_leave):
            try:
                done += os.write(self.descriptor, memoryview(data)[done : done + self.piece_bytes])
            except BlockingIOError:
                # Another process made the shared descriptor non-blocking and writes to it too.
                select.select((), (), (), _GATHER_S)
            except OSError:
                break
        lost = data.count(b"\n", max(done, self._is_torn))
        if done:
            self._is_torn = data[done - 1 : done] != b"\n"
        return lost

    def close(self) -> None:
        """Close the descriptor, if it is owned."""
        if self._is_owned:
            with suppress(OSError):  # NFS may report a full disk only now
                os.close(self.descriptor)

    def _is_ready(self, is_to_leave: Callable[[], bool]) -> bool:
        """Wait until a write has room; a file always has. Return False if it is time to leave before that."""
        while not self._is_file:
            is_leaving = is_to_leave()
            if self._readiness.poll(0 if is_leaving else 1000 * _LOOK_S):
                break
            if is_leaving:
                return False
        return True


def _pieces(lines: Iterable[bytes], longest: int) -> Iterator[list[bytes]]:
    """The lines in pieces of so many bytes, unless a line alone is longer."""
    piece: list[bytes] = []
    size = 0
    for line in lines:
        if piece and size + len(line) > longest:
            yield piece
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield piece


def _is_file(descriptor: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _ends_torn(descriptor: int) -> bool:
    """Whether it is a file whose last line has no end: a full disk or a crash tore it."""
    try:
        size = os.fstat(descriptor).st_size  # 0 for what is no file
        if not size:
            return False
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:  # the descriptor itself can only write
            return os.pread(file.fileno(), 1, size - 1) != b"\n"
    except OSError:
        return False
