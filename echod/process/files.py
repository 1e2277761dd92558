"""Reads files that an operator names, with bounds on their type, their size and the time that reading takes.

Without these bounds a FIFO would block forever, a device could exhaust memory, and a network file system could hang.
"""

import os
import stat
import threading
from collections.abc import Callable

MOST_BYTES = 1 << 20
"""The default size limit, far above any configuration or certificate chain."""

WITHIN_S = 5.0
"""The default time limit. It is shorter than the preflight's, so that a failed upgrade names the file."""

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)

_unanswered: dict[str, threading.Thread] = {}
"""The threads of reads that timed out, by path. Such a thread cannot be ended, so a path has at most one."""


def read_bounded(path: str, most_bytes: int = MOST_BYTES, within_s: float = WITHIN_S) -> bytes:
    """Return the content of a regular file.

    Raise OSError if it is not regular, too large, or not read in time; its text says why, and what is expected instead.
    """
    if (stuck := _unanswered.get(path)) and stuck.is_alive():
        raise OSError("cannot be read: an earlier attempt still waits for its file system")
    contents: list[bytes] = []
    errors: list[OSError] = []

    def read() -> None:
        try:
            contents.append(_read(path, most_bytes))
        except OSError as error:
            errors.append(error)

    # O_NONBLOCK has no effect on regular files: only a thread allows a deadline for a file system that hangs.
    thread = threading.Thread(target=read, name="read file", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(f"cannot be read: {error} (TasksMax=, ulimit -u)") from error
    thread.join(within_s)
    if contents:
        return contents[0]
    if errors:
        raise _explained(errors[0]) from errors[0]
    _unanswered[path] = thread
    raise OSError(f"cannot be read: its file system has not answered within {within_s:g} s")


def _explained(error: OSError) -> OSError:
    return OSError(f"cannot be read: {error.strerror}") if error.strerror else error


def _read(path: str, most_bytes: int) -> bytes:
    _require_regular(os.stat(path))  # before the open: opening a device can have effects, such as rewinding a tape
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    with open(descriptor, "rb") as stream:
        _require_regular(os.fstat(descriptor))
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(f"larger than {most_bytes} bytes: not the file that is meant")
    return content


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "a device")
        raise OSError(f"cannot be read: {kind}, expected a regular file")
