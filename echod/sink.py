"""Where log lines go: a bounded queue and one thread that writes, so that no reader and no disk can stop the server.

A line that finds the queue full is dropped and counted, never waited for. The descriptor's flags are left alone: it is
shared with whoever started this process.
"""

import os
import select
import threading
import time
from queue import Empty, SimpleQueue

QUEUED_LINES = 8192
"""At a few hundred bytes a line some megabytes; what a reader may be behind before lines are dropped."""

_BATCH_BYTES = 65_536
_GATHER_S = 0.01
"""How long the writer rests after a write: lines of a busy moment then share one write and one wake-up (9 µs each)."""


class Sink:
    """An open descriptor, the queue of lines for it and the thread between them."""

    def __init__(self, descriptor: int, *, is_owned: bool = False) -> None:
        self._queue: SimpleQueue[bytes | _Target | None] = SimpleQueue()
        self._target = _Target(descriptor, is_owned)
        self._refused = 0  # written by the callers of `write`
        self._failed = 0  # written by the thread
        self._is_torn = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines lost so far: no room in the queue, or the descriptor took none."""
        return self._refused + self._failed

    def write(self, line: bytes) -> None:
        """Queue a line; never blocks."""
        if self._queue.qsize() < QUEUED_LINES:
            self._queue.put(line)
        else:
            self._refused += 1

    def redirect(self, descriptor: int, *, is_owned: bool) -> None:
        """Send the lines written from now on to `descriptor`, and close the one before if it was owned."""
        self._queue.put(_Target(descriptor, is_owned))

    def close(self, timeout_s: float) -> bool:
        """Write what is queued, for at most `timeout_s`; return whether all of it was."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            batch, then = self._gather()
            if batch:
                self._write(batch)
            match then:
                case _Target():
                    self._target.close()
                    self._target = then
                    self._is_torn = False
                case True:
                    self._target.close()
                    return
                case False:
                    time.sleep(_GATHER_S)

    def _gather(self) -> "tuple[list[bytes], _Target | bool]":
        """Wait for a line and take those behind it; then what comes after them: a new target, the end, or more."""
        batch: list[bytes] = []
        size = 0
        item = self._queue.get()
        while True:
            if item is None:
                return batch, True
            if isinstance(item, _Target):
                return batch, item
            batch.append(item)
            size += len(item)
            if size >= _BATCH_BYTES:
                return batch, False
            try:
                item = self._queue.get_nowait()
            except Empty:
                return batch, False

    def _write(self, batch: list[bytes]) -> None:
        data = memoryview(b"\n" * self._is_torn + b"".join(batch))
        while data:
            try:
                data = data[os.write(self._target.descriptor, data) :]
            except BlockingIOError:
                # Somebody else made the shared descriptor non-blocking.
                select.select([], [self._target.descriptor], [])
            except OSError:
                self._failed += max(1, bytes(data).count(b"\n"))
                self._is_torn = True
                return
        self._is_torn = False


class _Target:
    """A descriptor, and whether it is ours to close."""

    def __init__(self, descriptor: int, is_owned: bool) -> None:
        self.descriptor = descriptor
        self.is_owned = is_owned

    def close(self) -> None:
        if self.is_owned:
            os.close(self.descriptor)
