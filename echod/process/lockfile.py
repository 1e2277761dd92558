"""A lock file whose lock lasts exactly as long as its descriptor is open, including across execve(2).

flock(2) requires no write permission, so any user who can open the file can lock it. Record locks are no better: a read
lock requires no write permission either, and it blocks every write lock. Therefore other users must not be able to open
the file.
"""

import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
# Do not follow a symbolic link, which another user may have planted, and do not block on a FIFO.
_CAUTION = os.O_NOFOLLOW | os.O_NONBLOCK


class LockError(Exception):
    """The file cannot be locked because its file system does not support locks."""


def lock(path: str, check: Callable[[int], object] = lambda _: None) -> int:
    """Create the file if necessary, lock it, and return its descriptor; `check` raises if it must not be locked.

    A file that other users could open is replaced, because one of them may have it open and could lock it when we exit.
    Raise BlockingIOError if another process holds the lock, LockError if locks are not supported, and OSError if the
    file cannot be opened.
    """
    is_replaced = False
    while True:
        descriptor = os.open(path, _FLAGS | _CAUTION, 0o600)
        try:
            check(descriptor)
            _lock(descriptor)
            is_ours = is_at(path, descriptor)  # False if its owner just removed it: locking that file excludes nobody
            if is_ours and (is_replaced or is_private(descriptor) or not _remove(path)):
                with suppress(OSError):  # a file of another user that we may write
                    os.fchmod(descriptor, 0o600)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        is_replaced = is_replaced or is_ours


def is_at(path: str, descriptor: int) -> bool:
    """Whether the path refers to the open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def is_private(descriptor: int) -> bool:
    """Whether only our user and root can open the file."""
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
