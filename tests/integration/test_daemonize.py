"""Real daemons, started as by an init script and found by their pid files."""

import contextlib
import json
import multiprocessing
import os
import pwd
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echod.process import daemonize
from tests.support.daemon import (
    DEADLINE_S,
    UNMEASURED,
    Daemon,
    Event,
    ask,
    clean_environment,
    connect,
    serving,
    settings,
)
from tests.support.gate import Gate

COMMAND = (sys.executable, "-m", "echod", "serve", "--daemon")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

NOBODY = pwd.getpwnam("nobody")


class Scene:
    """A directory with the pid file and the log of a daemon, which is ended with its test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pidfile = directory / "echod.pid"
        self.log = directory / "log"

    def arguments(self, *more: str) -> list[str]:
        """The arguments of a daemon on a free port, with its log and its pid file here."""
        listen = [] if "-l" in more else ["-l", "127.0.0.1:0"]
        return [*COMMAND, *listen, "--pidfile", str(self.pidfile), *settings(log_file=self.log), *more]

    def start(self, *more: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Start a daemon and wait for the caller's end."""
        return run(self.arguments(*more), **options)

    def begin(self, *arguments: str, more: dict[str, str]) -> "subprocess.Popen[str]":
        """Start a daemon without waiting for the caller's end."""
        environment = clean_environment() | more
        return subprocess.Popen(
            self.arguments(*arguments), env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return int(self.pidfile.read_text())

    @property
    def events(self) -> list[Event]:
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []  # the last may not be whole yet
        return [json.loads(line) for line in lines]

    def event(self, name: str) -> Event:
        found: Event = until(lambda: next((event for event in self.events if event["event"] == name), None), name)
        return found

    @property
    def port(self) -> int:
        return int(self.event("ready")["listen"][0].rpartition(":")[2])

    def stop(self) -> None:
        """Stop the daemon, and wait until it is gone."""
        stop(self.pid)

    def clean_up(self) -> None:
        """Kill a daemon that a failed test has left running."""
        with contextlib.suppress(OSError, ValueError):  # there is none
            pid = self.pid
            opened = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
            if pid != os.getpid() and str(self.pidfile) in opened:
                os.kill(pid, signal.SIGKILL)


def run(command: list[str], more: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | (more or {})
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, **options
    )


def until(look: Callable[[], Any], what: str) -> Any:
    """The first result of `look` that is not empty."""
    end = time.monotonic() + DEADLINE_S
    while not (found := look()):
        assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.01)
    return found


def stop(pid: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send the signal, and wait for the end."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, number)
        assert select.select([process], [], [], DEADLINE_S)[0], "it didn't end"
    finally:
        os.close(process)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.clean_up()


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


# -- what the caller gets ----------------------------------------------------------------------------------------------


def test_the_caller_returns_when_clients_are_served(scene: Scene) -> None:
    """The caller exits 0 without output, the next client is served, and TERM ends the daemon."""
    done = scene.start()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with connect(scene.port) as client:
        assert ask(client, b"at once\n") == b"AT ONCE\n"
    assert scene.event("ready")["pid"] == scene.pid
    scene.stop()
    assert not scene.pidfile.exists()
    assert scene.events[-1]["event"] == "stopped"
    assert scene.events[-1]["exit_status"] == 0


def test_a_daemon_has_left_everything(scene: Scene) -> None:
    """The daemon is a child of init, does not lead its session, and has /, umask 027, no core dumps and no terminal."""
    with (scene.directory / "open").open("w") as inherited:
        done = scene.start(pass_fds=[inherited.fileno()])
        assert done.returncode == 0
        pid = scene.pid
        status = status_of(pid)
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        parent, group, session, terminal = map(int, stat[1:5])
        descriptors = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
        assert parent != os.getpid()
        assert group == session != pid
        assert session != os.getsid(0)
        assert terminal == 0
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert status["Umask"] == "0027"
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        assert {descriptors[name] for name in "012"} == {os.devnull}
        assert list(descriptors.values()).count(os.devnull) == 3
        assert str(scene.directory / "open") not in descriptors.values()
    assert scene.log.stat().st_mode & 0o777 == 0o640
    scene.stop()


def test_the_caller_waits_until_then(scene: Scene) -> None:
    """The caller waits until the start has ended, here for a slow configuration file."""
    with starting(scene) as (caller, release):
        with pytest.raises(subprocess.TimeoutExpired):
            caller.wait(0.3)
        release()
        assert caller.wait(DEADLINE_S) == 0
        connect(scene.port).close()
    scene.stop()


def test_a_log_that_goes_nowhere_is_warned_of(scene: Scene) -> None:
    """Without log.file the caller prints a warning, because a daemon has no standard error, and clients are served."""
    done = scene.start(*settings(log_file=""))
    assert done.returncode == 0
    assert done.stderr == "warning: log.file is empty: a daemon has no standard error, so its log goes nowhere\n"
    scene.stop()


def test_other_warnings_reach_the_caller_too(scene: Scene) -> None:
    """The caller prints the warnings of `check`; the log has them as well."""
    done = run(["sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", *scene.arguments()])
    assert done.returncode == 0
    assert done.stderr.startswith("warning: limits.connections: only 256 open files are allowed")
    assert scene.event("configuration")["warning"] in done.stderr
    scene.stop()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed: str, scene: Scene) -> None:
    """The daemon also starts with closed standard streams, as from cron and init scripts."""
    done = run(["sh", "-c", f'exec "$@" {closed}', "sh", *scene.arguments()])
    assert (done.returncode, done.stderr) == (0, "")
    scene.stop()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--user", "nobdy"], 1, "echod: could not start: --user: no such user (got 'nobdy')\n"),
        (["--group", "nogrp"], 1, "echod: could not start: --group: no such group (got 'nogrp')\n"),
        (
            ["--pidfile", "/nowhere/pid"],
            1,
            "echod: could not start: --pidfile: /nowhere/pid: no such file or directory\n",
        ),
        (["--pidfile", "/"], 1, "echod: could not start: --pidfile: /: is a directory\n"),
        (settings(log_file="/nowhere/log"), 1, "echod: could not start: log.file: /nowhere/log: no such file or"),
        (settings(limits_connections="x"), 78, "--set: limits.connections: expected int (got 'x')\n"),
        (["-c", "/nowhere.toml"], 78, "/nowhere.toml: cannot be read: No such file or directory\n"),
        (["--pidfile", ""], 2, "expected a name (got '')\n"),
        (["--bogus"], 2, "unrecognized arguments: --bogus\n"),
    ],
)
def test_an_error_reaches_the_caller(arguments: list[str], status: int, words: str, scene: Scene) -> None:
    """The caller prints any error of the start, also one after the fork, and exits with its status."""
    done = scene.start(*arguments)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert not scene.pidfile.exists()


def test_a_taken_port_reaches_the_caller(scene: Scene) -> None:
    """The caller names every address that cannot be bound; no file is left behind."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        addresses = [f"127.0.0.1:{taken.getsockname()[1]}" for taken in (first, second)]
        done = scene.start("-l", addresses[0], "-l", addresses[1])
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line.partition(": address already in use")[0] for line in lines] == [
        f"echod: could not start: listen: {address}" for address in addresses
    ]
    assert not scene.pidfile.exists()


def test_a_second_one_is_refused(scene: Scene) -> None:
    """The second caller names the first daemon's pid and exits 1; the first daemon and its pid file are unaffected."""
    assert scene.start().returncode == 0
    pid = scene.pid
    done = scene.start()
    assert done.returncode == 1
    assert done.stderr == f"echod: could not start: --pidfile: {scene.pidfile}: already running, pid {pid}\n"
    assert scene.pid == pid
    with connect(scene.port) as client:
        assert ask(client, b"still here\n") == b"STILL HERE\n"
    scene.stop()


def test_a_stale_pid_file_is_no_obstacle(scene: Scene) -> None:
    """A daemon starts if the pid file is stale: of a killed daemon, with the pid of another program, or empty."""
    assert scene.start().returncode == 0
    stop(scene.pid, signal.SIGKILL)
    killed = scene.pid
    for stale in (None, f"{os.getpid()}\n", ""):
        if stale is not None:
            scene.pidfile.write_text(stale)
        assert scene.start().returncode == 0
        assert scene.pid not in (killed, os.getpid())
        scene.stop()
        assert not scene.pidfile.exists()


@contextlib.contextmanager
def starting(scene: Scene) -> Iterator[tuple["subprocess.Popen[str]", Callable[[], None]]]:
    """A caller that waits for a daemon that reads its configuration, and a function that lets the daemon continue."""
    gate, file = Gate(scene.directory / "gate"), scene.directory / "echod.toml"
    file.write_text("[limits]\nconnections = 7\n")
    gate.shut()
    with scene.begin("-c", str(file), more=gate.environment) as caller:
        yield caller, gate.wait()


def test_a_daemon_that_dies_without_a_word(scene: Scene) -> None:
    """If the daemon is killed before it serves, the caller says that it ended without a report, and exits 1."""
    with starting(scene) as (caller, release):
        stop(scene.pid, signal.SIGKILL)
        assert caller.wait(DEADLINE_S) == 1
        release()
        assert caller.stderr
        assert caller.stderr.read() == daemonize.SILENT_END


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_caller_that_gives_up_calls_the_start_off(number: signal.Signals, scene: Scene) -> None:
    """TERM or Ctrl-C ends the waiting caller as any other command, and the daemon ends too."""
    with starting(scene) as (caller, release):
        process = os.pidfd_open(scene.pid)
        caller.send_signal(number)
        assert caller.wait(DEADLINE_S) == -number
        release()
        assert select.select([process], [], [], DEADLINE_S)[0], "it stayed"
        os.close(process)
    assert [event["event"] for event in scene.events if event["level"] == "warning"] == ["start called off"]
    assert scene.events[-1]["event"] == "stopped"
    assert not scene.pidfile.exists()


def test_a_terminal_that_hangs_up_does_not_end_the_start(scene: Scene) -> None:
    """HUP, USR1 and USR2 do not end a waiting caller, because a lost terminal must not stop a start."""
    with starting(scene) as (caller, release):
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            caller.send_signal(number)
        release()
        assert caller.wait(DEADLINE_S) == 0
    scene.stop()


def test_a_stop_during_the_start_is_followed(scene: Scene) -> None:
    """TERM ends a daemon that is still starting, and its caller reports that."""
    with starting(scene) as (caller, release):
        process = os.pidfd_open(scene.pid)
        signal.pidfd_send_signal(process, signal.SIGTERM)
        release()
        assert select.select([process], [], [], DEADLINE_S)[0], "it stayed"
        os.close(process)
        assert caller.wait(DEADLINE_S) in (0, 1)
    assert not scene.pidfile.exists()


def _detach_with_room_for(processes: int, report: str) -> None:
    import daemon.daemon  # noqa: F401 (the user can't read it)

    os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT), 2)
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    os.setresuid(54_000 + processes, 54_000 + processes, 54_000 + processes)
    daemonize.detach(lambda: None, silent_end=9)


@needs_root
@pytest.mark.parametrize(
    ("processes", "words"), [(1, daemonize.SILENT_END), (2, "could not start: Failed second fork")]
)
def test_no_room_for_a_process(processes: int, words: str, tmp_path: Path) -> None:
    """Whichever fork fails, the caller reports it and exits 1."""
    report = tmp_path / "stderr"
    child = multiprocessing.get_context("spawn").Process(target=_detach_with_room_for, args=(processes, str(report)))
    child.start()
    child.join(DEADLINE_S)
    assert child.exitcode == 9
    assert words in report.read_text()


def _detach_with_an_error() -> None:
    def fail() -> None:
        raise OSError

    daemonize.detach(fail, silent_end=9)


def test_a_caller_with_an_error_of_its_own_does_not_say_that_all_is_well() -> None:
    """The caller exits 0 only if clients are served, whatever happens to it while it waits."""
    child = multiprocessing.get_context("spawn").Process(target=_detach_with_an_error)
    child.start()
    child.join(DEADLINE_S)
    assert child.exitcode == 9


# -- paths and logs ----------------------------------------------------------------------------------------------------


def test_relative_paths_are_meant_from_where_it_was_called(scene: Scene) -> None:
    """-c, --pidfile and log.file stay relative to the caller's directory, also at a reload."""
    file = scene.directory / "echod.toml"
    file.write_text('[log]\nfile = "log"\n')
    arguments = ["-l", "127.0.0.1:0", "-c", "echod.toml", "--pidfile", "echod.pid"]
    done = run([*COMMAND, *arguments], cwd=scene.directory)
    assert (done.returncode, done.stderr) == (0, "")
    file.write_text('[log]\nfile = "later"\n')
    os.kill(scene.pid, signal.SIGHUP)
    scene.log = scene.directory / "later"
    assert scene.event("reload applied")["changed"] == ["log.file"]
    scene.stop()
    assert not scene.pidfile.exists()


def test_relative_path_in_the_variable(scene: Scene) -> None:
    """ECHOD_CONFIG names a file as -c does."""
    (scene.directory / "echod.toml").write_text("[limits]\nconnections = 0\n")
    done = scene.start(more={"ECHOD_CONFIG": "echod.toml"}, cwd=scene.directory)
    assert done.returncode == 78
    assert f"{scene.directory}/echod.toml: limits.connections" in done.stderr


def test_the_log_is_reopened_as_logrotate_expects(scene: Scene) -> None:
    """After the file was renamed, HUP makes a new one."""
    assert scene.start().returncode == 0
    scene.log.rename(scene.directory / "log.1")
    os.kill(scene.pid, signal.SIGHUP)
    scene.event("reload applied")
    assert '"ready"' in (scene.directory / "log.1").read_text()
    scene.stop()


# -- another user ------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_scene(open_path: Path) -> Iterator[Scene]:
    """A scene in a directory of root that everyone can read."""
    scene = Scene(open_path)
    yield scene
    scene.clean_up()


@needs_root
def test_root_binds_a_low_port_and_is_nobody_from_then_on(open_scene: Scene) -> None:
    """Port 7 and a log in root's directory, served by nobody: every thread, every group, no capability."""
    address = f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.7:7"
    done = open_scene.start("--user", "nobody", "-l", address, more=UNMEASURED)
    assert (done.returncode, done.stderr) == (0, "")
    with socket.create_connection((address.partition(":")[0], 7), DEADLINE_S) as client:
        assert ask(client, b"low\n") == b"LOW\n"
    pid = open_scene.pid
    groups = set(map(str, os.getgrouplist("nobody", NOBODY.pw_gid)))
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    assert len(threads) > 1
    for status in map(status_of, threads):
        assert set(status["Uid"].split()) == {str(NOBODY.pw_uid)}
        assert set(status["Gid"].split()) == {str(NOBODY.pw_gid)}
        assert set(status["Groups"].split()) == groups
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == int(status["CapAmb"], 16) == 0
    (limit,) = (line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "open files" in line)
    assert limit.split()[3] == limit.split()[4], "raised before the privileges were dropped"
    os.kill(pid, signal.SIGHUP)
    assert open_scene.event("reload applied")["listen"] == [address], "the port is kept"
    open_scene.stop()
    assert open_scene.pidfile.read_text() == "", "nobody can't remove a file from root's folder"
    assert open_scene.start().returncode == 0, "and an empty one is no obstacle"
    open_scene.stop()


@needs_root
def test_the_group_is_the_one_asked_for(open_scene: Scene) -> None:
    """--group instead of the user's own; both can be numbers that nobody has named."""
    assert open_scene.start("--user", "54321", "--group", "54322", more=UNMEASURED).returncode == 0
    status = status_of(open_scene.pid)
    assert set(status["Uid"].split()) == {"54321"}
    assert set(status["Gid"].split()) == {"54322"}
    assert status["Groups"] == "54322"
    open_scene.stop()


@needs_root
def test_logrotate_after_the_drop(open_scene: Scene) -> None:
    """In root's directory logrotate's `create` gives the new file to the old one's owner, and HUP opens it."""
    assert open_scene.start("--user", "nobody", more=UNMEASURED).returncode == 0
    owner = open_scene.log.stat()
    open_scene.log.rename(open_scene.directory / "log.1")
    open_scene.log.touch(0o640)
    os.chown(open_scene.log, owner.st_uid, owner.st_gid)
    os.kill(open_scene.pid, signal.SIGHUP)
    open_scene.event("reload applied")
    open_scene.stop()


@needs_root
def test_logrotate_without_create_in_root_s_folder(open_scene: Scene) -> None:
    """Nobody can make a file there: the reload is refused with the reason, and the log goes on where it was."""
    assert open_scene.start("--user", "nobody", more=UNMEASURED).returncode == 0
    rotated = open_scene.directory / "log.1"
    open_scene.log.rename(rotated)
    os.kill(open_scene.pid, signal.SIGHUP)
    open_scene.log = rotated
    assert open_scene.event("reload refused")["errors"] == [f"log.file: {open_scene.directory}/log: permission denied"]
    open_scene.stop()


@needs_root
def test_in_a_folder_of_its_own_a_user_leaves_nothing(open_scene: Scene) -> None:
    """Pid file, log and Unix socket in the user's directory: rotated, reloaded and removed by the user."""
    home = open_scene.directory / "home"
    home.mkdir()
    os.chown(home, NOBODY.pw_uid, NOBODY.pw_gid)
    scene = Scene(home)
    config = home / "echod.toml"
    template = f'listen = [{{address = "unix:{home}/%s"}}]\nlog.file = "{scene.log}"\n%s'
    config.write_text(template % ("a", ""))
    command = [*COMMAND, "--user", "nobody", "-c", str(config), "--pidfile", str(scene.pidfile)]
    try:
        done = run(command, more=UNMEASURED)
        assert (done.returncode, done.stderr) == (0, "")
        assert (home / "a").stat().st_uid == scene.log.stat().st_uid == NOBODY.pw_uid
        scene.log.rename(home / "log.1")
        config.write_text(template % ("b", ""))
        os.kill(scene.pid, signal.SIGHUP)
        assert scene.event("reload applied")["changed"] == ["listen"]
        assert not (home / "a").exists()
        config.write_text(template % ("b", "limits.conection = 1"))
        os.kill(scene.pid, signal.SIGHUP)
        assert "did you mean limits.connections" in scene.event("reload refused")["errors"][0]
        scene.stop()
        assert sorted(os.listdir(home)) == ["echod.toml", "log", "log.1"]
    finally:
        scene.clean_up()


@needs_root
def test_an_error_of_the_drop_reaches_the_caller(open_scene: Scene) -> None:
    """What the user may not do is an error of the start: here his log would be a link to root's file."""
    secret = open_scene.directory / "secret"
    secret.touch(0o600)
    open_scene.log.symlink_to(secret)
    done = open_scene.start("--user", "nobody", more=UNMEASURED)
    assert done.returncode == 1
    assert "log.file: " in done.stderr
    assert "permission denied for user nobody" in done.stderr
    assert secret.stat().st_uid == 0


# -- in the foreground -------------------------------------------------------------------------------------------------


def test_a_pid_file_in_the_foreground(tmp_path: Path) -> None:
    """--pidfile without --daemon, as under other supervisors: its own pid, a second one refused, removed at the end."""
    path = tmp_path / "pid"
    with serving("--pidfile", str(path)) as first:
        assert path.read_text() == f"{first.pid}\n"
        with Daemon("-l", "127.0.0.1:0", "--pidfile", str(path)) as second:
            assert second.process.wait(DEADLINE_S) == 1
        assert second.other_lines == [f"echod: could not start: --pidfile: {path}: already running, pid {first.pid}\n"]
        assert first.stop() == 0
    assert not path.exists()


def test_a_start_that_fails_leaves_no_pid_file(tmp_path: Path) -> None:
    """A start that fails after it has written the pid file removes it."""
    path = tmp_path / "pid"
    with Daemon("--pidfile", str(path), *settings(log_file="/nowhere/log")) as failed:
        assert failed.process.wait(DEADLINE_S) == 1
    assert not path.exists()


@needs_root
def test_another_user_in_the_foreground() -> None:
    """--user without --daemon."""
    with serving("--user", "nobody", environment=UNMEASURED) as echod:
        assert set(status_of(echod.pid)["Uid"].split()) == {str(NOBODY.pw_uid)}
        with connect(echod.port) as client:
            assert ask(client, b"who\n") == b"WHO\n"
        assert echod.stats()["open_files"] > 0
        assert echod.reload("reload applied")
        assert echod.stop() == 0
