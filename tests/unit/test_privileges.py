"""Dropping privileges; each claim is tested in its own process, because a drop is irreversible."""

import multiprocessing
import os
import pwd
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from echod.net import bind, sockets
from echod.net.address import UnixAddress
from echod.process import privileges
from echod.telemetry import logs
from tests.support.daemon import DEADLINE_S

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

NOBODY = pwd.getpwnam("nobody")


def in_a_child(claim: Callable[..., None], *arguments: object) -> None:
    """Run a claim in a new process, which prints an error to standard error."""
    process = multiprocessing.get_context("spawn").Process(target=claim, args=arguments)
    process.start()
    process.join(DEADLINE_S)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0


def nobody() -> privileges.Identity:
    found = privileges.find("nobody", None)
    assert found
    return found


def _give_nothing(uid: int, gid: int) -> None:
    pass


# -- looking up --------------------------------------------------------------------------------------------------------


def test_nothing_asked_is_nothing_to_do() -> None:
    """Without a user and a group nothing changes."""
    assert privileges.find(None, None) is None


def test_who_we_are_already_is_nothing_to_do() -> None:
    """Naming the current user needs no privilege."""
    assert privileges.find(str(os.getuid()), str(os.getgid())) is None


@needs_root
def test_names_and_numbers() -> None:
    """A user is found by name or number, with its own group or another."""
    by_name = privileges.find("nobody", None)
    assert by_name
    assert (by_name.uid, by_name.gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert set(by_name.groups) == set(os.getgrouplist("nobody", NOBODY.pw_gid))
    assert privileges.find(str(NOBODY.pw_uid), None) == by_name
    assert privileges.find("54321", "54322") == privileges.Identity("54321", 54321, 54322, (54322,))
    group_alone = privileges.find(None, "54322")
    assert group_alone
    assert (group_alone.uid, group_alone.gid) == (0, 54322)


@pytest.mark.parametrize(
    ("user", "group", "words"),
    [
        ("nobdy", None, r"--user: no such user \(got 'nobdy'\)"),
        ("-1", None, r"--user: no such user \(got '-1'\)"),
        ("4294967295", None, "--user: no such user"),
        ("nobody", "nogrp", r"--group: no such group \(got 'nogrp'\)"),
        ("54321", None, "add --group"),
    ],
)
def test_errors(user: str, group: str | None, words: str) -> None:
    """The error names the unknown user or group; -1 and 4294967295 mean "unchanged" to the kernel."""
    with pytest.raises(privileges.PrivilegeError, match=words):
        privileges.find(user, group)


# -- dropping ----------------------------------------------------------------------------------------------------------


def _no_way_back() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    os.setgroups([0, 4, 54321])
    privileges.drop(nobody(), _give_nothing)
    assert os.getresuid() == (NOBODY.pw_uid,) * 3
    assert os.getresgid() == (NOBODY.pw_gid,) * 3
    assert set(os.getgroups()) == set(os.getgrouplist("nobody", NOBODY.pw_gid))
    attempts: list[Callable[[], None]] = [
        lambda: os.setuid(0),
        lambda: os.seteuid(0),
        lambda: os.setresuid(-1, 0, -1),
        lambda: os.setgid(0),
        lambda: os.setgroups([0]),
        lambda: os.chown("/", 0, 0),
    ]
    for attempt in attempts:
        with pytest.raises(PermissionError):
            attempt()
    threads = [Path(f"/proc/self/task/{thread}/status").read_text() for thread in os.listdir("/proc/self/task")]
    assert len(threads) == 2
    for status in threads:
        lines = dict(line.split(":", 1) for line in status.splitlines())
        assert set(lines["Uid"].split()) == {str(NOBODY.pw_uid)}
        assert set(lines["Gid"].split()) == {str(NOBODY.pw_gid)}
        assert int(lines["CapPrm"], 16) == int(lines["CapEff"], 16) == 0


@needs_root
def test_there_is_no_way_back() -> None:
    """All user and group ids, groups and capabilities are dropped in every thread, and cannot be regained."""
    in_a_child(_no_way_back)


def _a_way_back() -> None:
    import ctypes

    set_securebits, keep_caps_fixup = 28, 1 << 2  # prctl(2), SECBIT_NO_SETUID_FIXUP
    assert ctypes.CDLL(None).prctl(set_securebits, keep_caps_fixup, 0, 0, 0) == 0
    with pytest.raises(privileges.PrivilegeError, match="could regain the privileges of root"):
        privileges.drop(nobody(), _give_nothing)


@needs_root
def test_a_drop_that_leaves_a_way_back_is_an_error() -> None:
    """A drop that keeps the capabilities across setuid(2), and so could be undone, is detected."""
    in_a_child(_a_way_back)


def _not_root() -> None:
    privileges.drop(nobody(), _give_nothing)
    other = privileges.find("54321", "54321")
    assert other
    with pytest.raises(privileges.PrivilegeError, match="cannot become 54321: operation not permitted; start as root"):
        privileges.drop(other, _give_nothing)
    with pytest.raises(privileges.PrivilegeError, match="start as root"):
        privileges.open_for(other, lambda _: 0)


def _not_root_with_a_group() -> None:
    privileges.drop(nobody(), _give_nothing)
    other = privileges.find(None, "54321")
    assert other
    for attempt in (lambda: privileges.drop(other, _give_nothing), lambda: privileges.open_for(other, lambda _: 0)):
        with pytest.raises(privileges.PrivilegeError, match=r"^--group: cannot take group 54321: operation not perm"):
            attempt()


@needs_root
def test_a_group_that_cannot_be_taken_is_blamed_and_not_the_user() -> None:
    """With --group alone, the error names the option and the group."""
    in_a_child(_not_root_with_a_group)


@needs_root
def test_who_is_not_root_is_told_so() -> None:
    """Without root, the error says to start as root."""
    in_a_child(_not_root)


# -- what root opens for the user --------------------------------------------------------------------------------------


@pytest.fixture
def nobody_s(open_path: Path) -> Path:
    """A directory that belongs to nobody."""
    directory = open_path / "nobody's"
    directory.mkdir()
    os.chown(directory, NOBODY.pw_uid, NOBODY.pw_gid)
    return directory


def _open(file: Path) -> int:
    return privileges.open_for(nobody(), lambda flags: logs.open_path(str(file), flags))


def _owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


def _write_later(file: Path) -> None:
    privileges.drop(nobody(), _give_nothing)
    os.write(logs.open_path(str(file)), b"later\n")


@needs_root
@pytest.mark.parametrize("exists", [False, True])
def test_a_file_that_only_root_can_make_is_the_user_s(exists: bool, open_path: Path) -> None:
    """The user can open a log in root's directory again, whether it is new or from an earlier run as root."""
    file = open_path / "log"
    if exists:
        file.write_text("earlier\n")
        file.chmod(0o640)
    os.close(_open(file))
    assert _owner(file) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert (os.geteuid(), os.getegid()) == (0, 0)
    in_a_child(_write_later, file)
    assert file.read_text() == ("earlier\n" if exists else "") + "later\n"


@needs_root
def test_a_file_in_the_user_s_folder_is_opened_by_the_user(nobody_s: Path) -> None:
    """A file that the user can open is not changed by root."""
    os.close(_open(nobody_s / "log"))
    assert _owner(nobody_s / "log") == (NOBODY.pw_uid, NOBODY.pw_gid)


@needs_root
def test_root_gives_away_nothing_that_was_put_in_the_way(open_path: Path, nobody_s: Path) -> None:
    """A link that the user has planted is not followed, and the file of another user keeps its owner."""
    secret = open_path / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    (nobody_s / "soft").symlink_to(secret)
    (nobody_s / "dangling").symlink_to(open_path / "made by root")
    os.link(secret, nobody_s / "hard")
    another_s = open_path / "another's"
    another_s.write_text("")
    os.chown(another_s, 54321, 54321)
    for file in (nobody_s / "soft", nobody_s / "dangling", nobody_s / "hard", another_s):
        with pytest.raises(PermissionError, match="Permission denied for user nobody"):
            _open(file)
    assert _owner(secret) == (0, 0)
    assert secret.read_text() == "root's"
    assert _owner(another_s) == (54321, 54321)
    assert not (open_path / "made by root").exists()


@needs_root
def test_what_is_no_file_is_not_given_away(open_path: Path) -> None:
    """A FIFO that only root can write to is refused and keeps its owner."""
    fifo = open_path / "fifo"
    os.mkfifo(fifo, 0o600)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(PermissionError, match="for user nobody"):
        _open(fifo)
    os.close(reader)
    assert _owner(fifo) == (0, 0)


@needs_root
def test_a_device_stays_root_s() -> None:
    """log.file = "/dev/null" does not change the owner of /dev/null."""
    before = Path("/dev/null").stat()
    os.close(_open(Path("/dev/null")))
    after = Path("/dev/null").stat()
    assert (after.st_uid, stat.S_IMODE(after.st_mode)) == (before.st_uid, stat.S_IMODE(before.st_mode))


@needs_root
def test_a_socket_s_file_is_given_away_and_nothing_else(open_path: Path) -> None:
    """The file of a Unix socket is given to the user, but not a file that has replaced it."""
    path = open_path / "sock"
    (bound,) = bind.new_sockets(bind.bind_all([bind.ListenEntry(UnixAddress(str(path)))]))
    bound.change_owner(NOBODY.pw_uid, NOBODY.pw_gid)
    assert _owner(path) == (NOBODY.pw_uid, NOBODY.pw_gid)
    path.unlink()
    path.write_text("")
    bound.change_owner(NOBODY.pw_uid, NOBODY.pw_gid)
    assert _owner(path) == (0, 0)
    bound.close()
    assert path.exists()
    tcp = sockets.BoundSocket(socket.socket())
    tcp.change_owner(NOBODY.pw_uid, NOBODY.pw_gid)
    tcp.close()
