"""Unusual surroundings of a process lead to a default or to a plain error, never to a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_admin_endpoint import get
from tests.integration.test_daemonize import stop
from tests.support.daemon import DEADLINE_S, Daemon, ask, clean_environment, connect, serving

ECHOD = (sys.executable, "-m", "echod")

WITHOUT_PROC = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")


def _can_hide_proc() -> bool:
    try:
        return subprocess.run([*WITHOUT_PROC, "true"], capture_output=True, timeout=DEADLINE_S).returncode == 0
    except FileNotFoundError:
        return False


# -- a working directory that was deleted ------------------------------------------------------------------------------

DELETED = ("sh", "-c", 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"')


def in_deleted_directory(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*DELETED, str(directory), *ECHOD, *arguments],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def test_a_working_directory_that_was_deleted(tmp_path: Path) -> None:
    """Without relative paths nobody needs it: clients are served, and a reload and an upgrade succeed."""
    with serving(command=(*DELETED, str(tmp_path / "gone"), *ECHOD)) as echod, connect(echod.port) as client:
        assert ask(client, b"here\n") == b"HERE\n"
        echod.reload("reload applied")
        echod.send(signal.SIGUSR2)
        echod.wait_for("upgrade done")
        assert ask(client, b"still\n") == b"STILL\n"
        client.close()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("-c", "x"), 78, "/(deleted working directory)/x: cannot be read: No such file or directory"),
        (
            ("--pidfile", "x"),
            1,
            "echod: could not start: --pidfile: /(deleted working directory)/x: no such file or directory",
        ),
        (
            ("--set", "log.file=x"),
            1,
            "echod: could not start: log.file: /(deleted working directory)/x: no such file or directory",
        ),
    ],
)
@pytest.mark.parametrize("more", [(), ("--daemon",)])
def test_a_relative_path_in_a_deleted_directory(
    arguments: tuple[str, ...], status: int, words: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    """The error names the path, and no other directory is searched."""
    done = in_deleted_directory(tmp_path / "gone", "serve", "-l", "127.0.0.1:0", *arguments, *more)
    assert (done.returncode, done.stderr) == (status, f"{words}\n")


# -- no /proc ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not _can_hide_proc(), reason="needs the right to mount")
def test_without_proc(tmp_path: Path) -> None:
    """Without /proc some statistics are unknown; everything else works, including an upgrade."""
    admin = f"unix:{tmp_path}/admin"
    arguments = ("-l", f"unix:{tmp_path}/sock", "--set", f"admin.listen={admin}")
    with serving("-l", "127.0.0.1:0", *arguments, command=(*WITHOUT_PROC, *ECHOD)) as echod:
        port = int(echod.wait_for("ready")["listen"][0].rpartition(":")[2])
        with connect(port) as client:
            assert ask(client, b"here\n") == b"HERE\n"
            for upgrades in (0, 1):
                stats = get(admin, "/stats").content
                assert (stats["rss_bytes"], stats["open_files"], stats["upgrades"]) == (None, None, upgrades)
                assert echod.stats()["rss_bytes"] is None
                assert b"echod_open_files" not in get(admin, "/metrics").body
                echod.reload("reload applied")
                if not upgrades:
                    echod.send(signal.SIGUSR2)
                    echod.wait_for("upgrade done")
            assert ask(client, b"still\n") == b"STILL\n"
            client.close()


@pytest.mark.skipif(not _can_hide_proc(), reason="needs the right to mount")
def test_a_unix_socket_of_another_user_without_proc(tmp_path: Path) -> None:
    """Without /proc its file cannot be given to another user without a race, so the start is refused."""
    arguments = ("-l", f"unix:{tmp_path}/sock", "--user", "nobody")
    with Daemon(*arguments, command=(*WITHOUT_PROC, *ECHOD)) as echod:
        assert echod.process.wait(DEADLINE_S) == 1
    assert "the owner of a unix socket cannot be changed without /proc" in echod.other_lines[0]
    assert os.listdir(tmp_path) == []


# -- ECHOD_HANDOVER ----------------------------------------------------------------------------------------------------


def test_an_empty_handover_is_ignored(tmp_path: Path) -> None:
    """An empty variable changes nothing: --daemon detaches."""
    path = tmp_path / "pid"
    done = subprocess.run(
        [*ECHOD, "serve", "--daemon", "-l", "127.0.0.1:0", "--pidfile", str(path)],
        env=clean_environment() | {"ECHOD_HANDOVER": ""},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    stop(int(path.read_text()))
    assert done.returncode == 0


@pytest.mark.parametrize("said", ["x", "-1", "2", "250", "1e3", "99999999999999999999", "9" * 5000])
@pytest.mark.parametrize("command", ["serve", pytest.param("preflight", marks=pytest.mark.full)])
def test_a_wrong_handover_is_an_error(said: str, command: str) -> None:
    """A wrong value leads to a plain error, on a standard error that is still open."""
    done = subprocess.run(
        [*ECHOD, *{"serve": ["serve"], "preflight": ["preflight", "serve"]}[command], "-l", "127.0.0.1:0"],
        env=clean_environment() | {"ECHOD_HANDOVER": said},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 1
    assert done.stderr == f"echod: could not start: ECHOD_HANDOVER: no state there (got {said!r})\n"
