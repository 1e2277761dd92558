"""Continue as a daemon (python-daemon), while the calling process waits for the result of the start.

python-daemon exits the calling process with status 0 as soon as it has forked. Therefore the caller waits in the hook
that Python runs after a fork, and exits with the status that the daemon sends through a pipe.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from msgspec import Struct

UMASK = 0o027

SILENT_END = (
    "echod: could not start: the daemon ended without a report; it was killed, or no further process was allowed "
    "(see dmesg, ulimit -u)\n"
)


class DetachError(Exception):
    """The process could not become a daemon."""


class Caller(Struct):
    """The process that started the daemon and waits for its report; only the first report is sent."""

    _descriptor: int | None

    def tell(self, status: int, lines: Sequence[str]) -> bool:
        """Make the caller print the lines and exit with the status; return False if it no longer waits."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return True
        report = b"%d\n" % status + "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
        try:
            while report:
                report = report[os.write(descriptor, report) :]
        except BrokenPipeError:
            return False
        finally:
            os.close(descriptor)
        return True


def detach(before_waiting: Callable[[], object], *, silent_end: int) -> Caller:
    """Return in the daemon: no terminal, directory /, umask 027, no core dumps, only /dev/null open.

    The calling process calls `before_waiting`, waits, and exits with the status that the daemon reports, or with
    `silent_end` if the daemon ends without a report. There must be no thread, loop or open file yet. Raise DetachError
    in the calling process.
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
                detach_process=True,  # None means to guess
                initgroups=False,  # privileges are dropped later, when the ports are bound
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
    try:  # Python would only print an exception from a hook, and continue
        before_waiting()
        status, text = _parse(_read_to_end(reading), silent_end)
        with suppress(OSError):  # without a standard error, the exit status is all that the caller can say
            os.write(2, text)
    finally:
        os._exit(status)


def _read_to_end(descriptor: int) -> bytes:
    chunks = []
    while chunk := os.read(descriptor, 65_536):
        chunks.append(chunk)
    return b"".join(chunks)


def _parse(report: bytes, silent_end: int) -> tuple[int, bytes]:
    status, newline, text = report.partition(b"\n")
    return (int(status), text) if newline else (silent_end, SILENT_END.encode())
