"""A child that shows whether the program as it is installed now could take over; until it has, nothing else happens.

It is a process of its own, bounded in time and in what it says. What it has to prove is not known here: its exit status
0 counts, and its words.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

PREFLIGHT_S = 10.0
"""How long it may take: an import takes a tenth of a second, but a name server may be slow."""

_WORDS_BYTES = 65_536
_FAULTS = 20
_NOT_FOR_CHILDREN = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_KILLED_S = 1.0
_REASON_BYTES = 400


class PreflightError(Exception):
    """Why the program as it is installed now can't take over."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = tuple(errors)


async def prove(command: Sequence[str], environment: Mapping[str, str], descriptors: Collection[int]) -> str:
    """Run the command and return what it said; raises PreflightError. It inherits the descriptors."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        process = _start(command, environment, descriptors, writing)
    except OSError as error:
        os.close(reading)
        raise PreflightError([f"{command[0]}: {(error.strerror or str(error)).lower()}"]) from error
    finally:
        os.close(writing)
    words = bytearray()
    try:
        await _ended(process, reading, words)
    except TimeoutError:
        raise PreflightError([f"no answer from {command[0]} within {PREFLIGHT_S:g} s"]) from None
    finally:
        os.close(reading)
    text = words.decode(errors="replace").strip()
    if process.returncode:
        raise PreflightError(_faults(text, process.returncode))
    return text


def _start(
    command: Sequence[str], environment: Mapping[str, str], descriptors: Collection[int], output: int
) -> "subprocess.Popen[bytes]":
    os.set_blocking(output, True)
    return subprocess.Popen(  # noqa: S603 (what the operator started us by)
        command,
        env={name: value for name, value in environment.items() if name not in _NOT_FOR_CHILDREN},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[*descriptors],
        start_new_session=True,  # Ctrl-C at our terminal isn't meant for it, and it can be killed with its children
    )


async def _ended(process: "subprocess.Popen[bytes]", reading: int, words: bytearray) -> None:
    """Return when the process has ended, and is no zombie any more; raises TimeoutError."""
    loop = asyncio.get_running_loop()
    has_ended = asyncio.Event()
    ending = -1
    try:
        ending = os.pidfd_open(process.pid)
        loop.add_reader(ending, has_ended.set)
        loop.add_reader(reading, _listen, reading, words)
        async with asyncio.timeout(PREFLIGHT_S):
            await has_ended.wait()
        _listen(reading, words)
    finally:
        loop.remove_reader(reading)
        if ending >= 0:
            loop.remove_reader(ending)
            os.close(ending)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has left behind, if not itself
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILLED_S)


def _listen(reading: int, words: bytearray) -> None:
    with suppress(BlockingIOError):
        while heard := os.read(reading, _WORDS_BYTES):
            words += heard[: _WORDS_BYTES - len(words)]
            if len(heard) < _WORDS_BYTES:
                return
        asyncio.get_running_loop().remove_reader(reading)  # its end would stay readable for ever


def _faults(text: str, status: int) -> list[str]:
    """Every fault that it told, one a line; of a traceback what was wrong, and where."""
    end = f"preflight: killed by {signal.Signals(-status).name}" if status < 0 else f"preflight: exit status {status}"
    before, traceback, rest = text.partition("Traceback (most recent call last):")
    if traceback or 'File "' in text:
        lines = [line.strip() for line in (rest or before).splitlines() if line.strip(" ^~")]
        where = next((line for line in reversed(lines) if line.startswith("File ")), "")
        return [f"{lines[-1]} ({where})"[:_REASON_BYTES], end]
    return [line[:_REASON_BYTES] for line in text.splitlines()[:_FAULTS]] or [end]
