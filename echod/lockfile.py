"""A lock that lasts as long as its descriptor is open: through execve(2) too, and never beyond the last process.

The lock is that of flock(2), which needs no right to write: whoever can open the file can take it. Record locks are no
better, for a read lock needs no right to write either and keeps every write lock out. So the file is one that other
users can't open.
"""

import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
# Neither through a link that somebody left for root to follow, nor waiting for the other end of a FIFO.
_CAUTION = os.O_NOFOLLOW | os.O_NONBLOCK


class LockError(Exception):
    """Why the file can't be locked by anybody: its file system has no locks."""


def lock(path: str, check: Callable[[int], object] = lambda _: None) -> int:
    """Return a descriptor of the locked file, made if there is none; `check` raises if it is no file to be locked.

    A file that other users could open is replaced: one of them may have it open, and lock it as soon as we end. Raises
    BlockingIOError if another process has the lock, LockError, and OSError if the file can't be opened.
    """
    is_replaced = False
    while True:
        descriptor = os.open(path, _FLAGS | _CAUTION, 0o600)
        try:
            check(descriptor)
            _lock(descriptor)
            is_ours = is_at(path, descriptor)  # or its owner has just ended and removed it: that lock keeps nobody out
            if is_ours and (is_replaced or is_private(descriptor) or not _remove(path)):
                with suppress(OSError):  # another's file that we may write
                    os.fchmod(descriptor, 0o600)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        is_replaced = is_replaced or is_ours


def is_at(path: str, descriptor: int) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def is_private(descriptor: int) -> bool:
    """Whether nobody but our user and root can open the file."""
    status = os.fstat(descriptor)
    return status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        raise LockError((error.strerror or str(error)).lower()) from error


def _remove(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:  # the directory isn't ours to write
        return False
    return True
