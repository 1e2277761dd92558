"""A log that can't be written: its reader is stuck or gone, its disk is full, its directory was removed."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from echod.telemetry.log_writer import QUEUED_LINES
from tests.faults.measurements import Figures, scene
from tests.integration.test_admin_endpoint import get
from tests.integration.test_admin_endpoint import reload as http_reload
from tests.support.clients import Tally, come_and_go
from tests.support.daemon import DEADLINE_S, Daemon, Event, connect, send_until_stuck, serving, settings

pytestmark = pytest.mark.timeout(120)

VISITORS = 8
"""Short-lived clients, each of which causes a log line, until the end of the drain."""

ON_THE_WAY = 2000
"""More lines than pipe, reader and writer can hold together: up to 128 KiB each, 190 bytes a line."""

ROOM = 64 * 1024
"""Bytes left on a disk that is about to be full."""

DRAIN_S = 2.0

STOP_S = DRAIN_S + 3
"""Longest stop: a whole drain, the final half-close of 1 s, the log 1 s, and a margin."""

OPTIONS = ("--log-level", "debug", *settings(timeouts_drain=DRAIN_S, timeouts_drain_quiet=1))

WITHOUT_PRIVILEGE = () if os.getuid() else ("setpriv", "--bounding-set=-dac_override")
"""Whether permissions apply to this user."""

Report = Callable[[Figures], None]
Reader = subprocess.Popen[bytes]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration file, whose listeners never change."""
    file = tmp_path / "echod.toml"
    file.touch()
    return file


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", directory]).returncode:
        pytest.skip("no disk can be mounted here")
    yield directory
    subprocess.run(["umount", directory], check=True)


@contextlib.contextmanager
def reading(config: Path) -> Iterator[tuple[Daemon, Reader, Tally]]:
    """An echod with short-lived clients, whose log goes through a reader that can be stopped and killed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        with serving("-l", "127.0.0.1:0", "-c", str(config), *OPTIONS, through=reader) as echod:
            try:
                with visited(echod) as tally:
                    yield echod, reader, tally
            finally:
                reader.kill()  # it would keep the log open


@contextlib.contextmanager
def visited(echod: Daemon) -> Iterator[Tally]:
    """Run short-lived clients until the port is closed, and assert that all are served."""
    tally = Tally()
    thread = threading.Thread(target=asyncio.run, args=(_visit(f"127.0.0.1:{echod.port}", tally),), daemon=True)
    thread.start()
    yield tally
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert tally.complaints == []
    assert tally.refused == VISITORS


async def _visit(address: str, tally: Tally) -> None:
    await asyncio.gather(*(come_and_go(address, tally) for _ in range(VISITORS)))


def _wait_for_visits(tally: Tally, count: int) -> None:
    wanted = tally.served + count
    _wait_until(lambda: tally.served >= wanted, f"{wanted - tally.served} more visits; {tally.complaints[:3]}")


def _wait_until(claim: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 2 * DEADLINE_S
    while not claim():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


def _stall(reader: Reader, tally: Tally) -> None:
    """Stop the reader, and wait until its pipe and the queue of the writer are full."""
    reader.send_signal(signal.SIGSTOP)
    _wait_for_visits(tally, QUEUED_LINES + ON_THE_WAY)


def _stopped(echod: Daemon) -> tuple[int, float]:
    """Stop the daemon while its log is stuck; return the exit status and the seconds it took."""
    began = time.monotonic()
    echod.send(signal.SIGTERM)
    return echod.process.wait(DEADLINE_S), time.monotonic() - began


def _log_to(place: str, config: Path, echod: Daemon) -> None:
    config.write_text(f"[log]\nfile = '{place}'\n")
    echod.send(signal.SIGHUP)


def _wait_for(event: str, log: Path) -> Event:
    """Wait for an event with this name in a log file, and return the last one."""
    mark = f'"event":"{event}"'.encode()
    _wait_until(lambda: log.exists() and mark in log.read_bytes().rpartition(b"\n")[0], event)
    return _named(event, _logged(log))[-1]


def _logged(log: Path) -> list[Event]:
    """Return the events in a log file, without lines torn by a full disk."""
    events = []
    for line in log.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def _named(name: str, events: list[Event]) -> list[Event]:
    return [event for event in events if event["event"] == name]


def _closed(events: list[Event]) -> int:
    return len(_named("connection closed", events))


def _unlogged(stats: Event, events: list[Event]) -> int:
    """Return the number of closed connections at the event `stats` that were not logged before it."""
    closed: int = sum(stats["connections"]["closed"].values())
    return closed - _closed(events[: events.index(stats)])


# -- the reader --------------------------------------------------------------------------------------------------------


def test_a_log_reader_that_pauses_loses_only_counted_events(config: Path, report: Report) -> None:
    """While the reader stands still for 10 000 connections, each event is logged later or counted as lost."""
    with reading(config) as (echod, reader, tally):
        with scene("log reader stops, goes on", echod) as it:
            _stall(reader, tally)
            known = len(echod.events)
            reader.send_signal(signal.SIGCONT)
            _wait_until(lambda: len(echod.events) > known + QUEUED_LINES // 2, "what was queued")
            stats = echod.stats()
        it.notes |= {"visits": tally.served, "log_dropped": stats["log_dropped"]}
        report(it.row())
        assert echod.stop() == 0
    assert _unlogged(stats, echod.events) == stats["log_dropped"] > 0
    it.assert_bystander_unaffected()


def test_a_reload_turns_the_log_away_from_a_stuck_reader(config: Path, tmp_path: Path, report: Report) -> None:
    """While the reader is stuck, a reload sends the log to a file; a stop does not wait for the reader."""
    log = tmp_path / "log"
    with reading(config) as (echod, reader, tally):
        with scene("log reader stuck, log sent to a file", echod) as it:
            _stall(reader, tally)
            _log_to(str(log), config, echod)
            assert _wait_for("reload applied", log)["changed"] == ["log.file"]
            echod.send(signal.SIGUSR1)
            stats = _wait_for("stats", log)
            _wait_for_visits(tally, 1000)
        status, seconds = _stopped(echod)
        it.notes |= {"log_dropped": stats["log_dropped"], "exit status": status, "stop took s": round(seconds, 1)}
        report(it.row())
    events = _logged(log)
    assert (status, events[-1]["event"], events[-1]["exit_status"]) == (0, "stopped", 0)
    assert seconds < STOP_S
    assert stats["log_dropped"] > 0
    closed = sum(stats["connections"]["closed"].values())
    assert closed + _closed(events[events.index(stats) :]) == tally.served + 1, "the bystander is the last one"
    it.assert_bystander_unaffected()


def test_a_killed_log_reader_loses_only_what_it_held(config: Path, tmp_path: Path, report: Report) -> None:
    """When the stuck reader is killed, what it held is lost; every other event is logged or counted as lost."""
    log = tmp_path / "log"
    with reading(config) as (echod, reader, tally):
        with scene("log reader stuck, killed", echod) as it:
            _stall(reader, tally)
            reader.kill()
            _wait_for_visits(tally, 1000)
            _log_to(str(log), config, echod)
            _wait_for("reload applied", log)
            echod.send(signal.SIGUSR1)
            stats = _wait_for("stats", log)
        status, seconds = _stopped(echod)
        it.notes |= {"log_dropped": stats["log_dropped"], "exit status": status, "stop took s": round(seconds, 1)}
        report(it.row())
    events = [*echod.events, *_logged(log)]
    assert (status, events[-1]["event"]) == (0, "stopped")
    assert seconds < STOP_S
    assert stats["log_dropped"] > QUEUED_LINES, "the queue had no reader"
    assert 0 <= _unlogged(stats, events) - stats["log_dropped"] < ON_THE_WAY
    it.assert_bystander_unaffected()


@pytest.mark.parametrize("owed", [False, True])
def test_a_stop_with_a_stuck_log_reader_is_in_time(owed: bool, config: Path, report: Report) -> None:
    """With pipe and queue full, TERM drains in time, and the exit status tells whether a client was aborted."""
    with reading(config) as (echod, reader, tally), contextlib.ExitStack() as clients:
        with scene(f"log reader stuck, stop, {'one' if owed else 'no'} client aborted", echod) as it:
            _stall(reader, tally)
        if owed:
            send_until_stuck(clients.enter_context(connect(echod.port, receive_buffer=4096)))
        status, seconds = _stopped(echod)
        it.notes |= {"exit status": status, "stop took s": round(seconds, 1)}
        report(it.row())
    assert status == (3 if owed else 0)
    assert seconds < STOP_S
    it.assert_bystander_unaffected()


@pytest.mark.parametrize("is_file", [False, True])
def test_reloads_with_a_stuck_reader_leak_nothing(is_file: bool, config: Path, tmp_path: Path, report: Report) -> None:
    """60 reloads of a log that nobody reads are all applied, and leak no thread or descriptor."""
    fifo, admin = tmp_path / "fifo", f"unix:{tmp_path}/admin"
    os.mkfifo(fifo)
    reading_end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # and never reads
    endpoint = f"[admin]\nlisten = '{admin}'\n"
    config.write_text(endpoint)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        with serving("-l", "127.0.0.1:0", "-c", str(config), *OPTIONS, through=reader) as echod:
            try:
                config.write_text(endpoint + (f"[log]\nfile = '{fifo}'\n" if is_file else ""))
                known = _reload(admin)
                reader.send_signal(signal.SIGSTOP)
                _fill(f"/proc/{echod.pid}/fd/2")
                _fill(str(fifo))
                threads, descriptors = _tasks(echod.pid), len(os.listdir(f"/proc/{echod.pid}/fd"))
                for number in range(60):
                    echod.send(signal.SIGHUP)
                    assert _reload(admin) > known + number
                assert _tasks(echod.pid) <= threads
                assert len(os.listdir(f"/proc/{echod.pid}/fd")) <= descriptors + 2
                status, seconds = _stopped(echod)
            finally:
                reader.kill()
                os.close(reading_end)
        report({"fault": "60 reloads, log stuck", "threads": threads, "exit status": status, "stop took s": seconds})
    assert status == 0
    assert seconds < STOP_S


def _reload(admin: str) -> int:
    """Reload, and return the number of applied reloads."""
    assert http_reload(admin).status == 200
    applied: int = get(admin, "/stats").content["reloads"]["applied"]
    return applied


def _tasks(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _fill(pipe: str) -> None:
    descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x" * 4096)
    os.close(descriptor)


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_a_log_on_a_full_device_is_counted_as_lost(config: Path, report: Report) -> None:
    """With `log.file` on /dev/full each event is counted as lost, until a reload names another file; a stop works."""
    with serving("-l", "127.0.0.1:0", "-c", str(config), *OPTIONS) as echod, visited(echod) as tally:
        with scene("log to /dev/full", echod) as it:
            _log_to_full(config, echod)
            _wait_for_visits(tally, 5000)
            config.write_text("")
            echod.reload("reload applied")
            stats = echod.stats()
        _log_to_full(config, echod)
        status, seconds = _stopped(echod)
        it.notes |= {"log_dropped": stats["log_dropped"], "exit status": status, "stop took s": round(seconds, 1)}
        report(it.row())
    reloads = ["reload applied", "reload started"]  # from here to /dev/full and back
    assert _unlogged(stats, echod.events) + len(reloads) == stats["log_dropped"] > 5000
    assert status == 0
    assert seconds < STOP_S
    it.assert_bystander_unaffected()


def _log_to_full(config: Path, echod: Daemon) -> None:
    _log_to("/dev/full", config, echod)
    _wait_until(lambda: "/dev/full" in _open_files(echod.pid), "the reload")


def _open_files(pid: int) -> set[str]:
    names = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed by now
            names.add(os.readlink(entry.path))
    return names


def test_a_log_continues_after_a_full_disk(disk: Path, config: Path, report: Report) -> None:
    """While the disk is full events are counted as lost, and complete lines follow once there is room."""
    log, ballast = disk / "log", disk / "ballast"
    with serving("-l", "127.0.0.1:0", "-c", str(config), *OPTIONS) as echod, visited(echod) as tally:
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * os.sysconf("SC_PAGESIZE") - ROOM)
        with scene("log's disk full for a while", echod) as it:
            _log_to(str(log), config, echod)
            _wait_for("reload applied", log)
            _wait_until(lambda: os.statvfs(disk).f_bavail == 0, "the disk to be full")
            _wait_for_visits(tally, 5000)
            full = log.stat().st_size
            ballast.unlink()
            _wait_until(lambda: log.stat().st_size > full + ROOM, "the log to go on")
            echod.send(signal.SIGUSR1)
            stats = _wait_for("stats", log)
        status, seconds = _stopped(echod)
        it.notes |= {"log_dropped": stats["log_dropped"], "exit status": status, "stop took s": round(seconds, 1)}
        report(it.row())
    events = _logged(log)
    assert (status, events[-1]["event"]) == (0, "stopped")
    assert _unlogged(stats, [*echod.events, *events]) == stats["log_dropped"] > 4000
    assert len(log.read_bytes().splitlines()) == len(events) + 1, "one line was torn when the disk was full"
    it.assert_bystander_unaffected()


# -- the directory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["vanished", "read-only"])
def test_a_log_that_can_t_be_reopened_is_kept_open(what: str, config: Path, tmp_path: Path, report: Report) -> None:
    """A reload that can't reopen the log is refused; the old file is used on, and no event is lost."""
    directory, old = tmp_path / "directory", tmp_path / "old"
    log = directory / "log"
    directory.mkdir()
    command = (*WITHOUT_PRIVILEGE, sys.executable, "-m", "echod")
    with serving("-l", "127.0.0.1:0", "-c", str(config), *OPTIONS, command=command) as echod, visited(echod) as tally:
        _log_to(str(log), config, echod)
        _wait_for("reload applied", log)
        with scene(f"log's directory {what}", echod) as it:
            with _spoiled(directory, old, what) as fault:
                echod.send(signal.SIGHUP)
                assert _wait_for("reload refused", old)["errors"] == [f"log.file: {log}: {fault}"]
                _wait_for_visits(tally, 2000)
            echod.send(signal.SIGHUP)
            _wait_for("reload applied", log)
            echod.send(signal.SIGUSR1)
            stats = _wait_for("stats", log)
        status, _ = _stopped(echod)
        it.notes |= {"log_dropped": stats["log_dropped"], "exit status": status}
        report(it.row())
    events = [*echod.events, *_logged(old), *_logged(log)]
    assert (status, events[-1]["event"]) == (0, "stopped")
    assert _unlogged(stats, events) == stats["log_dropped"] == 0
    it.assert_bystander_unaffected()


@contextlib.contextmanager
def _spoiled(directory: Path, old: Path, what: str) -> Iterator[str]:
    """Remove the log and its directory; return the expected error."""
    (directory / "log").rename(old)
    if what == "vanished":
        directory.rmdir()
        yield "no such file or directory"
        directory.mkdir()
    else:
        directory.chmod(0o500)
        yield "permission denied"
        directory.chmod(0o700)
