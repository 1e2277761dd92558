"""The pid file: one daemon for each, and the pid to send signals to.

The lock (flock(2)) is what counts, not what the file says: the kernel drops it with the process, so a file that was
left behind, whatever pid is in it, stands in nobody's way. The lock belongs to the open file: a descriptor that is
handed on, through execve(2) too, hands on the lock.
"""

import errno
import fcntl
import os
import stat
from contextlib import suppress

from msgspec import Struct

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
        if _is_at(self.path, self.descriptor):
            try:
                os.unlink(self.path)
            except OSError:  # privileges were dropped, and the folder isn't the new user's
                with suppress(OSError):
                    os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)


def acquire(path: str) -> PidFile:
    """Lock the file, made if there is none, and write our pid into it; raises PidFileError."""
    while True:
        descriptor = _open(path)
        try:
            _lock(path, descriptor)
            if _is_at(path, descriptor):
                _write_pid(path, descriptor)
                return PidFile(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner has just ended and removed it: that lock would keep nobody out


def _open(path: str) -> int:
    # Neither through a link that somebody left for root to follow, nor waiting for the other end of a FIFO.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise PidFileError(f"{path}: a symbolic link, which is not followed") from error
        raise PidFileError(f"{path}: {_words(error)}") from error
    status = os.fstat(descriptor)
    content = os.pread(descriptor, _LONGEST + 1, 0) if stat.S_ISREG(status.st_mode) else b"no file"
    if status.st_nlink != 1 or len(content) > _LONGEST or content.strip(b"0123456789 \n\0"):
        os.close(descriptor)
        raise PidFileError(f"{path}: not a pid file; it would be overwritten")
    return descriptor


def _lock(path: str, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(descriptor, _LONGEST, 0).strip().decode(errors="replace")
        raise PidFileError(f"{path}: already running, pid {pid or 'not yet written'}") from None
    except OSError as error:
        raise PidFileError(f"{path}: cannot be locked: {_words(error)}") from error


def _is_at(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def _write_pid(path: str, descriptor: int) -> None:
    pid = b"%d\n" % os.getpid()
    try:
        os.pwrite(descriptor, pid, 0)
        os.ftruncate(descriptor, len(pid))
    except OSError as error:
        raise PidFileError(f"{path}: {_words(error)}") from error
    with suppress(PermissionError):  # another's file that we may write
        os.fchmod(descriptor, 0o644)  # a pid is no secret, whatever the umask


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
