"""The pid file: it names the pid to send signals to, and its lock allows one daemon per file.

Only the lock counts, not the content: the kernel releases it with the process, so a stale file prevents nothing. Only
echod's user and root can read the file, because every user who can read it could lock it.
"""

import errno
import os
import stat
from contextlib import suppress

from msgspec import Struct

from echod.process import lockfile

_LONGEST = 64
"""The largest size of a pid file, in bytes; a longer file is something else and must not be overwritten."""


class PidFileError(Exception):
    """The pid file cannot be written or is locked."""


class PidFile(Struct, frozen=True):
    """A locked pid file; the lock lasts as long as the descriptor is open."""

    path: str
    descriptor: int

    def release(self) -> None:
        """Remove the file and release the lock; empty the file if it cannot be removed any more."""
        if lockfile.is_at(self.path, self.descriptor):
            try:
                os.unlink(self.path)
            except OSError:  # privileges were dropped, and the new user must not write the directory
                with suppress(OSError):
                    os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)


def acquire(path: str) -> PidFile:
    """Create the file if necessary, lock it and write our pid to it; raise PidFileError if that fails."""
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
        words = "is a symbolic link, which is not followed" if error.errno == errno.ELOOP else _words(error)
        raise PidFileError(f"{path}: {words}") from error
    try:
        _write_pid(path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return PidFile(path, descriptor)


def _owner(path: str, descriptor: int) -> str:
    """Describe who holds the lock if it is taken; raise PidFileError if the file is not a pid file."""
    status = os.fstat(descriptor)
    content = os.pread(descriptor, _LONGEST + 1, 0) if stat.S_ISREG(status.st_mode) else b"no file"
    if status.st_nlink > 1 or len(content) > _LONGEST or content.strip(b"0123456789 \n\0"):
        raise PidFileError(f"{path}: not a pid file; echod would overwrite it: name another file")
    pid = content.strip(b" \n\0").decode() or "unknown"
    if lockfile.is_private(descriptor):
        return f"already running, pid {pid}"
    return f"locked by pid {pid}, or by another user who can read the file: remove it if no echod is running"


def _write_pid(path: str, descriptor: int) -> None:
    pid = b"%d\n" % os.getpid()
    try:
        os.pwrite(descriptor, pid, 0)
        os.ftruncate(descriptor, len(pid))
    except OSError as error:
        raise PidFileError(f"{path}: {_words(error)}") from error


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
