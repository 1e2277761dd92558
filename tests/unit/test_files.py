"""Bounded reads: regular files are read, and anything else is an error with a reason."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from echod.process import files
from echod.process.files import read_bounded


def test_a_regular_file_and_what_links_to_it(tmp_path: Path) -> None:
    """A file up to the bound is read, also through a symbolic link, as Kubernetes mounts files."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"x" * files.MOST_BYTES)
    link.symlink_to(file)
    assert read_bounded(str(link)) == b"x" * files.MOST_BYTES
    file.write_bytes(b"")
    assert read_bounded(str(file)) == b""


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    """A file one byte above the bound is refused, also one that reports no size."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 11)
    with pytest.raises(OSError, match=r"^larger than 10 bytes: not the file that is meant$"):
        read_bounded(str(file), 10)
    assert os.stat("/proc/self/status").st_size == 0
    with pytest.raises(OSError, match=r"^larger than 10 bytes"):
        read_bounded("/proc/self/status", 10)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """Nothing else is read, and a FIFO without a writer does not block."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        for path, kind in (
            (tmp_path / "fifo", "a pipe"),
            (tmp_path / "sock", "a socket"),
            (tmp_path, "a directory"),
            (Path("/dev/zero"), "a device"),
            (Path("/dev/null"), "a device"),
        ):
            with pytest.raises(OSError, match=f"^cannot be read: {kind}, expected a regular file$"):
                read_bounded(str(path))
    with pytest.raises(OSError, match=r"^cannot be read: No such file or directory$"):
        read_bounded(str(tmp_path / "missing"))


def test_it_leaves_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    """A read leaves no descriptor and no thread, whether it succeeds or not."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 11)
    before, threads = os.listdir("/proc/self/fd"), threading.active_count()
    read_bounded(str(file))
    for path in (str(file), str(tmp_path)):
        with pytest.raises(OSError, match=r"^(larger|cannot be read)"):
            read_bounded(path, 10)
    assert os.listdir("/proc/self/fd") == before
    assert threading.active_count() == threads


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event that ends the silence of a simulated file system."""
    event = threading.Event()
    stat = os.stat

    def wait(path: str) -> os.stat_result:
        event.wait()
        return stat(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", wait)
        yield event
        event.set()


def test_a_file_system_that_does_not_answer(tmp_path: Path, answer: threading.Event) -> None:
    """The read fails at the deadline, later reads fail at once, until the file system answers."""
    file = tmp_path / "file"
    file.write_bytes(b"here")
    threads = threading.active_count()
    with pytest.raises(OSError, match=r"^cannot be read: its file system has not answered within 0\.05 s$"):
        read_bounded(str(file), within_s=0.05)
    for _ in range(10):
        with pytest.raises(OSError, match=r"^cannot be read: an earlier attempt still waits for its file system$"):
            read_bounded(str(file), within_s=3600)
    assert threading.active_count() == threads + 1, "one thread waits, however often somebody tries"
    answer.set()
    for thread in threading.enumerate():
        if thread.name == "read file":
            thread.join()
    assert read_bounded(str(file)) == b"here"


def test_without_a_thread_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no further thread is allowed, the error says so."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    (tmp_path / "file").touch()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OSError, match=r"^cannot be read: can't start new thread"):
        read_bounded(str(tmp_path / "file"))
