"""Rare moments that once went wrong, or could: none of them may harm a client or mislead the operator."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon import (
    DEADLINE_S,
    Daemon,
    ask,
    clean_environment,
    connect,
    connect_once_open,
    free_port,
    leave_descriptors,
    read_line,
    read_to_end,
    send_until_stuck,
    serving,
    settings,
    with_constants,
)

NOTHING_LEFT = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


def test_without_a_descriptor_left_stats_and_stop_work() -> None:
    """With all descriptors used, USR1 still dumps the statistics and TERM drains without a reset."""
    with serving(*settings(timeouts_drain_quiet=0.1)) as echod, connect(echod.port) as client:
        assert ask(client, b"hello\n") == b"HELLO\n"
        leave_descriptors(echod.pid, 0)
        assert echod.stats()["rss_bytes"] > 1_000_000
        assert ask(client, b"still\n") == b"STILL\n"
        echod.send(signal.SIGTERM)
        assert read_to_end(client) == b""
        client.close()
        assert echod.exit_status() == 0


def test_a_refused_reload_leaks_no_descriptor(tmp_path: Path) -> None:
    """Whatever fails, the old configuration stays in force, and no descriptor or socket file is left."""
    file, log = tmp_path / "echod.toml", tmp_path / "log"
    file.write_text("[[listen]]\naddress = '127.0.0.1:0'\n")
    with socket.create_server(("127.0.0.1", 0)) as taken, serving("-c", str(file)) as echod:
        before = echod.stats()["open_files"]
        file.write_text(
            f"[[listen]]\naddress = 'unix:{tmp_path}/sock'\n[[listen]]\n"
            f"address = '127.0.0.1:{taken.getsockname()[1]}'\n[log]\nfile = '{log}'\n"
        )
        for _ in range(20):
            assert "address already in use" in echod.reload("reload refused")["errors"][0]
        assert echod.stats()["open_files"] == before
        assert not (tmp_path / "sock").exists()


def test_a_log_file_that_is_a_fifo_without_a_reader_is_refused(tmp_path: Path) -> None:
    """A log that cannot be opened at once is an error, and later reloads work."""
    file, fifo = tmp_path / "echod.toml", tmp_path / "fifo"
    os.mkfifo(fifo)
    file.write_text("[[listen]]\naddress = '127.0.0.1:0'\n")
    with serving("-c", str(file)) as echod:
        good = file.read_text()
        file.write_text(f"{good}[log]\nfile = '{fifo}'\n")
        assert echod.reload("reload refused")["errors"] == [f"log.file: {fifo}: no such device or address"]
        file.write_text(good)
        echod.reload("reload applied")


def _as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _as_deep_key(path: Path) -> None:
    path.write_text(f"limits{'.a' * 20_000} = 1\n")


def _as_long_number(path: Path) -> None:
    path.write_text(f"limits.connections = 0x{'f' * 5_000}\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_as_fifo, "cannot be read: a pipe, expected a regular file"),
        (_as_device, "cannot be read: a device, expected a regular file"),
        (_as_deep_key, "a key has more than 100 parts (at line 1)"),
        (
            _as_long_number,
            "limits.connections: expected int <= 1000000 (got a value too long or nested too deep to show)",
        ),
    ],
)
def test_a_configuration_that_would_block_or_break_a_reload(
    spoil: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    """Reload and upgrade are refused at once with the reason, clients are served, and a good file is accepted again."""
    file = tmp_path / "echod.toml"
    file.write_text("[[listen]]\naddress = '127.0.0.1:0'\n")
    with serving("-c", str(file)) as echod, connect(echod.port) as client:
        good = file.read_bytes()
        spoil(file)
        assert echod.reload("reload refused")["errors"] == [f"{file}: {words}"]
        known = len(echod.events)
        echod.send(signal.SIGUSR2)
        assert echod.wait_for("upgrade refused", after=known)["errors"] == [f"{file}: {words}"]
        for command in ("serve", "check"):
            done = subprocess.run(
                [sys.executable, "-m", "echod", command, "-c", str(file), "--log-level", "loud"],
                env=clean_environment(),
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
            )
            assert done.returncode == 78
            assert done.stderr.splitlines() == [
                f"{file}: {words}",
                "--log-level: log.level: expected one of debug, info, warning, error (got 'loud')",
            ]
        assert ask(client, b"still here\n") == b"STILL HERE\n"
        file.unlink()
        file.write_bytes(good)
        echod.reload("reload applied")


def test_a_path_or_address_written_in_another_way_is_the_same_listener(tmp_path: Path) -> None:
    """A reload keeps the listener, its clients and its file; listing both spellings is refused."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    file, port = tmp_path / "echod.toml", free_port()
    spelt = "listen = [{{address = 'unix:{}/q'}}, {{address = '{}:{}'}}]\n[admin]\nlisten = 'unix:{}/admin'\n"
    file.write_text(spelt.format(real, "127.0.0.1", port, real))

    def identities() -> list[int]:
        return [(real / name).stat().st_ino for name in ("q", "admin")]

    with serving("-c", str(file)) as echod, socket.socket(socket.AF_UNIX) as local, connect(port) as client:
        local.settimeout(DEADLINE_S)
        local.connect(str(real / "q"))
        before = identities()
        for directory in (f"{real}/", link, f"{link}/../real"):
            file.write_text(spelt.format(directory, "[::ffff:127.0.0.1]", port, directory))
            applied = echod.reload("reload applied")
            assert applied["listen"] == [f"unix:{real}/q", f"127.0.0.1:{port}"]
            assert identities() == before
        for others in ("unix:{1}/q", "unix:{0}//q", "[::ffff:7f00:1]:{2}"):
            other = others.format(real, link, port)
            good = file.read_text()
            file.write_text(good.replace("listen = [", f"listen = [{{address = '{other}'}}, ", 1))
            assert "listed twice" in echod.reload("reload refused")["errors"][0]
            file.write_text(good)
            admin = good.replace(f"listen = 'unix:{link}/../real/admin'", f"listen = '{other}'")
            assert admin != good
            file.write_text(admin)
            assert "clients are served at this address, choose another" in echod.reload("reload refused")["errors"][0]
            file.write_text(good)
        assert ask(local, b"still here\n") == ask(client, b"still here\n") == b"STILL HERE\n"
        local.close()
        client.close()


def test_a_reload_follows_a_symbolic_link_that_has_changed(tmp_path: Path) -> None:
    """A link that leads elsewhere names another socket: it is bound, and the old socket's file is removed."""
    first, second, link = tmp_path / "first", tmp_path / "second", tmp_path / "link"
    first.mkdir()
    second.mkdir()
    link.symlink_to(first)
    with serving("-l", f"unix:{link}/q") as echod:
        link.unlink()
        link.symlink_to(second)
        assert echod.reload("reload applied")["listen"] == [f"unix:{second}/q"]
        assert not (first / "q").exists()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(str(second / "q"))
            assert ask(client, b"here\n") == b"HERE\n"


def test_a_line_that_we_do_not_read_is_not_late() -> None:
    """While replies are pending, the client's input is not read, and the line timeout does not run."""
    lines = b"a line that is long enough not to end where a chunk does\n" * 60_000
    with serving(*settings(timeouts_line=1)) as echod, connect(echod.port, receive_buffer=4096) as client:
        sending = threading.Thread(target=client.sendall, args=(lines,))
        sending.start()
        received = bytearray()
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            received += client.recv(8192)
            time.sleep(0.02)  # the slowness under test
        while len(received) < len(lines):
            received += client.recv(65536)
        sending.join()
        assert received == lines.upper()


def test_after_a_pause_of_the_process_nobody_is_late() -> None:
    """After SIGSTOP and SIGCONT, the process reads what has arrived before it enforces timeouts."""
    with serving(*settings(timeouts_idle=2, timeouts_line=2)) as echod:
        with connect(echod.port) as idle, connect(echod.port) as in_line:
            assert ask(idle, b"hello\n") == b"HELLO\n"
            in_line.sendall(b"half")
            while echod.stats()["bytes_in"] != 10:
                pass
            echod.send(signal.SIGSTOP)
            idle.sendall(b"in time\n")
            in_line.sendall(b" done\n")
            time.sleep(2.5)  # the pause under test
            echod.send(signal.SIGCONT)
            assert read_line(idle) == b"IN TIME\n"
            assert read_line(in_line) == b"HALF DONE\n"


def test_a_drain_at_the_connection_limit_rejects_the_backlog_properly() -> None:
    """Every client in the backlog gets its error line, and nobody is reset."""
    with serving(*settings(limits_connections=1)) as echod, connect(echod.port) as first:
        assert ask(first, b"1\n") == b"1\n"
        echod.send(signal.SIGSTOP)
        waiting = [connect(echod.port) for _ in range(150)]
        echod.send(signal.SIGTERM)
        echod.send(signal.SIGCONT)
        assert {read_to_end(client) for client in waiting} == {b"ERROR too many connections\n"}
        for client in waiting:
            client.close()
        assert read_to_end(first) == b""
        first.close()
        assert echod.exit_status() == 0


def test_an_unread_line_counts_at_the_second_signal() -> None:
    """The exit status is 3 if a client is owed a reply, even to a line that is still in the kernel."""
    with serving() as echod, connect(echod.port) as client:
        assert ask(client, b"hello\nhalf") == b"HELLO\n"
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started")
        echod.send(signal.SIGSTOP)
        client.sendall(b" a line\n")
        echod.send(signal.SIGTERM)
        echod.send(signal.SIGCONT)
        with contextlib.suppress(ConnectionResetError):
            answered = read_to_end(client)
            assert answered in (b"", b"HALF A LINE\n")
        status = echod.exit_status()
        assert (status, echod.wait_for("drain finished")["cut"]) in ((3, 1), (0, 0))
        if echod.wait_for("connection closed")["lines"] == 1:
            assert status == 3


def test_a_stop_during_the_start_drains() -> None:
    """A client that connects at once is served as in any drain, and the exit status is 0."""
    port = free_port()
    hasty = with_constants("process.force_exit.STARTING_S = 1.0")
    with Daemon("-l", f"127.0.0.1:{port}", *settings(timeouts_drain=15), command=hasty) as echod:
        client = connect_once_open(port)
        echod.send(signal.SIGTERM)
        client.sendall(b"half")
        echod.wait_for("drain started")
        time.sleep(1.5)  # longer than a stop may take before anyone is served
        assert ask(client, b" a line\n") == b"HALF A LINE\n"
        assert read_to_end(client) == b""
        client.close()
        assert echod.exit_status() == 0


def test_a_unix_client_with_a_full_queue_is_closed(tmp_path: Path) -> None:
    """An error line that cannot be written does not keep a connection open forever."""
    path = tmp_path / "sock"
    options = settings(timeouts_idle=0.5, timeouts_line=0.5, timeouts_write=0.5)
    with serving("-l", f"unix:{path}", *options) as echod, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.settimeout(0.2)
        with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):  # it may be ended already
            while True:  # a little at a time, so that the last reply may fit exactly
                client.sendall(b"x" * 700 + b"\n")
                time.sleep(0.0005)
        assert echod.wait_for("connection closed")["reason"] in ("write timeout", "idle", "line timeout")


def test_a_slow_reader_of_a_unix_socket_is_not_aborted(tmp_path: Path) -> None:
    """A client that accepts some of its replies, even less than the kernel needs to report room, gets all of them."""
    path = tmp_path / "sock"
    with serving("-l", f"unix:{path}", *settings(timeouts_write=2)) as echod, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        send_until_stuck(client)
        end = time.monotonic() + 4
        while time.monotonic() < end:
            assert client.recv(2560)
            time.sleep(0.05)  # the slowness under test
        assert echod.stats()["connections"]["open"] == 1


def test_drain_quiet_0_waits_for_a_partial_line() -> None:
    """A partial line is waited for, however short `drain_quiet` is."""
    with serving(*settings(timeouts_drain_quiet=0)) as echod, connect(echod.port) as client:
        assert ask(client, b"whole\nhalf") == b"WHOLE\n"
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started")
        assert ask(client, b" line\n") == b"HALF LINE\n"
        assert read_to_end(client) == b""


def test_repeated_reloads_do_not_stop_the_timeouts(tmp_path: Path) -> None:
    """Timeouts are enforced while one reload follows the other."""
    file = tmp_path / "echod.toml"
    file.write_text("[[listen]]\naddress = '127.0.0.1:0'\n[timeouts]\nidle = 2\n")
    with serving("-c", str(file)) as echod, connect(echod.port) as client:
        client.settimeout(0.05)
        end = time.monotonic() + DEADLINE_S
        received = b""
        while not received:
            assert time.monotonic() < end
            echod.send(signal.SIGHUP)
            with contextlib.suppress(TimeoutError):
                received = client.recv(100)
        assert received == b"ERROR idle for 2 s\n"


def test_a_client_that_ends_its_stream_and_resets_is_counted_as_reset() -> None:
    """A client that half-closes and then does not accept its replies counts as `reset`, not as `client`."""
    with serving() as echod, connect(echod.port, receive_buffer=4096) as client:
        send_until_stuck(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOTHING_LEFT)
        client.close()
        assert echod.wait_for("connection closed")["reason"] == "reset"


def test_a_bad_line_behind_pending_replies_ends_the_connection_in_time() -> None:
    """The error line comes after all replies, and the linger begins then."""
    lines = b"a line before the bad one\n" * 150_000
    with serving() as echod, connect(echod.port, receive_buffer=4096) as client:
        sending = threading.Thread(target=client.sendall, args=(lines + b"\xff\n",))
        sending.start()
        time.sleep(0.5)  # replies become pending, because the client does not read
        assert read_to_end(client) == lines.upper() + b"ERROR invalid utf-8\n"
        sending.join()
        ended_at = time.monotonic()
        assert echod.wait_for("connection closed")["reason"] == "invalid utf-8"
        assert time.monotonic() - ended_at < 3, "although the client has not ended its stream"


TIGHT = ("prlimit", "--nofile=132:132", sys.executable, "-m", "echod")
"""The descriptors that 67 connections need: 32 more clients can get their error line at the same time."""


def _crowd(port: int, count: int) -> list[socket.socket]:
    return [connect(port) for _ in range(count)]


def test_a_reload_at_the_limit_leaves_no_listener_paused(tmp_path: Path) -> None:
    """A lower limit does not prolong the pause for rejected clients."""
    file = tmp_path / "echod.toml"
    file.write_text("[[listen]]\naddress = '127.0.0.1:0'\n[limits]\nconnections = 67\n")
    with serving("-c", str(file), command=TIGHT) as echod:
        clients = _crowd(echod.port, 67 + 40)
        while echod.stats()["connections"]["rejected"]["limit"] < 32:
            pass
        file.write_text("[[listen]]\naddress = '127.0.0.1:0'\n[limits]\nconnections = 60\n")
        echod.reload("reload applied")
        for client in clients:
            client.close()
        with connect(echod.port) as late:
            assert ask(late, b"late\n") == b"LATE\n"


def test_a_stop_at_the_limit_resets_nobody_in_the_backlog() -> None:
    """Clients in the backlog get the error line before the end."""
    options = settings(limits_connections=67, timeouts_drain=4, timeouts_drain_quiet=0)
    with Daemon("-l", "127.0.0.1:0", *options, command=TIGHT) as echod:
        clients = _crowd(echod.port, 67 + 60)
        while echod.stats()["connections"]["rejected"]["limit"] < 32:
            pass
        echod.send(signal.SIGTERM)
        for client in clients:
            with client:
                assert read_to_end(client) in (b"", b"ERROR too many connections\n")
        assert echod.exit_status() == 0


def test_a_start_that_can_t_listen_leaves_no_socket_file(tmp_path: Path) -> None:
    """Two overlapping addresses can both be bound, but only one can listen; the socket files are removed."""
    sock, admin = tmp_path / "sock", tmp_path / "admin"
    port = free_port()
    arguments = ("-l", f"unix:{sock}", "-l", f"127.0.0.1:{port}", "-l", f"0.0.0.0:{port}", "--set")
    with Daemon(*arguments, f"admin.listen=unix:{admin}") as echod:
        assert echod.process.wait(DEADLINE_S) == 1
        echod._reader.join(DEADLINE_S)
        assert any(f"listen: 0.0.0.0:{port}: address already in use" in line for line in echod.other_lines)
    assert not sock.exists()
    assert not admin.exists()


def test_a_start_that_can_t_listen_is_in_the_log_file(tmp_path: Path) -> None:
    """The log keeps its file until the process ends, although the generation that opened it is discarded."""
    file, port = tmp_path / "log", free_port()
    with Daemon("-l", f"127.0.0.1:{port}", "-l", f"0.0.0.0:{port}", "--set", f"log.file={file}") as echod:
        assert echod.process.wait(DEADLINE_S) == 1
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(event["event"], event["exit_status"]) for event in events] == [("stopped", 1)]
