"""Write log lines in a thread behind a bounded queue, so that a stalled reader or disk never blocks the server.

If the queue is full, a line is dropped and counted. The flags of the descriptor are left unchanged, because it may be
shared with the process that started this one.
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
"""How many lines may be queued before lines are dropped: some megabytes, at a few hundred bytes per line."""

PREDECESSOR_S = 1.0
"""How long the old destination may take for its last lines after a change; the remaining ones are lost."""

_BATCH_BYTES = 65_536
_GATHER_S = 0.01
"""How long the writer pauses after a write, so that lines of a busy moment share one write and one wake-up (9 µs each).
It does not pause while someone waits for it, as in a stop, or during an upgrade, when all clients wait."""

_POLL_S = 0.05
"""How often the writer checks whether to abandon a destination that accepts nothing."""


class LogWriter:
    """The destination of log lines; it can be replaced while lines are being written.

    One thread writes to all successive destinations, and at most one new destination waits for it. So it uses one
    thread and two descriptors, however often the destination changes and however long an old one stalls. Only a write
    that never returns, for example to a network file system that hangs, prevents the switch to a new destination.
    """

    def __init__(self, descriptor: int, *, is_owned: bool = False) -> None:
        self._newest = _Destination(descriptor, is_owned=is_owned)
        self._next: _Destination | None = None  # the newest, until the writer reaches it
        self._leave_at = float("inf")  # when the writer abandons the current destination
        self._waiting = 0  # lines neither written nor lost, for the current destination
        self._behind = 0  # and those for the next one
        self._dropped = 0
        self._lock = threading.RLock()  # protects all of the above; reentrant, because a destructor may log
        self._is_awaited = threading.Event()
        self._queue: SimpleQueue[bytes | _Mark] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(self._newest,), name="log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many lines were lost, because the queue was full or the destination accepted nothing."""
        return self._dropped

    def write(self, line: bytes) -> None:
        """Queue a line; never block."""
        with self._lock:
            if (self._behind if self._next else self._waiting) >= QUEUED_LINES:
                self._dropped += 1
                return
            if self._next:
                self._behind += 1
            else:
                self._waiting += 1
            self._queue.put(line)

    def flush(self, timeout_s: float) -> int:
        """Wait at most `timeout_s` until all queued lines are written; return how many are not."""
        mark = _Mark()
        self._put(mark)
        mark.reached.wait(timeout_s)
        return self._waiting + self._behind

    def redirect(self, descriptor: int, *, is_owned: bool) -> None:
        """Write later lines to `descriptor`; the old one gets the lines before, and is closed if owned.

        The order of lines is kept, because both may be the same file, reopened. An old destination that accepts nothing
        is abandoned after PREDECESSOR_S. If standard error is redirected to itself, nothing happens.
        """
        destination = _Destination(descriptor, is_owned=is_owned)
        with self._lock:
            if not is_owned and destination.descriptor == self._newest.descriptor:
                return
            skipped, self._next, self._newest = self._next, destination, destination
            if not skipped:
                self._leave_at = time.monotonic() + PREDECESSOR_S
                self._put(_Mark(is_change=True))
        if skipped:
            skipped.close()

    def close(self, timeout_s: float) -> bool:
        """Write all queued lines and stop the writer; return whether it finished within `timeout_s`."""
        self._put(_Mark(is_end=True))
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _put(self, mark: "_Mark") -> None:
        self._is_awaited.set()
        self._queue.put(mark)

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self, destination: "_Destination") -> None:
        destination.begin()
        while True:
            batch, mark = self._gather()
            for piece in _pieces(batch, destination.piece_bytes):
                self._write(destination, piece)
            if mark and mark.is_change:
                destination.close()
                destination = self._change()
                destination.begin()
            if mark and mark.is_end:
                destination.close()
                return
            if mark:
                self._is_awaited.clear()
                mark.reached.set()
            self._is_awaited.wait(_GATHER_S)

    def _gather(self) -> "tuple[list[bytes], _Mark | None]":
        """Wait for a line and take those queued behind it, up to a mark if there is one."""
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

    def _write(self, destination: "_Destination", lines: list[bytes]) -> None:
        lost = destination.write(lines, self._must_leave)
        with self._lock:
            self._waiting -= len(lines)
            self._dropped += lost

    def _must_leave(self) -> bool:
        return time.monotonic() >= self._leave_at

    def _change(self) -> "_Destination":
        with self._lock:
            destination, self._next, self._leave_at = self._next, None, float("inf")
            self._waiting, self._behind = self._behind, 0
        assert destination
        return destination


class _Mark:
    """A position in the queue, with an event that is set when the writer reaches it."""

    def __init__(self, *, is_change: bool = False, is_end: bool = False) -> None:
        self.is_change = is_change
        self.is_end = is_end
        self.reached = threading.Event()


class _Destination:
    """A descriptor that lines are written to, used by one thread at a time."""

    def __init__(self, descriptor: int, *, is_owned: bool) -> None:
        self.descriptor = descriptor
        self._is_owned = is_owned
        self._is_torn = False
        # A write to a file completes or fails. A ready pipe accepts PIPE_BUF bytes at once without blocking (pipe(7)),
        # so ending a write that waits does not tear a line.
        self._is_file = _is_file(descriptor)
        self.piece_bytes = 2 * _BATCH_BYTES if self._is_file else select.PIPE_BUF
        self._readiness = select.poll()
        self._readiness.register(descriptor, select.POLLOUT)

    def begin(self) -> None:
        """Check whether the file ends in a torn line; call this when no other descriptor of the file is in use."""
        self._is_torn = self._is_owned and _ends_torn(self.descriptor)

    def write(self, lines: list[bytes], must_leave: Callable[[], bool]) -> int:
        """Write the lines, until `must_leave` returns True; return how many are lost."""
        data = b"\n" * self._is_torn + b"".join(lines)
        done = 0
        while done < len(data) and self._is_ready(must_leave):
            try:
                done += os.write(self.descriptor, memoryview(data)[done : done + self.piece_bytes])
            except BlockingIOError:
                # Another process has made the shared descriptor non-blocking and writes to it as well.
                select.select((), (), (), _GATHER_S)
            except OSError:
                break
        lost = data.count(b"\n", max(done, self._is_torn))
        if done:
            self._is_torn = data[done - 1 : done] != b"\n"
        return lost

    def close(self) -> None:
        """Close the descriptor if it is owned."""
        if self._is_owned:
            with suppress(OSError):  # NFS may report a full disk only now
                os.close(self.descriptor)

    def _is_ready(self, must_leave: Callable[[], bool]) -> bool:
        """Wait until the descriptor accepts a write; return False if `must_leave` returns True before that."""
        while not self._is_file:
            is_leaving = must_leave()
            if self._readiness.poll(0 if is_leaving else 1000 * _POLL_S):
                break
            if is_leaving:
                return False
        return True


def _pieces(lines: Iterable[bytes], longest: int) -> Iterator[list[bytes]]:
    """Yield the lines in pieces of at most `longest` bytes; a longer line is a piece of its own."""
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
    """Whether this is a file whose last line has no LF, because of a full disk or a crash."""
    try:
        size = os.fstat(descriptor).st_size  # 0 for anything but a file
        if not size:
            return False
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:  # the descriptor itself is write-only
            return os.pread(file.fileno(), 1, size - 1) != b"\n"
    except OSError:
        return False
