"""The log writer: lines arrive in order, and no reader or disk blocks those who write."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from echod.telemetry.log_writer import QUEUED_LINES, LogWriter
from tests.support.daemon import DEADLINE_S


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The read end and the write end of a pipe."""
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        with contextlib.suppress(OSError):  # the test closed it
            os.close(descriptor)


def _read_to_end(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as stream:
        return stream.read()


def _wait_until(claim: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_lines_arrive_in_order_and_close_writes_what_is_queued(pipe: tuple[int, int]) -> None:
    """`close` writes the queued lines and returns whether all of them were written."""
    reader, writer = pipe
    sink = LogWriter(writer, is_owned=True)
    lines = [f"line {number}\n".encode() for number in range(2000)]
    for line in lines:
        sink.write(line)
    assert sink.close(DEADLINE_S)
    assert _read_to_end(reader) == b"".join(lines)
    assert sink.dropped == 0


def test_who_waits_for_the_lines_waits_for_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer pauses after a write, but not while a flush or a close waits."""
    monkeypatch.setattr("echod.telemetry.log_writer._GATHER_S", 4 * DEADLINE_S)
    file = tmp_path / "log"
    sink = LogWriter(os.open(file, os.O_WRONLY | os.O_CREAT), is_owned=True)
    several_writes = [b"x" * 1023 + b"\n"] * 200
    sink.write(b"first\n")
    _wait_until(lambda: file.read_bytes() == b"first\n")
    for line in several_writes:
        sink.write(line)
    assert sink.flush(DEADLINE_S) == 0
    for line in several_writes:
        sink.write(line)
    assert sink.close(DEADLINE_S)
    assert file.read_bytes() == b"first\n" + 2 * b"".join(several_writes)


def test_a_stalled_reader_blocks_nobody_and_the_lost_lines_are_counted(pipe: tuple[int, int]) -> None:
    """With a stalled reader, writing never blocks, the queue is bounded and lost events are counted."""
    reader, writer = pipe
    sink = LogWriter(writer, is_owned=True)
    line = b"x" * 1023 + b"\n"
    started_at = time.monotonic()
    for _ in range(3 * QUEUED_LINES):
        sink.write(line)
    assert time.monotonic() - started_at < DEADLINE_S / 4
    assert QUEUED_LINES <= sink.dropped <= 2 * QUEUED_LINES
    assert not sink.close(0.01), "still stalled"
    received = _read_to_end(reader)  # it goes on: the sink writes what it kept
    assert received == line * (3 * QUEUED_LINES - sink.dropped)


def test_a_reader_that_vanished_is_survived_and_counted(pipe: tuple[int, int]) -> None:
    """With a closed reader, lines are counted as lost."""
    reader, writer = pipe
    os.close(reader)
    sink = LogWriter(writer, is_owned=True)
    sink.write(b"one\n")
    sink.write(b"two\n")
    assert sink.close(DEADLINE_S)
    assert sink.dropped == 2


def test_a_full_disk_is_survived_and_counted(tmp_path: Path) -> None:
    """With a full disk, lines are lost; after a change of the file they arrive again."""
    sink = LogWriter(os.open("/dev/full", os.O_WRONLY), is_owned=True)
    sink.write(b"lost\n")
    _wait_until(lambda: sink.dropped == 1)
    file = tmp_path / "log"
    sink.redirect(os.open(file, os.O_WRONLY | os.O_CREAT), is_owned=True)
    sink.write(b"kept\n")
    assert sink.close(DEADLINE_S)
    assert file.read_bytes() == b"kept\n"


TORN = """
import os, resource, sys
from echod.telemetry.log_writer import LogWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (4, 100))
sink = LogWriter(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT))
sink.write(b"torn in the middle\\n")
while not sink.dropped: pass
sink.write(b"lost as a whole\\n")
while sink.dropped < 2: pass
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
sink.write(b"whole\\n")
assert sink.close(20) and sink.dropped == 2
"""


def test_a_line_torn_by_an_error_is_ended_before_the_next(tmp_path: Path) -> None:
    """After an error in the middle of a line, here a limit of the file size, the next line starts on its own line.

    A line that is lost in between is counted once.
    """
    subprocess.run([sys.executable, "-c", TORN, str(tmp_path / "log")], check=True, timeout=DEADLINE_S)
    assert (tmp_path / "log").read_bytes() == b"torn\nwhole\n"


def test_an_error_that_tears_nothing_leaves_no_blank_line(tmp_path: Path) -> None:
    """After a line that was refused as a whole, the next one needs no LF before it."""
    sink = LogWriter(descriptor := os.open("/dev/full", os.O_WRONLY))
    sink.write(b"lost\n")
    _wait_until(lambda: sink.dropped == 1)
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, descriptor)  # the same descriptor takes lines again
    sink.write(b"whole\n")
    assert sink.close(DEADLINE_S)
    os.close(file)
    os.close(descriptor)
    assert (tmp_path / "log").read_bytes() == b"whole\n"


def test_a_reader_that_is_stuck_doesn_t_keep_the_log_from_a_new_place(pipe: tuple[int, int], tmp_path: Path) -> None:
    """If a stalled destination is replaced, later lines go to the new one and the remaining lines are lost."""
    reader, writer = pipe
    sink = LogWriter(writer, is_owned=True)
    for _ in range(200):
        sink.write(b"x" * 999 + b"\n")
    sink.redirect(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), is_owned=True)
    sink.write(b"elsewhere\n")
    _wait_until(lambda: (tmp_path / "log").read_bytes() == b"elsewhere\n")
    assert sink.close(DEADLINE_S)
    received = _read_to_end(reader)  # which was closed
    assert set(received.splitlines(keepends=True)) == {b"x" * 999 + b"\n"}, "whole lines"
    assert received.count(b"\n") + sink.dropped == 200


def test_a_reader_that_is_stuck_leaks_no_thread_and_no_descriptor(pipe: tuple[int, int], tmp_path: Path) -> None:
    """However often the log is reopened, there are one thread and two descriptors."""
    reader, writer = pipe
    sink = LogWriter(writer)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        sink.write(b"x" * 999 + b"\n")
    for number in range(50):
        sink.redirect(os.open(tmp_path / str(number), os.O_WRONLY | os.O_CREAT), is_owned=True)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
    sink.write(b"last\n")
    assert sink.close(DEADLINE_S)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert (tmp_path / "49").read_bytes() == b"last\n"
    os.close(writer)
    assert _read_to_end(reader).count(b"\n") + sink.dropped == 200


def test_standard_error_again_waits_for_no_reader(pipe: tuple[int, int]) -> None:
    """A redirect to the same shared descriptor loses no line of a slow reader."""
    reader, writer = pipe
    sink = LogWriter(writer)
    for number in range(3):
        sink.write(b"x" * 99_999 + b"\n")
        sink.redirect(writer, is_owned=False)
        sink.write(b"%d\n" % number)
    time.sleep(1.2)  # longer than a new place would wait
    reading = threading.Thread(target=sink.close, args=(DEADLINE_S,))
    reading.start()
    left = 3 * (100_000 + 2)
    while left:
        left -= len(os.read(reader, left))
    reading.join()
    assert sink.dropped == 0


def test_a_non_blocking_descriptor_loses_nothing(pipe: tuple[int, int]) -> None:
    """O_NONBLOCK, set by another process on the shared descriptor, loses no line."""
    reader, writer = pipe
    os.set_blocking(writer, False)
    sink = LogWriter(writer, is_owned=True)
    received: list[bytes] = []
    reading = threading.Thread(target=lambda: received.append(_read_to_end(reader)))
    for _ in range(1000):
        sink.write(b"y" * 999 + b"\n")
    reading.start()
    assert sink.close(DEADLINE_S)
    reading.join()
    assert received == [(b"y" * 999 + b"\n") * 1000]


def test_lines_keep_their_order_when_a_file_is_reopened(tmp_path: Path) -> None:
    """If the same file is reopened, the order of lines is kept."""
    file = tmp_path / "log"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    sink = LogWriter(os.open(file, flags), is_owned=True)
    lines = [f"line {number}\n".encode() for number in range(3000)]
    for number, line in enumerate(lines):
        sink.write(line)
        if number % 100 == 0:
            sink.redirect(os.open(file, flags), is_owned=True)
    assert sink.close(DEADLINE_S)
    assert file.read_bytes() == b"".join(lines)


def test_no_line_of_another_thread_is_lost_when_a_file_is_reopened(tmp_path: Path) -> None:
    """The lines of a thread that logs during redirects all arrive, in order."""
    file, flags = tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND
    sink = LogWriter(os.open(file, flags), is_owned=True)
    lines: list[bytes] = []
    is_over = threading.Event()

    def write() -> None:
        while not is_over.wait(0.0001):
            for _ in range(10):
                lines.append(b"%d\n" % len(lines))
                sink.write(lines[-1])

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(100):
        sink.redirect(os.open(file, flags), is_owned=True)
    is_over.set()
    thread.join()
    assert sink.close(DEADLINE_S)
    assert sink.dropped == 0
    assert file.read_bytes() == b"".join(lines)


def test_a_redirected_sink_closes_only_what_it_owns(pipe: tuple[int, int], tmp_path: Path) -> None:
    """Lines before `redirect` go to the old descriptor, which is then closed if it is owned."""
    reader, writer = pipe
    sink = LogWriter(writer, is_owned=True)
    sink.write(b"old\n")
    sink.redirect(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), is_owned=True)
    sink.write(b"new\n")
    assert _read_to_end(reader) == b"old\n", "the end of the stream shows that it was closed"
    assert sink.close(DEADLINE_S)
    assert (tmp_path / "log").read_bytes() == b"new\n"


def test_a_file_that_ends_in_the_middle_of_a_line_gets_its_end_first(tmp_path: Path) -> None:
    """A file whose last line is torn gets an LF before the next line."""
    file = tmp_path / "log"
    file.write_bytes(b"torn")
    flags = os.O_WRONLY | os.O_APPEND
    sink = LogWriter(os.open(file, flags), is_owned=True)
    sink.write(b"one\n")
    sink.redirect(os.open(file, flags), is_owned=True)
    sink.write(b"two\n")
    assert sink.close(DEADLINE_S)
    assert file.read_bytes() == b"torn\none\ntwo\n"
