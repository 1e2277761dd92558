"""Chooses between the compiled fast path and the Python code that does the same.

`HotPath` is the base of a connection: its counters, and what the event loop calls when there is something to read. The
compiled one answers ordinary chunks itself; the one in Python reads and hands everything on.
"""

import os
import socket
import time
from functools import partial
from typing import TYPE_CHECKING

from echod.sockets import SockAddr

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

Accepted = tuple[int, SockAddr]
"""The descriptor of an accepted client, which doesn't block and is its taker's to close, and the client's address."""

CHUNK_BYTES = 65_536
"""The most that one read brings."""

# One thread runs the event loop, and what was read is copied before the next read: all connections share it.
_chunk = memoryview(bytearray(CHUNK_BYTES))


GAP_S = 0.005
"""Reads that are further apart than this don't belong together."""

CHECK_S = 0.005
"""After so long a row of reads it is time to see whether the event loop still turns."""

BUDGET_S = 0.015
"""So much of a turn of the event loop goes to reads. The clients whose input is still to be read then wait in a queue.

libuv polls up to 48 times in a row, without a timer or a new descriptor in between, as long as each time 1024
descriptors are ready. So as many clients that always have input would keep everyone else waiting for seconds."""


class _Window:
    """The reads of this turn of the event loop, as far as it is known when that began."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew with the next read."""
        self.is_overloaded = self.is_checking = False
        self.start = self.last = 0.0

    def is_late(self, path: "PythonHotPath") -> bool:
        """Whether reads have taken all their time in this turn of the event loop."""
        if self.is_overloaded:
            return True
        now = time.monotonic()
        if now - self.last > GAP_S and not self.is_checking:
            self.start = now
        self.last = now
        if now - self.start < CHECK_S:
            return False
        if not self.is_checking:
            self.is_checking = True
            path._check_turn()  # noqa: SLF001 (the other half of the same loop)
            return False
        self.is_overloaded = now - self.start >= BUDGET_S
        return self.is_overloaded


_window = _Window()


class PythonHotPath:
    """One connection's counters; called by the event loop when there is something to read.

    The object itself is the callback, because a bound method for each connection would take 80 bytes.
    A subclass supplies `_read`, which is called instead of a read here while `is_hot` is false, `_receive` for what was
    read (b"" at the end of the stream), `_keep_pending` for replies that the kernel has not taken, and `_lose` for an
    errno; `_check_turn`, which has `serve_directly` called in the next turn of the event loop, and `_postpone`, which
    has `read_now` called later.
    """

    __slots__ = ("bytes_in", "bytes_out", "descriptor", "hot_lines", "is_hot", "line_bytes")

    descriptor: int
    is_hot: bool
    line_bytes: int
    hot_lines: int
    bytes_in: int
    bytes_out: int

    def __init__(self) -> None:
        self.hot_lines = self.bytes_in = self.bytes_out = 0

    def __call__(self) -> None:
        """Read and answer once, or have it done later."""
        if _window.is_late(self):
            self._postpone()
        else:
            self.read_now()

    def read_now(self) -> None:
        """Read and answer once."""
        if not self.is_hot:
            self._read()
            return
        try:
            received = os.readv(self.descriptor, (_chunk,))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error.errno or 0)
            return
        self._receive(_chunk[:received].tobytes())

    def _read(self) -> None:
        raise NotImplementedError

    def _receive(self, chunk: bytes) -> None:
        raise NotImplementedError

    def _keep_pending(self, replies: bytes) -> None:
        raise NotImplementedError

    def _lose(self, error: int) -> None:
        raise NotImplementedError

    def _check_turn(self) -> None:
        raise NotImplementedError

    def _postpone(self) -> None:
        raise NotImplementedError


def _python_accept(listener: socket.socket) -> "Accepted | None":
    try:
        sock, peer = listener.accept()
    except (BlockingIOError, InterruptedError):
        return None
    sock.setblocking(False)
    return sock.detach(), peer


def _load() -> "tuple[ModuleType | None, str]":
    if os.environ.get("ECHOD_FASTPATH") == "0":
        return None, "ECHOD_FASTPATH=0"
    try:
        from echod import _fastpath
    except ImportError as error:
        return None, str(error)
    return _fastpath, ""


_compiled, WHY_NOT = _load()
"""The compiled module, or why it is not in use."""

IS_COMPILED = _compiled is not None
"""Whether the compiled fast path is in use."""

if TYPE_CHECKING:
    HotPath = PythonHotPath  # the compiled one has the same interface
else:
    HotPath = _compiled.HotPath if _compiled else PythonHotPath


def acceptor(listener: socket.socket) -> "Callable[[], Accepted | None]":
    """What accepts a client of the listener: it returns None if nobody waits, and raises OSError as accept(2) fails."""
    if _compiled and listener.family != socket.AF_UNIX:
        return partial(_compiled.accept, listener.fileno())
    return partial(_python_accept, listener)


def serve_directly() -> None:
    """Read from clients as soon as they have input, from a new turn of the event loop on."""
    if _compiled:
        _compiled.serve_directly()
    else:
        _window.reset()
