"""Runs the next program in a child process that shows whether it could take over.

The child is bounded in time and in how much it may print. Its exit status and its output are all that counts; what
it checks is in `service.preflight`.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

PREFLIGHT_S = 10.0
"""How long a preflight may take: an import takes a tenth of a second, but a name server may be slow."""

_OUTPUT_BYTES = 65_536
_ERRORS = 20
_ERROR_BYTES = 400
_KILLED_S = 1.0
_NOT_FOR_CHILDREN = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class PreflightError(Exception):
    """Why the program that is installed now cannot take over."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = tuple(errors)


async def prove(command: Sequence[str], environment: Mapping[str, str], descriptors: Collection[int]) -> str:
    """Run the command, which inherits the descriptors, and return its output; raises PreflightError."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        process = _start(command, environment, descriptors, writing)
    except OSError as error:
        os.close(reading)
        raise PreflightError([f"{command[0]}: {(error.strerror or str(error)).lower()}"]) from error
    finally:
        os.close(writing)
    output = bytearray()
    try:
        await _ended(process, reading, output)
    except TimeoutError:
        raise PreflightError([f"no answer from {command[0]} within {PREFLIGHT_S:g} s"]) from None
    finally:
        os.close(reading)
    text = output.decode(errors="replace").strip()
    if process.returncode:
        raise PreflightError(_errors(text, process.returncode))
    return text


def _start(
    command: Sequence[str], environment: Mapping[str, str], descriptors: Collection[int], output: int
) -> "subprocess.Popen[bytes]":
    os.set_blocking(output, True)
    return subprocess.Popen(  # noqa: S603 (the command that the operator started us with)
        command,
        env={name: value for name, value in environment.items() if name not in _NOT_FOR_CHILDREN},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[*descriptors],
        start_new_session=True,  # Ctrl-C at our terminal is not meant for it, and its children can be killed with it
    )


async def _ended(process: "subprocess.Popen[bytes]", reading: int, output: bytearray) -> None:
    """Return when the process has ended and is reaped; raises TimeoutError, and then it is killed."""
    loop = asyncio.get_running_loop()
    has_ended = asyncio.Event()
    ending = -1
    try:
        ending = os.pidfd_open(process.pid)
        loop.add_reader(ending, has_ended.set)
        loop.add_reader(reading, _read, reading, output)
        async with asyncio.timeout(PREFLIGHT_S):
            await has_ended.wait()
        _read(reading, output)
    finally:
        loop.remove_reader(reading)
        if ending >= 0:
            loop.remove_reader(ending)
            os.close(ending)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too, if it has left any
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILLED_S)


def _read(reading: int, output: bytearray) -> None:
    with suppress(BlockingIOError):
        while chunk := os.read(reading, _OUTPUT_BYTES):
            output += chunk[: _OUTPUT_BYTES - len(output)]
            if len(chunk) < _OUTPUT_BYTES:
                return
        asyncio.get_running_loop().remove_reader(reading)  # at its end it would stay readable forever


def _errors(text: str, status: int) -> list[str]:
    """Return the errors that the child printed, one a line; of a traceback, the last line and where it was raised."""
    end = f"preflight: killed by {signal.Signals(-status).name}" if status < 0 else f"preflight: exit status {status}"
    before, traceback, rest = text.partition("Traceback (most recent call last):")
    if traceback or 'File "' in text:
        lines = [line.strip() for line in (rest or before).splitlines() if line.strip(" ^~")]
        where = next((line for line in reversed(lines) if line.startswith("File ")), "")
        return [f"{lines[-1]} ({where})"[:_ERROR_BYTES], end]
    return [line[:_ERROR_BYTES] for line in text.splitlines()[:_ERRORS]] or [end]
