"""Leave the terminal: go on as a daemon (python-daemon), while the caller waits until it serves or says why it can't.

python-daemon ends the caller with status 0 as soon as it has forked. So the caller waits inside the fork, in the hook
that Python runs there, and ends with what the daemon told through a pipe. Knows no configuration and no server.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from msgspec import Struct

UMASK = 0o027

SILENT_END = (
    "echod: could not start: the daemon ended without a word; it was killed, or there was no room for a process "
    "(`dmesg`, ulimit -u)\n"
)


class DetachError(Exception):
    """Why there is no daemon."""


class Caller(Struct):
    """Who started the daemon and waits for word of it; hears one word at most."""

    _descriptor: int | None

    def tell(self, status: int, lines: Sequence[str]) -> bool:
        """Let the caller print the lines and end with the status; False if nobody waits any more."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return True
        word = b"%d\n" % status + "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
        try:
            while word:
                word = word[os.write(descriptor, word) :]
        except BrokenPipeError:
            return False
        finally:
            os.close(descriptor)
        return True


def detach(before_waiting: Callable[[], object], *, silent_end: int) -> Caller:
    """Return in the daemon: no terminal, directory /, umask 027, no core dumps, every descriptor but /dev/null closed.

    The process that called ends in here, with what the daemon tells, or with status `silent_end` if it ends without a
    word; `before_waiting` is called in it. No thread, loop or open file may be there yet. Raises DetachError, there.
    """
    from daemon import DaemonContext
    from daemon.daemon import DaemonError

    reading, writing = os.pipe()
    caller = os.getpid()

    def wait_in_caller() -> None:
        if os.getpid() == caller:  # python-daemon forks twice
            os.close(writing)
            _wait(reading, before_waiting, silent_end)

    os.register_at_fork(after_in_parent=wait_in_caller)
    try:
        with open(os.devnull, "r+b", buffering=0) as null:
            DaemonContext(
                working_directory="/",
                umask=UMASK,
                prevent_core=True,
                detach_process=True,  # None would guess
                initgroups=False,  # privileges are dropped later, once the ports are bound
                signal_map={},  # the default raises SystemExit
                files_preserve=[writing],
                stdin=null,
                stdout=null,
                stderr=null,
            ).open()
    except DaemonError as error:
        if os.getpid() == caller:
            raise DetachError(str(error)) from error
        Caller(writing).tell(silent_end, [f"echod: could not start: {error}"])
        os._exit(silent_end)
    return Caller(writing)


def _wait(reading: int, before_waiting: Callable[[], object], silent_end: int) -> NoReturn:
    status = silent_end
    try:  # what is raised in a hook goes nowhere
        before_waiting()
        status, text = _heard(_read_to_end(reading), silent_end)
        with suppress(OSError):  # nobody reads standard error: the exit status says it all the same
            os.write(2, text)
    finally:
        os._exit(status)


def _read_to_end(descriptor: int) -> bytes:
    chunks = []
    while chunk := os.read(descriptor, 65_536):
        chunks.append(chunk)
    return b"".join(chunks)


def _heard(word: bytes, silent_end: int) -> tuple[int, bytes]:
    status, newline, text = word.partition(b"\n")
    return (int(status), text) if newline else (silent_end, SILENT_END.encode())
