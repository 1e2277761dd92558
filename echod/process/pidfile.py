"""The pid file: one daemon for each, and the pid to send signals to.

The lock is what counts, not what the file says: the kernel drops it with the process, so a file that was left behind,
whatever pid is in it, stands in nobody's way. Only our user and root can read the file: who can read it can lock it.
"""

import errno
import os
import stat
from contextlib import suppress

from msgspec import Struct

from echod.process import lockfile

_LONGEST = 64
"""Bytes; a file longer than this holds more than a pid, and isn't ours to overwrite."""


class PidFileError(Exception):
    """Why the pid file can't be had."""


class PidFile(Struct, frozen=True):
    """A pid file that is ours as long as its descriptor is open."""

    path: str
    descriptor: int

    def release(self) -> None:
        """Remove the file and give up the lock; a file that we may no longer remove is emptied."""
        if lockfile.is_at(self.path, self.descriptor):
            try:
                os.unlink(self.path)
            except OSError:  # privileges were dropped, and the directory isn't the new user's
                with suppress(OSError):
                    os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)


def acquire(path: str) -> PidFile:
    """Lock the file, made if there is none, and write our pid into it; raises PidFileError."""
    owner = ""

    def check(descriptor: int) -> None:
        nonlocal owner
        owner = _owner(path, descriptor)

    try:
        descriptor = lockfile.lock(path, check)
    except BlockingIOError:
        raise PidFileError(f"{path}: {owner}") from None
    except lockfile.LockError as error:
        raise PidFileError(f"{path}: cannot be locked: {error}") from error
    except OSError as error:
        words = "a symbolic link, which is not followed" if error.errno == errno.ELOOP else _words(error)
        raise PidFileError(f"{path}: {words}") from error
    try:
        _write_pid(path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return PidFile(path, descriptor)


def _owner(path: str, descriptor: int) -> str:
    """Who has the lock, if it is taken; raises PidFileError if the file is no pid file."""
    status = os.fstat(descriptor)
    content = os.pread(descriptor, _LONGEST + 1, 0) if stat.S_ISREG(status.st_mode) else b"no file"
    if status.st_nlink > 1 or len(content) > _LONGEST or content.strip(b"0123456789 \n\0"):
        raise PidFileError(f"{path}: not a pid file; it would be overwritten")
    pid = content.strip(b" \n\0").decode() or "not yet written"
    if lockfile.is_private(descriptor):
        return f"already running, pid {pid}"
    return f"locked, by pid {pid} or by another user who can read the file: remove it if no echod runs"


def _write_pid(path: str, descriptor: int) -> None:
    pid = b"%d\n" % os.getpid()
    try:
        os.pwrite(descriptor, pid, 0)
        os.ftruncate(descriptor, len(pid))
    except OSError as error:
        raise PidFileError(f"{path}: {_words(error)}") from error


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
