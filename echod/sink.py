"""Where log lines go: a bounded queue and one thread that writes, so that no reader and no disk can stop the server.

A line that finds the queue full is dropped and counted, never waited for. The descriptor's flags are left alone: it is
shared with whoever started this process.
"""

import os
import select
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue

QUEUED_LINES = 8192
"""At a few hundred bytes a line some megabytes; what a reader may be behind before lines are dropped."""

PREDECESSOR_S = 1.0
"""How long a new place waits for the last lines to the old one."""

_BATCH_BYTES = 65_536
_GATHER_S = 0.01
"""How long the writer rests after a write: lines of a busy moment then share one write and one wake-up (9 µs each).
Not if somebody waits for it: a stop does, and in the moment of an upgrade all clients do."""


class Sink:
    """The place that lines go to; it can be changed while lines are being written."""

    def __init__(self, descriptor: int, *, is_owned: bool = False) -> None:
        self._writers = [_Writer(descriptor, is_owned)]  # the last one takes the lines, those before are ending
        self._dropped_by_ended = 0
        self._turn = threading.RLock()  # one writes, or changes writers; reentrant, for a destructor may log

    @property
    def dropped(self) -> int:
        """Lines lost so far: no room in the queue, or the descriptor took none."""
        return self._dropped_by_ended + sum(writer.dropped for writer in self._writers)

    def write(self, line: bytes) -> None:
        """Queue a line; never blocks."""
        with self._turn:  # or the line could come behind the end of one that was the last
            self._writers[-1].put(line)

    def flush(self, timeout_s: float) -> int:
        """Wait until what is queued is written, for at most `timeout_s`; return how many lines are not."""
        written = threading.Event()
        self._writers[-1].mark(written)
        written.wait(timeout_s)
        return sum(writer.unwritten for writer in self._writers)

    def redirect(self, descriptor: int, *, is_owned: bool) -> None:
        """Send the lines written from now on to `descriptor`; the one before gets its lines, and is closed if owned.

        Lines keep their order, for the new place may be the old one reopened. But a thread that is stuck in its write
        is left behind with what it has after PREDECESSOR_S: a new place must not wait for an old one.
        """
        last = self._writers[-1]
        new = _Writer(descriptor, is_owned, last)
        with self._turn:
            self._writers.append(new)
            last.finish()
        ended = [writer for writer in self._writers[:-1] if writer.wait(0)]
        self._dropped_by_ended += sum(writer.dropped for writer in ended)
        self._writers = [writer for writer in self._writers if writer not in ended]

    def close(self, timeout_s: float) -> bool:
        """Write what is queued, for at most `timeout_s`; return whether all of it was."""
        end = time.monotonic() + timeout_s
        self._writers[-1].finish()
        waited = [writer.wait(end - time.monotonic()) for writer in self._writers]
        return all(waited)


class _Writer:
    """One descriptor, the queue of lines for it and the thread between them."""

    def __init__(self, descriptor: int, is_owned: bool, predecessor: "_Writer | None" = None) -> None:
        self._refused = 0  # counted by the callers of `put`
        self._failed = 0  # counted by the thread
        self._descriptor = descriptor
        self._is_owned = is_owned
        self._is_torn = False
        self._in_hand = 0  # lines that the thread is writing
        # A pipe takes as much at once or nothing of it (pipe(7)): who ends a write that waits tears no line.
        self._piece_bytes = select.PIPE_BUF if _is_pipe(descriptor) else 2 * _BATCH_BYTES
        self._nobody = threading.Event()
        self._is_awaited = threading.Event()
        self._queue: SimpleQueue[bytes | threading.Event | None] = SimpleQueue()  # an event: tell when you are here
        self._thread = threading.Thread(target=self._run, args=(predecessor,), name="log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self._refused + self._failed

    @property
    def unwritten(self) -> int:
        return self._queue.qsize() + self._in_hand

    def mark(self, reached: threading.Event) -> None:
        self._is_awaited.set()
        self._queue.put(reached)

    def put(self, line: bytes) -> None:
        if self._queue.qsize() < QUEUED_LINES:
            self._queue.put(line)
        else:
            self._refused += 1

    def finish(self) -> None:
        self._is_awaited.set()
        self._queue.put(None)

    def wait(self, timeout_s: float) -> bool:
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _run(self, predecessor: "_Writer | None") -> None:
        if predecessor:
            predecessor.wait(PREDECESSOR_S)
        self._is_torn = self._is_owned and _ends_torn(self._descriptor)
        while True:
            batch, told = self._gather()
            for piece in _pieces(batch, self._piece_bytes):
                self._write(b"".join(piece))
                self._in_hand -= len(piece)
            if told is None:
                break
            if told is not self._nobody:
                self._is_awaited.clear()
            told.set()
            self._is_awaited.wait(_GATHER_S)
        if self._is_owned:
            with suppress(OSError):  # a full disk behind NFS may say so only now
                os.close(self._descriptor)

    def _gather(self) -> tuple[list[bytes], threading.Event | None]:
        """Wait for a line and take those behind it; then who is to hear when they are written, None at the end."""
        batch: list[bytes] = []
        size = 0
        item = self._queue.get()
        while isinstance(item, bytes):
            batch.append(item)
            self._in_hand = len(batch)
            size += len(item)
            if size >= _BATCH_BYTES:
                break
            try:
                item = self._queue.get_nowait()
            except Empty:
                break
        return batch, self._nobody if isinstance(item, bytes) else item

    def _write(self, lines: bytes) -> None:
        data = b"\n" + lines if self._is_torn else lines
        done = 0
        while done < len(data):
            try:
                done += os.write(self._descriptor, memoryview(data)[done:])
            except BlockingIOError:
                # Somebody else made the shared descriptor non-blocking.
                select.select([], [self._descriptor], [])
            except OSError:
                self._failed += data.count(b"\n", max(done, len(data) - len(lines)))
                break
        if done:
            self._is_torn = data[done - 1 : done] != b"\n"


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


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
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
