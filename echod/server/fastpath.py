"""Selects the compiled fast path if it is available, and the equivalent Python code otherwise.

`HotPath` is the base of a connection: its counters, and the callback that the event loop calls when it is readable. The
compiled version answers ordinary chunks itself; the Python version reads, and passes every chunk to the connection.
"""

import os
import socket
from functools import partial
from typing import TYPE_CHECKING

from echod.net.listener import Accepted, python_acceptor

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

INTERFACE = 2
"""Version of the functions and classes that the compiled module has to offer; raise it with every change of them."""

CHUNK_BYTES = 65_536
"""The largest read."""

UNIT_BYTES = 4096
"""A read counts as one unit of work, plus one for every UNIT_BYTES that it returns."""

CHECK_UNITS = 1024
"""After this much work a callback is scheduled for the next iteration of the event loop, to detect when it begins."""

BUDGET_UNITS = 32_768
"""The work that direct reads may do in one iteration of the event loop, about 0.2 s; later reads are then queued.

libuv polls up to 48 times in a row, without running timers or adding new descriptors, as long as 1024 descriptors are
ready each time. Without a budget, that many clients with constant input could delay all others for seconds.
"""

# All connections share this buffer: only the event loop's thread uses it, and copies its content before the next read.
_chunk = memoryview(bytearray(CHUNK_BYTES))


class _Iteration:
    """The work of reads in the current iteration of the event loop, and its limits."""

    __slots__ = ("budget_units", "check_units", "is_detecting_next", "unit_bytes", "units")

    def __init__(self) -> None:
        self.units = 0
        self.is_detecting_next = False
        self.check_units, self.budget_units, self.unit_bytes = CHECK_UNITS, BUDGET_UNITS, UNIT_BYTES


_iteration = _Iteration()


class PythonHotPath:
    """The base of a connection: its counters, and the callback that the event loop calls when it is readable.

    The object itself is the callback, because a bound method for each connection would take 80 bytes. A subclass
    implements `_read`, which replaces the read here while `is_hot` is false, `_receive` for input (b"" at the end of
    the stream), `_keep_pending` for replies that the kernel did not accept, and `_lose` for an errno. It also
    implements `_detect_iteration`, which has `begin_iteration` called in the next iteration of the event loop, and
    `_postpone`, which has `read_now` called later.
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
        """Read once and answer, or queue the read if this iteration of the event loop has no budget left."""
        iteration = _iteration
        if iteration.units >= iteration.check_units:
            if not iteration.is_detecting_next:
                iteration.is_detecting_next = True
                self._detect_iteration()
            if iteration.units >= iteration.budget_units:
                self._postpone()
                return
        self.read_now()

    def read_now(self) -> None:
        """Read once and answer."""
        iteration = _iteration
        iteration.units += 1
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
        iteration.units += received // iteration.unit_bytes
        self._receive(_chunk[:received].tobytes())

    def _read(self) -> None:
        raise NotImplementedError

    def _receive(self, chunk: bytes) -> None:
        raise NotImplementedError

    def _keep_pending(self, replies: bytes) -> None:
        raise NotImplementedError

    def _lose(self, error: int) -> None:
        raise NotImplementedError

    def _detect_iteration(self) -> None:
        raise NotImplementedError

    def _postpone(self) -> None:
        raise NotImplementedError


def _load() -> "tuple[ModuleType | None, str]":
    if os.environ.get("ECHOD_FASTPATH") == "0":
        return None, "ECHOD_FASTPATH=0"
    try:
        from echod.server import _fastpath
    except ImportError as error:
        return None, str(error)
    if getattr(_fastpath, "INTERFACE", 0) != INTERFACE:  # a checkout that was updated and not built again
        return None, "it was built for another version of echod; `make fastpath` builds it anew"
    return _fastpath, ""


_compiled, WHY_NOT = _load()
"""`_compiled` is the compiled module or None; `WHY_NOT` is why it is not in use, or empty."""

IS_COMPILED = _compiled is not None
"""Whether the compiled fast path is in use."""

if TYPE_CHECKING:
    HotPath = PythonHotPath  # the compiled one has the same interface
else:
    HotPath = _compiled.HotPath if _compiled else PythonHotPath


def acceptor(listener: socket.socket) -> "Callable[[], Accepted | None]":
    """Return a function that accepts one client: None if the backlog is empty, OSError if accept(2) fails."""
    if _compiled and listener.family != socket.AF_UNIX:
        return partial(_compiled.accept, listener.fileno())
    return python_acceptor(listener)


def begin_iteration() -> None:
    """Allow direct reads again, and count their work from zero; call it when an iteration of the event loop begins."""
    if _compiled:
        _compiled.begin_iteration()
    else:
        _iteration.units = 0
        _iteration.is_detecting_next = False


def limit_iteration(
    *, check_units: int = CHECK_UNITS, budget_units: int = BUDGET_UNITS, unit_bytes: int = UNIT_BYTES
) -> None:
    """Set how much work reads may do in one iteration of the event loop: see CHECK_UNITS and BUDGET_UNITS."""
    if _compiled:
        _compiled.limit_iteration(check_units, budget_units, unit_bytes)
    else:
        _iteration.check_units, _iteration.budget_units, _iteration.unit_bytes = check_units, budget_units, unit_bytes


limit_iteration()
