"""The pid file: only its lock counts, not its content."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from echod.process import lockfile, pidfile
from tests.support.daemon import DEADLINE_S


def test_it_holds_our_pid_while_we_run(tmp_path: Path) -> None:
    """The file has the pid and a newline, is private whatever the umask is, and is removed at the end."""
    path = tmp_path / "pid"
    before = os.umask(0)
    try:
        held = pidfile.acquire(str(path))
    finally:
        os.umask(before)
    assert path.read_text() == f"{os.getpid()}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    held.release()
    assert not path.exists()


def test_a_second_one_is_refused_with_the_first_one_s_pid(tmp_path: Path) -> None:
    """A second daemon reports the first one's pid and changes nothing."""
    path = tmp_path / "pid"
    held = pidfile.acquire(str(path))
    with pytest.raises(pidfile.PidFileError, match=f"already running, pid {os.getpid()}$"):
        pidfile.acquire(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    held.release()


@pytest.mark.parametrize("stale", ["", "1\n", f"{os.getppid()}\n", "4194305\n", "\0" * 8, "47\0\0", "9" * 60])
def test_what_was_left_behind_is_no_obstacle(stale: str, tmp_path: Path) -> None:
    """An unlocked file is stale, even if it is empty or names another running program."""
    path = tmp_path / "pid"
    path.write_text(stale)
    held = pidfile.acquire(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    held.release()


def test_what_is_no_pid_file_is_not_overwritten(tmp_path: Path) -> None:
    """A wrong file, such as --pidfile echod.toml, is not overwritten; a link or a FIFO is refused."""
    document = tmp_path / "echod.toml"
    document.write_text("# " + "x" * 100)
    (tmp_path / "link").symlink_to(document)
    (tmp_path / "dangling").symlink_to(tmp_path / "made through a link")
    os.mkfifo(tmp_path / "fifo")
    for name, words in (
        ("echod.toml", "not a pid file"),
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("fifo", "not a pid file"),
        ("", "is a directory"),
        ("nowhere/pid", "no such file or directory"),
    ):
        with pytest.raises(pidfile.PidFileError, match=words):
            pidfile.acquire(f"{tmp_path}/{name}")
    assert document.read_text() == "# " + "x" * 100
    assert not (tmp_path / "made through a link").exists()


def test_refusals_and_releases_leave_no_descriptor(tmp_path: Path) -> None:
    """No descriptor is left open."""
    before = os.listdir("/proc/self/fd")
    held = pidfile.acquire(f"{tmp_path}/pid")
    with pytest.raises(pidfile.PidFileError):
        pidfile.acquire(f"{tmp_path}/pid")
    held.release()
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_somebody_else_put_there_is_not_removed(tmp_path: Path) -> None:
    """Only our own file is removed at the end."""
    path = tmp_path / "pid"
    held = pidfile.acquire(str(path))
    path.unlink()
    later = pidfile.acquire(str(path))
    held.release()
    assert path.exists()
    later.release()


def test_nobody_gets_the_lock_of_a_file_that_is_being_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the owner removes its file between our open and our lock, a new file is locked."""
    path = str(tmp_path / "pid")
    first = pidfile.acquire(path)
    flock = fcntl.flock
    tried: list[int] = []

    def lock_once_the_first_is_gone(descriptor: int, operation: int) -> None:
        if not tried:
            first.release()
        tried.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_once_the_first_is_gone)
    second = pidfile.acquire(path)
    assert len(tried) == 2
    assert os.path.exists(path), "whoever comes third would find nobody there"
    with pytest.raises(pidfile.PidFileError, match="already running"):
        pidfile.acquire(path)
    second.release()


def test_a_pid_file_that_is_removed_as_we_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the owner removes its file between our open and our check, a new file is created."""
    path = str(tmp_path / "pid")
    first = pidfile.acquire(path)
    is_released = False

    def open_and_release(*arguments: Any) -> int:
        nonlocal is_released
        descriptor = original(*arguments)
        if not is_released:
            is_released = True
            first.release()
        return descriptor

    original = os.open
    monkeypatch.setattr(os, "open", open_and_release)
    second = pidfile.acquire(path)
    assert Path(path).read_text() == f"{os.getpid()}\n"
    second.release()


# -- other users -------------------------------------------------------------------------------------------------------

LOCK_IT = """
import fcntl, os, sys
os.setgid(65534)
os.setuid(65534)
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_lock_what_a_dead_one_has_left(open_path: Path) -> None:
    """A user who could open the file could prevent the next start."""
    path = str(open_path / "pid")
    held = pidfile.acquire(path)
    os.close(held.descriptor)  # as a kill does
    stranger = subprocess.run(
        [sys.executable, "-c", LOCK_IT, path], capture_output=True, text=True, input="", timeout=DEADLINE_S
    )
    assert "PermissionError" in stranger.stderr
    pidfile.acquire(path).release()


def test_a_file_that_others_could_open_is_replaced(tmp_path: Path) -> None:
    """Another user may have the file open, and lock it in the moment in which we end."""
    path = tmp_path / "pid"
    path.write_text("1\n")
    path.chmod(0o644)
    stranger = os.open(path, os.O_RDONLY)
    try:
        held = pidfile.acquire(str(path))
        os.close(held.descriptor)  # as a kill does
        fcntl.flock(stranger, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pidfile.acquire(str(path)).release()
    finally:
        os.close(stranger)


def test_a_lock_that_others_may_have_taken_is_told_as_such(tmp_path: Path) -> None:
    """A readable file that is locked may belong to an echod, so it is left alone; the message says what to do."""
    path = tmp_path / "pid"
    path.write_text("4711\n")
    path.chmod(0o644)
    stranger = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(stranger, fcntl.LOCK_EX)
        words = "locked by pid 4711, or by another user who can read the file: remove it if no echod is running$"
        with pytest.raises(pidfile.PidFileError, match=words):
            pidfile.acquire(str(path))
    finally:
        os.close(stranger)
    assert path.read_text() == "4711\n"


def test_a_file_system_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system where every file is readable for all, the file is replaced only once."""
    monkeypatch.setattr(lockfile, "is_private", lambda _: False)
    pidfile.acquire(f"{tmp_path}/pid").release()


# -- handed on ---------------------------------------------------------------------------------------------------------

HEIR = """
import sys
from echod.process.pidfile import PidFile
print(flush=True)
input()
PidFile(sys.argv[1], int(sys.argv[2])).release()
"""


def test_the_lock_is_handed_on_with_its_descriptor(tmp_path: Path) -> None:
    """A program that inherits the descriptor holds the lock, and can release the file: an upgrade in place needs it."""
    path = str(tmp_path / "pid")
    held = pidfile.acquire(path)
    assert not os.get_inheritable(held.descriptor), "a child of ours would hold it against our successor"
    heir = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HEIR,
            path,
            str(held.descriptor),
        ],
        pass_fds=[held.descriptor],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with heir:
        assert heir.stdout
        heir.stdout.readline()
        os.close(held.descriptor)
        with pytest.raises(pidfile.PidFileError, match="already running"):
            pidfile.acquire(path)
        heir.communicate(b"\n", DEADLINE_S)
    assert heir.returncode == 0
    assert not os.path.exists(path)


def test_what_is_no_pid_file_is_left_alone(tmp_path: Path) -> None:
    """A name given by mistake, such as /etc/hostname, and a file that has another name too, are not overwritten."""
    file, link = tmp_path / "hostname", tmp_path / "link"
    file.write_text("example\n")
    with pytest.raises(pidfile.PidFileError, match="not a pid file"):
        pidfile.acquire(str(file))
    assert file.read_text() == "example\n"
    file.write_text("4711\n")
    link.hardlink_to(file)
    with pytest.raises(pidfile.PidFileError, match="not a pid file"):
        pidfile.acquire(str(link))
    assert file.read_text() == "4711\n"
