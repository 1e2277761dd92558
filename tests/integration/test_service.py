"""What a client sees of a serving echod, on every kind of address, at every limit and timeout."""

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import stat
import sys
import time
from pathlib import Path

import pytest

from tests.support.daemon import (
    DEADLINE_S,
    UNMEASURED,
    Daemon,
    ask,
    connect,
    connect_once_open,
    free_port,
    read_line,
    read_to_end,
    send_until_stuck,
    serving,
    settings,
)


def test_the_reply_is_the_stripped_upper_cased_text_and_lf() -> None:
    r"""`b" Straße \r\n"` becomes `b"STRASSE\n"`; an unterminated last line is answered before the close."""
    with serving() as echod, connect(echod.port) as client:
        client.sendall(" Straße \r\n\nlast".encode())
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b"STRASSE\n\nLAST\n"
        closed = echod.wait_for("connection closed")
        assert (closed["reason"], closed["lines"]) == ("client", 3)
        assert (closed["bytes_in"], closed["bytes_out"]) == (len(" Straße \r\n\nlast".encode()), 14)
        host, port = client.getsockname()
        assert closed["peer"] == f"{host}:{port}"
        assert echod.stop() == 0


def test_replies_come_in_order_however_many_are_in_flight() -> None:
    """Replies come in the order of the messages, one for one; any number of messages may be in flight."""
    lines = [f"line {number} {'x' * (number % 97)}.\n".encode() for number in range(20_000)]
    with serving() as echod, connect(echod.port) as client:
        received = _exchange(client, b"".join(lines))
        assert received == b"".join(lines).upper()
        assert echod.stop() == 0


def _exchange(client: socket.socket, data: bytes) -> bytes:
    """Send and receive at the same time, so that neither side's buffers limit what is in flight."""
    client.setblocking(False)
    received = bytearray()
    rest = memoryview(data)
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            rest = rest[client.send(rest) :] if rest else rest
        try:
            if not (chunk := client.recv(65536)):
                break
            received += chunk
        except BlockingIOError:
            pass
        if received.count(b"\n") == data.count(b"\n"):
            break
    return bytes(received)


def test_ipv6_and_unix_sockets_are_served_beside_ipv4(tmp_path: Path) -> None:
    """`ready` reports the address of each."""
    path = tmp_path / "echod.sock"
    with serving("-l", "127.0.0.1:0", "-l", "[::1]:0", "-l", f"unix:{path}") as echod:
        v4, v6, unix = echod.wait_for("ready")["listen"]
        assert v4.startswith("127.0.0.1:")
        assert v6.startswith("[::1]:")
        assert unix == f"unix:{path}"
        with socket.create_connection(("::1", int(v6.rpartition(":")[2])), DEADLINE_S) as client:
            assert ask(client, b"six\n") == b"SIX\n"
        echod.wait_for("connection closed")
        with _unix_client(path) as client:
            assert ask(client, b"unix\n") == b"UNIX\n"
        assert echod.stop() == 0
        peers = [event["peer"] for event in echod.events_named("connection closed")]
        assert peers[0].startswith("[::1]:")
        assert peers[1] == "unix"
    assert not path.exists()


def _unix_client(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE_S)
    client.connect(str(path))
    return client


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    """The file of a process that has ended does not prevent a start."""
    path = tmp_path / "echod.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving("-l", f"unix:{path}") as echod, _unix_client(path) as client:
        assert ask(client, b"alive\n") == b"ALIVE\n"
        echod.process.kill()
        echod.process.wait()
        assert stat.S_ISSOCK(path.stat().st_mode)
    with serving("-l", f"unix:{path}") as echod, _unix_client(path) as client:
        assert ask(client, b"again\n") == b"AGAIN\n"


def test_a_live_socket_file_is_an_error(tmp_path: Path) -> None:
    """It is left alone; so is a file that is not a socket."""
    path = tmp_path / "echod.sock"
    with serving("-l", f"unix:{path}") as first:
        with Daemon("-l", f"unix:{path}") as second:
            assert second.process.wait(DEADLINE_S) == 1
        assert "address already in use" in second.other_lines[0]
        with _unix_client(path) as client:
            assert ask(client, b"first\n") == b"FIRST\n"
        assert first.stop() == 0
    path.write_text("precious")
    with Daemon("-l", f"unix:{path}") as third:
        assert third.process.wait(DEADLINE_S) == 1
    assert path.read_text() == "precious"


def test_a_socket_file_that_another_process_has_replaced_is_not_removed(tmp_path: Path) -> None:
    """At the end only our own socket file is removed."""
    path = tmp_path / "echod.sock"
    with serving("-l", f"unix:{path}") as echod:
        path.unlink()
        path.write_text("somebody else's")
        assert echod.stop() == 0
    assert path.read_text() == "somebody else's"


@pytest.mark.parametrize(
    ("sent", "error", "reason"),
    [
        (b"a\n" + b"x" * 11, b"ERROR line longer than 10 bytes\n", "line too long"),
        (b"a\n\xff\nb\n", b"ERROR invalid utf-8\n", "invalid utf-8"),
    ],
)
def test_after_an_error_line_echod_half_closes_and_reads_to_the_end(sent: bytes, error: bytes, reason: str) -> None:
    """Every message before the bad one is answered first; later input is read and not answered; no reset."""
    with serving(*settings(limits_line_bytes=10)) as echod:
        assert any(_seconds_to_end(echod, sent, b"A\n" + error, reason) < 0.9 for _ in range(5)), (
            "the client's end does"
        )
        assert echod.stats()["connections"]["closed"][reason] == len(echod.events_named("connection closed"))


def _seconds_to_end(echod: Daemon, sent: bytes, replies: bytes, reason: str) -> float:
    """Return how long a connection lasts whose client ends its stream after the error line."""
    known = len(echod.events)
    with connect(echod.port) as client:
        client.sendall(sent)
        assert read_to_end(client) == replies
        client.sendall(b"more\n" * 1000)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        closed = echod.wait_for("connection closed", after=known)
    assert (closed["reason"], closed["lines"]) == (reason, 1)
    duration_s: float = closed["duration_s"]
    return duration_s


def test_reading_on_after_the_half_close_is_bounded() -> None:
    """After its half-close echod reads to the client's end of stream for at most 1 s."""
    with serving() as echod, connect(echod.port) as client:
        client.sendall(b"\xff\n")
        assert read_to_end(client) == b"ERROR invalid utf-8\n"
        assert 1.0 <= echod.wait_for("connection closed")["duration_s"] < 3


def test_one_client_too_many_gets_an_error_line() -> None:
    """One client beyond `connections` gets its error line and is in neither accepted nor closed."""
    with serving(*settings(limits_connections=2)) as echod, connect(echod.port) as first, connect(echod.port) as second:
        assert ask(first, b"1\n") == b"1\n"
        assert ask(second, b"2\n") == b"2\n"
        with connect(echod.port) as third:
            third.sendall(b"let me in\n" * 1000)
            assert read_to_end(third) == b"ERROR too many connections\n"
        assert ask(first, b"still here\n") == b"STILL HERE\n"
        counted = echod.stats()["connections"]
        assert (counted["open"], counted["accepted"], counted["rejected"]["limit"]) == (2, 2, 1)
        assert sum(counted["closed"].values()) == 0
        first.close()
        echod.wait_for("connection closed")
        with connect(echod.port) as fourth:
            assert ask(fourth, b"room again\n") == b"ROOM AGAIN\n"


def test_many_clients_too_many_all_get_the_error_line() -> None:
    """However many clients are rejected, lingering ones make the next ones wait, not fail."""
    with serving(*settings(limits_connections=1)) as echod, connect(echod.port) as first:
        assert ask(first, b"1\n") == b"1\n"
        refused = [connect(echod.port) for _ in range(100)]
        assert {read_to_end(client) for client in refused} == {b"ERROR too many connections\n"}
        assert echod.stats()["connections"]["rejected"]["limit"] == 100
        for client in refused:
            client.close()
        assert ask(first, b"2\n") == b"2\n"
        assert echod.stop() == 0


def test_one_client_too_many_from_an_address_gets_an_error_line(tmp_path: Path) -> None:
    """Other addresses and Unix sockets are served; a reload changes the limit at once."""
    file = tmp_path / "echod.toml"
    listen = f"[[listen]]\naddress = '127.0.0.1:0'\n[[listen]]\naddress = 'unix:{tmp_path}/sock'\n"
    file.write_text(listen)
    with serving("-c", str(file)) as echod, connect(echod.port) as first, connect(echod.port) as second:
        assert ask(first, b"1\n") == b"1\n"
        assert ask(second, b"2\n") == b"2\n"
        file.write_text(f"{listen}[limits]\nconnections_per_address = 2\n")
        echod.send(signal.SIGHUP)
        assert echod.wait_for("reload applied")["changed"] == ["limits.connections_per_address"]
        with connect(echod.port) as third:
            third.sendall(b"let me in\n")
            assert read_to_end(third) == b"ERROR too many connections from your address\n"
        other = socket.create_connection(("127.0.0.1", echod.port), DEADLINE_S, source_address=("127.0.0.2", 0))
        with other, _unix_client(tmp_path / "sock") as unix:
            assert ask(other, b"elsewhere\n") == b"ELSEWHERE\n"
            assert ask(unix, b"unix\n") == b"UNIX\n"
            counted = echod.stats()["connections"]
            assert (counted["open"], counted["accepted"], counted["rejected"]["address"]) == (4, 4, 1)
        first.close()
        echod.wait_for("connection closed", lines=1, bytes_in=2)
        with connect(echod.port) as fourth:
            assert ask(fourth, b"room again\n") == b"ROOM AGAIN\n"


def test_a_flood_of_rejected_clients_is_one_line_in_the_log() -> None:
    """Rejected clients are logged in one line every ten seconds at most."""
    with serving(*settings(limits_connections=1, timeouts_idle=5)) as echod, connect(echod.port) as first:
        assert ask(first, b"1\n") == b"1\n"
        for _ in range(50):
            with connect(echod.port) as refused:
                assert read_to_end(refused) == b"ERROR too many connections\n"
        told = echod.wait_for("connections rejected", connections=1, address=0)
        assert 1 <= told["limit"] <= 50
        assert len(echod.events_named("connections rejected")) == 1


def test_an_idle_client_gets_an_error_line() -> None:
    """Idle means no input, no pending reply and no partial line."""
    with serving(*settings(timeouts_idle=1, timeouts_line=30)) as echod:
        with connect(echod.port) as client, connect(echod.port) as in_line:
            in_line.sendall(b"a line begun")
            assert ask(client, b"hello\n") == b"HELLO\n"
            asked_at = time.monotonic()
            assert read_to_end(client) == b"ERROR idle for 1 s\n"
            assert time.monotonic() - asked_at >= 1, "never early"
            assert echod.wait_for("connection closed")["reason"] == "idle"
            assert ask(in_line, b" is not idle\n") == b"A LINE BEGUN IS NOT IDLE\n"


def test_a_line_not_completed_in_time_ends_the_connection() -> None:
    """A partial line must be completed, however often a byte of it arrives; each line has its own time."""
    with serving(*settings(timeouts_line=0.5)) as echod, connect(echod.port) as client:
        began_at = time.monotonic()
        client.sendall(b"done\nslo")
        received = bytearray()
        client.settimeout(0.05)
        while not received.endswith(b"s\n"):
            try:
                received += client.recv(100)
            except TimeoutError:
                client.sendall(b"o")
            assert time.monotonic() - began_at < DEADLINE_S
        assert bytes(received) == b"DONE\nERROR line not finished within 0.5 s\n"
        assert time.monotonic() - began_at >= 0.5, "never early"
        client.close()
        assert echod.wait_for("connection closed")["reason"] == "line timeout"


def test_many_short_lines_are_never_one_slow_line() -> None:
    """The line timeout applies to one line: a client that always has some partial line stays connected."""
    with serving(*settings(timeouts_line=1)) as echod, connect(echod.port) as client:
        end = time.monotonic() + 2.5
        client.sendall(b"x")
        while time.monotonic() < end:
            assert ask(client, b"\nx") == b"X\n"
            time.sleep(0.01)  # the pace of the client
        assert ask(client, b"\n") == b"X\n"


def test_a_client_that_accepts_no_replies_is_aborted() -> None:
    """The write timeout; the client gets no error line."""
    with serving(*settings(timeouts_write=0.5)) as echod, connect(echod.port, receive_buffer=4096) as client:
        send_until_stuck(client)
        closed = echod.wait_for("connection closed")
        assert closed["reason"] == "write timeout"
        assert echod.stats()["connections"]["closed"]["write timeout"] == 1


def test_an_aborted_client_is_reset_at_once() -> None:
    """With all replies in the kernel's buffers, the client sees a reset and not a late end of stream."""
    with serving(*settings(timeouts_write=1)) as echod, connect(echod.port, receive_buffer=4096) as client:
        client.sendall(b"all of it is read\n" * 10_000)
        assert echod.wait_for("connection closed")["reason"] == "write timeout"
        watch = select.poll()
        watch.register(client, 0)  # which leaves POLLERR and POLLHUP
        assert watch.poll(1000 * DEADLINE_S)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


def test_a_slow_reader_is_not_aborted() -> None:
    """Progress counts: a client that accepts its replies slowly gets all of them."""
    with serving(*settings(timeouts_write=2, timeouts_idle=30)) as echod:
        with connect(echod.port, receive_buffer=4096) as client:
            send_until_stuck(client)
            end = time.monotonic() + 4
            while time.monotonic() < end:
                assert client.recv(16384)
                time.sleep(0.02)  # the slowness under test
            assert echod.stats()["connections"]["open"] == 1
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client)
        assert echod.wait_for("connection closed")["reason"] == "client"


def test_a_reset_is_counted_as_reset() -> None:
    """A client that resets is closed with the reason `reset`."""
    with serving() as echod, connect(echod.port) as client:
        assert ask(client, b"hello\n") == b"HELLO\n"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        assert echod.wait_for("connection closed")["reason"] == "reset"


def test_the_stats_dump_is_written_whatever_the_log_level() -> None:
    """The event `stats` is written at every log level and is consistent in itself."""
    port = free_port()
    with Daemon("-l", f"127.0.0.1:{port}", "--log-level", "error") as echod:
        with connect_once_open(port) as client, connect(port) as other:
            assert ask(client, b"one\n") == b"ONE\n"
            assert ask(client, b"two\n") == b"TWO\n"
            assert ask(other, b"three\n") == b"THREE\n"
            other.close()
            while (stats := echod.stats())["connections"]["open"] != 1:
                pass
            assert stats["open_files"] == len(os.listdir(f"/proc/{echod.pid}/fd"))
        assert (stats["pid"], stats["state"], stats["lines"]) == (echod.pid, "serving", 3)
        assert (stats["bytes_in"], stats["bytes_out"]) == (14, 14)
        assert stats["connections"]["accepted"] == 2
        assert stats["connections"]["closed"]["client"] == 1
        assert stats["rss_bytes"] > 10_000_000
        assert echod.stop() == 0
        assert {event["event"] for event in echod.events} == {"stats"}


def test_a_client_s_text_is_never_logged() -> None:
    """Only the level debug may show what a client sends."""
    with serving("--log-level", "debug") as echod, connect(echod.port) as client:
        assert ask(client, b"tell nobody\n") == b"TELL NOBODY\n"
        client.sendall(b"tell nobody\xff\n")
        read_to_end(client)
        client.close()
        echod.wait_for("connection closed")
        assert echod.stop() == 0
        assert not [event for event in echod.events if "nobody" in str(event).lower() and event["level"] != "debug"]


def test_a_taken_port_ends_the_start_with_status_1_and_says_what_to_do() -> None:
    """Exit status 1: could not start; every address that cannot be bound is named."""
    with serving() as first:
        taken = f"127.0.0.1:{first.port}"
        with Daemon("-l", taken, "-l", "192.0.2.1:7", "-l", "127.0.0.1:0") as second:
            assert second.process.wait(DEADLINE_S) == 1
        assert second.other_lines[0].startswith(f"echod: could not start: listen: {taken}: address already in use; `ss")
        assert "192.0.2.1:7: not an address of this machine" in second.other_lines[1]


def test_a_bad_configuration_ends_the_start_with_status_78() -> None:
    """Exit status 78: bad configuration, with every error."""
    with Daemon(*settings(limits_connections="many", timeouts_idel=3)) as echod:
        assert echod.process.wait(DEADLINE_S) == 78
    assert echod.other_lines == [
        "--set: limits.connections: expected int (got 'many')\n",
        "--set: timeouts.idel: unknown key, did you mean timeouts.idle? (got '3')\n",
    ]


def test_the_connection_limit_must_fit_under_the_open_files() -> None:
    """A configured limit that does not fit is refused with one that does; the default is lowered with a warning."""
    limited = ("prlimit", "--nofile=200:300", "--", sys.executable, "-m", "echod")
    with Daemon("-l", "127.0.0.1:0", command=limited) as echod:
        assert "lowered to 235" in echod.wait_for("configuration")["warning"]
        assert f"Max open files            {300:<21}{300}" in Path(f"/proc/{echod.pid}/limits").read_text()
        assert echod.stop() == 0
    with Daemon(*settings(limits_connections=236), command=limited) as echod:
        assert echod.process.wait(DEADLINE_S) == 78
    assert "at most 235 connections fit: lower the value or raise the hard limit (got 236)" in echod.other_lines[0]


def test_descriptors_that_run_out_make_clients_wait_not_fail() -> None:
    """Accepting pauses, and clients in the backlog are served once descriptors are available."""
    with serving() as echod:
        with connect(echod.port) as first:
            assert ask(first, b"1\n") == b"1\n"
            used = len(os.listdir(f"/proc/{echod.pid}/fd"))
            _limit_files(echod.pid, used)
            with connect(echod.port) as waiting:
                waiting.sendall(b"patience\n")
                echod.wait_for("accepting paused")
                assert ask(first, b"2\n") == b"2\n"
                _limit_files(echod.pid, 1000)
                assert read_line(waiting) == b"PATIENCE\n"
        assert echod.stop() == 0


def _limit_files(pid: int, count: int) -> None:
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, hard))


def test_closed_standard_streams_do_no_harm() -> None:
    """With standard input, output and error closed, no client's socket becomes standard error."""
    shell = ("sh", "-c", 'exec "$@" <&- >&- 2>/dev/null', "sh")
    port = free_port()
    with Daemon("-l", f"127.0.0.1:{port}", command=(*shell, sys.executable, "-m", "echod")) as echod:
        with connect_once_open(port) as client:
            assert ask(client, b"hello\n") == b"HELLO\n"
        echod.send(signal.SIGTERM)
        assert echod.process.wait(DEADLINE_S) == 0


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_it_imports_little() -> None:
    """The first client is answered before anything is imported that only another command, option or error needs.

    Each start waits for every import, and so do the clients in the moment of an upgrade.
    """
    command = (sys.executable, "-X", "importtime", "-m", "echod")
    with Daemon("-l", "127.0.0.1:0", command=command, environment=UNMEASURED) as echod:
        with connect(echod.port) as client:
            assert ask(client, b"hello\n") == b"HELLO\n"
        echod.send(signal.SIGKILL)
        echod.process.wait(DEADLINE_S)
    imported = {line.rpartition("|")[2].strip() for line in echod.other_lines}
    assert imported >= {"uvloop", "structlog", "msgspec", "echod.service"}
    ours = {"ask", "commands", "detach", "dial", "follow", "metrics", "ping", "rates", "screen", "table", "toml"}
    others = {"daemon", "difflib", "encodings.idna", "h11", "prometheus_client", "tomllib"}
    assert imported.isdisjoint(others | {f"echod.{module}" for module in ours})
