"""`echod ping` against real daemons, and against servers that reply wrongly, close, stall or do not exist."""

import contextlib
import json
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echod.cli import args
from echod.client import dial
from echod.client.probe import Plan
from echod.net.address import TcpAddress, UnixAddress
from tests.integration.test_arguments import PYTHON_M_ECHOD, environment, run
from tests.integration.test_arguments import echod as command
from tests.support.daemon import DEADLINE_S, UNMEASURED, Daemon, serving, settings
from tests.support.terminal import at_terminal

REPLY = re.compile(r"57 bytes from (\S+): seq=(\d+) time=\d+\.\d{3} ms")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with serving() as echod:
        yield echod


@contextlib.contextmanager
def pinging(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A running ping whose output is a pipe; it is killed at the end."""
    asked = [*PYTHON_M_ECHOD, "ping", *arguments]
    with subprocess.Popen(asked, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ping:
        try:
            yield ping
        finally:
            ping.kill()


# -- against echod -----------------------------------------------------------------------------------------------------


def test_it_reads_as_ping_does(daemon: Daemon) -> None:
    """The output is a header, a line for each reply, the loss and the times; exit 0."""
    address = f"127.0.0.1:{daemon.port}"
    done = command("ping", "-c", "3", "-i", "0.01", address)
    assert (done.returncode, done.stderr) == (0, "")
    header, *replies, empty, title, loss, times = done.stdout.splitlines()
    assert header == f"PING {address} ({address}) 56 bytes of text."
    told = [found.groups() for line in replies if (found := REPLY.fullmatch(line))]
    assert told == [(address, "1"), (address, "2"), (address, "3")]
    assert (empty, title) == ("", f"--- {address} echod ping statistics ---")
    assert re.fullmatch(r"3 round trips, 3 answered correctly, 0% loss, time \d+ ms", loss)
    assert re.fullmatch(r"round trip min/avg/max/p50/p99 = (\d+\.\d{3}/){4}\d+\.\d{3} ms", times)
    assert daemon.wait_for("connection closed")["lines"] == 3


def test_every_kind_of_address(tmp_path: Path) -> None:
    """A name, IPv4, IPv6 and a Unix socket work."""
    with serving("-l", "127.0.0.1:0", "-l", "[::1]:0", "-l", f"unix:{tmp_path}/sock") as echod:
        four, six = echod.ports
        for target, peer in [
            (f"127.0.0.1:{four}", f"127.0.0.1:{four}"),
            (f"[::1]:{six}", f"[::1]:{six}"),
            (f"localhost:{four}", f"127.0.0.1:{four}"),
            (f"unix:{tmp_path}/sock", f"unix:{tmp_path}/sock"),
        ]:
            done = command("ping", "-c", "1", target)
            assert done.returncode == 0, done.stdout
            assert f"from {peer}: seq=1" in done.stdout


def test_json(daemon: Daemon) -> None:
    """`--json` prints one object per line: for each round trip, then for the summary."""
    address = f"127.0.0.1:{daemon.port}"
    done = command("ping", "--json", "-c", "2", "-i", "0", address)
    first, second, whole = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, done.stderr) == (0, "")
    assert [first["seq"], second["seq"], first["peer"], first["fault"]] == [1, 2, address, None]
    assert first["time_ms"] > 0
    assert {key: whole[key] for key in ("target", "round_trips", "answered_right", "loss_percent")} == {
        "target": address,
        "round_trips": 2,
        "answered_right": 2,
        "loss_percent": 0,
    }
    assert list(whole["time_ms"]) == ["min", "avg", "max", "p50", "p99"]


@pytest.mark.parametrize("size", [0, 1, 2, 56, 65536])
def test_sizes(daemon: Daemon, size: int) -> None:
    """A text of any size up to the server's limit is answered correctly."""
    done = command("ping", "-c", "3", "-i", "0", "-s", str(size), f"127.0.0.1:{daemon.port}")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(f"{size + 1} bytes from ") == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_with_the_summary(daemon: Daemon, number: signal.Signals) -> None:
    """Ctrl-C and TERM print the summary and exit 0 if all replies were correct; lines are never buffered."""
    with pinging("-i", "60", f"127.0.0.1:{daemon.port}") as ping:
        assert ping.stdout
        assert "PING" in ping.stdout.readline()
        assert "seq=1" in ping.stdout.readline()
        ping.send_signal(number)
        rest, errors = ping.communicate(timeout=DEADLINE_S)
    assert (ping.returncode, errors) == (0, "")
    assert "1 round trip, 1 answered correctly, 0% loss" in rest


def test_at_a_terminal(daemon: Daemon) -> None:
    """At a terminal the output looks like that of ping(8), with the summary below ^C."""
    with at_terminal("ping", f"localhost:{daemon.port}") as terminal:
        terminal.see("seq=1 .* ms$")
        terminal.press(b"\x03")
        assert terminal.exit_status() == 0
        assert terminal.see(
            rf"^\^C\n--- localhost:{daemon.port} echod ping statistics ---\n1 round trip, 1 answered correctly"
        )


def test_a_reader_that_has_enough(daemon: Daemon) -> None:
    """`echod ping ... | head -1` ends at once and without an error message."""
    with pinging("-i", "0.01", f"127.0.0.1:{daemon.port}") as ping:
        assert ping.stdout
        assert ping.stderr
        ping.stdout.readline()
        ping.stdout.close()
        assert ping.wait(DEADLINE_S) == 1
        assert ping.stderr.read() == ""


# -- against others ----------------------------------------------------------------------------------------------------

Answer = Callable[[socket.socket, bytes], None]


@contextlib.contextmanager
def server(answer: Answer) -> Iterator[str]:
    """A server that calls `answer` for each line of a client, one client after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # it is shut down
                while True:
                    client, _ = listener.accept()
                    client.settimeout(DEADLINE_S)
                    with client, contextlib.suppress(OSError):
                        while line := client.recv(65536):
                            answer(client, line)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def refuse(client: socket.socket, line: bytes) -> None:
    client.sendall(b"ERROR too many connections\n")


def refuse_and_reset(client: socket.socket, line: bytes) -> None:
    client.sendall(b"ERROR go away\n")
    client.close()  # on unread input


def lie(client: socket.socket, line: bytes) -> None:
    client.sendall(line)


def double(client: socket.socket, line: bytes) -> None:
    client.sendall(line.decode().upper().encode() * 2)


def drop(client: socket.socket, line: bytes) -> None:
    client.shutdown(socket.SHUT_RDWR)


def reset(client: socket.socket, line: bytes) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def drop_in_the_middle(client: socket.socket, line: bytes) -> None:
    client.sendall(b"HAL")
    client.shutdown(socket.SHUT_RDWR)


def stall(client: socket.socket, line: bytes) -> None:
    """Send nothing."""


def stall_in_the_middle(client: socket.socket, line: bytes) -> None:
    client.sendall(b"HAL")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refuse, "error line: 'ERROR too many connections'"),
        (lie, "wrong reply: '1 bcdßefgé' instead of '1 BCDSSEFGÉ'"),
        (double, "unexpected data after the reply: '1 BCD"),
        (reset, "{}: connection reset by peer"),
        (drop, "connection closed without a reply"),
        (drop_in_the_middle, "connection closed in the middle of a reply: 'HAL'"),
        (stall, "{}: no reply within 1 s"),
        (stall_in_the_middle, "reply not finished within 1 s: 'HAL'"),
    ],
)
def test_no_right_answer(answer: Answer, words: str) -> None:
    """Whatever a server does instead of replying correctly, ping prints one line about it and exits 1."""
    with server(answer) as address:
        within = "1" if answer in (stall, stall_in_the_middle) else str(DEADLINE_S / 2)  # only a stall is waited out
        done = command("ping", "-c", "2", "-i", "0", "-W", within, "-s", "12", address)
    assert (done.returncode, done.stderr) == (1, "")
    _, first, second, *_ = done.stdout.splitlines()
    assert words.format(address) in first
    assert second.startswith("seq=2 ")
    assert "2 round trips, 0 answered correctly, 100% loss" in done.stdout


class Late:
    """Answers the first line only after its client has given up, and every later one at once."""

    def __init__(self) -> None:
        self.late: tuple[socket.socket, bytes] | None = None

    def __call__(self, client: socket.socket, line: bytes) -> None:
        reply = line.decode().upper().encode()
        if self.late:
            client.sendall(reply)
        else:
            self.late = client, reply
            select.select([client], [], [], DEADLINE_S)  # until the client has given up
            client.sendall(reply)


def test_a_late_reply_is_not_the_next_ones() -> None:
    """A late reply is lost; the next round trip uses a new connection and gets its own reply."""
    with server(Late()) as address:
        done = command("ping", "-c", "3", "-i", "0", "-W", "1", address)
    assert (done.returncode, done.stderr) == (1, "")
    _, first, second, third, *_ = done.stdout.splitlines()
    assert first == f"seq=1 {address}: no reply within 1 s"
    assert REPLY.match(second)
    assert second.endswith(" (new connection)")
    assert REPLY.fullmatch(third)
    assert "3 round trips, 2 answered correctly, 33.3333% loss" in done.stdout


class Afterwards:
    """Answers correctly, and does something more once the first reply has been read."""

    def __init__(self, more: Answer) -> None:
        self.is_read = threading.Event()
        self._more = [more]

    def __call__(self, client: socket.socket, line: bytes) -> None:
        client.sendall(line.decode().upper().encode())
        if self._more:
            self.is_read.wait(DEADLINE_S)
            self._more.pop()(client, line)


def test_what_is_said_after_a_reply() -> None:
    """Unexpected data after a reply is detected at the next round trip."""
    double_later = Afterwards(lambda client, _: client.sendall(b"HALLO\n"))
    with server(double_later) as address, pinging("-c", "3", "-i", "2", address) as ping:  # said long before the next
        assert wait_for(ping, "seq=1 .* ms\n")
        double_later.is_read.set()
        said, _ = ping.communicate(timeout=DEADLINE_S)
    assert ping.returncode == 1
    second, third, *_ = said.splitlines()
    assert second == f"seq=2 {address}: unexpected data: 'HALLO'"
    assert third.endswith(" (new connection)")


def test_a_connection_that_is_reset_between_round_trips() -> None:
    """However a server ends a connection between two round trips, the next one uses a new connection."""
    reset_later = Afterwards(reset)
    with server(reset_later) as address, pinging("-c", "2", "-i", "2", address) as ping:  # long before the next
        assert wait_for(ping, "seq=1 .* ms\n")
        reset_later.is_read.set()
        said, _ = ping.communicate(timeout=DEADLINE_S)
    assert (ping.returncode, said.count("seq=2 "), said.count(" (new connection)\n")) == (0, 1, 1)


def test_why_a_text_is_not_taken() -> None:
    """An error line sent before the whole request was read is shown, even if the server then resets."""
    with serving(*settings(limits_line_bytes=1000)) as echod, server(refuse_and_reset) as other:
        for address, words in [(f"127.0.0.1:{echod.port}", "line longer than 1000 bytes"), (other, "go away")]:
            done = command("ping", "-c", "2", "-i", "0", "-s", "8000000", address)
            assert done.returncode == 1
            assert done.stdout.count(f"error line: 'ERROR {words}'") == 2, done.stdout


def test_an_idle_connection_may_be_closed() -> None:
    """A connection that the server closes between two round trips costs neither of them; a note mentions it."""
    with serving(*settings(timeouts_idle=0.5)) as echod:
        done = command("ping", "-c", "2", "-i", "1.5", f"127.0.0.1:{echod.port}")
        whole = command("ping", "-c", "2", "-i", "1.5", "--json", f"127.0.0.1:{echod.port}")
    assert done.returncode == 0, done.stdout
    assert "seq=2 " in done.stdout
    assert " ms (new connection after 'ERROR idle for 0.5 s')\n" in done.stdout
    assert [json.loads(line).get("connection") for line in whole.stdout.splitlines()] == [1, 2, None]


def test_a_restart_meanwhile(tmp_path: Path) -> None:
    """If a server stops and starts again, the outage is reported and ping connects again."""
    address = f"unix:{tmp_path}/sock"
    with pinging("-i", "0.05", address) as ping:
        with serving("-l", address, *settings(timeouts_drain=0.1)):
            assert wait_for(ping, " ms\n")
        assert wait_for(ping, f"seq=[0-9]+ {address}: (no such file|connection refused)")
        with serving("-l", address, *settings(timeouts_drain=0.1)):
            assert wait_for(ping, r" \(new connection\)\n")
            ping.send_signal(signal.SIGINT)
            rest, _ = ping.communicate(timeout=DEADLINE_S)
    assert ping.returncode == 1
    assert re.search(r"--- .* ---\n\d+ round trips, \d+ answered correctly, [\d.]+% loss", rest)


def wait_for(ping: subprocess.Popen[str], pattern: str) -> bool:
    assert ping.stdout
    return any(re.search(pattern, line) for line in ping.stdout)


@pytest.mark.parametrize("reply", [b"", b"HAL"])
def test_ctrl_c_while_it_waits(reply: bytes) -> None:
    """Ctrl-C while a server stalls prints the summary at once; without a finished round trip, ping exits 1."""
    asked_for = threading.Event()

    def answer(client: socket.socket, line: bytes) -> None:
        client.sendall(reply)
        asked_for.set()

    with server(answer) as address:
        with pinging("-W", "1000", address) as ping:
            assert asked_for.wait(DEADLINE_S)
            ping.send_signal(signal.SIGINT)
            said, errors = ping.communicate(timeout=DEADLINE_S)
    assert (ping.returncode, errors) == (1, "")
    assert "0 round trips, 0 answered correctly, 0% loss" in said


def test_nobody_listens() -> None:
    """A refused connection is reported for each round trip, and exits 1; an unknown name ends ping at once."""
    done = command("ping", "-c", "2", "-i", "0", "127.0.0.1:1")
    assert (done.returncode, done.stderr) == (1, "")
    assert "seq=2 127.0.0.1:1: connection refused" in done.stdout
    done = command("ping", "-c", "1", "no.such.host.invalid:1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("echod: no.such.host.invalid: ")


# -- connecting --------------------------------------------------------------------------------------------------------


def found(*ports: int) -> dial.Found:
    return [(socket.AF_INET, ("127.0.0.1", port)) for port in ports]


def test_each_address_is_tried(daemon: Daemon) -> None:
    """Of several addresses the first that accepts is used; if none does, the error names each."""
    connected, address = dial.connect(found(1, daemon.port, 2), time.monotonic() + DEADLINE_S)
    connected.close()
    assert address == ("127.0.0.1", daemon.port)
    with pytest.raises(dial.UnreachableError) as none:
        dial.connect([(9999, ("127.0.0.1", 1)), *found(1, 2)], time.monotonic() + DEADLINE_S)
    assert str(none.value) == (
        "127.0.0.1:1: address family not supported by protocol; 127.0.0.1:1: connection refused; "
        "127.0.0.1:2: connection refused"
    )


def test_an_address_that_is_silent_leaves_time_for_the_next(daemon: Daemon) -> None:
    """An address that does not answer takes only its share of the time."""
    with full(("127.0.0.1", 0), socket.AF_INET) as silent:
        start = time.monotonic()
        connected, address = dial.connect(found(silent[1], daemon.port), start + 4)
        connected.close()
        assert address == ("127.0.0.1", daemon.port)
        assert 1.9 < time.monotonic() - start < 3.8, "half of it"
        with pytest.raises(dial.UnreachableError, match="connection timed out"):
            dial.connect(found(silent[1]), time.monotonic() + 0.2)


def test_a_full_backlog_of_a_unix_socket(tmp_path: Path) -> None:
    """Connecting to a Unix socket with a full backlog waits, as for a port, up to the timeout."""
    with full(f"{tmp_path}/sock", socket.AF_UNIX):
        done = command("ping", "-c", "1", "-W", "0.2", f"unix:{tmp_path}/sock")
    assert done.returncode == 1
    assert f"seq=1 unix:{tmp_path}/sock: connection timed out\n" in done.stdout


@contextlib.contextmanager
def full(address: Any, family: int) -> Iterator[Any]:
    """A listening socket with a full backlog."""
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.socket(family))
        listener.bind(address)
        listener.listen(0)
        while True:
            client = opened.enter_context(socket.socket(family))
            client.settimeout(0.2)
            try:
                client.connect(listener.getsockname())
            except OSError:
                break
        yield listener.getsockname()


def test_a_name_server_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolving a name may take as long as a round trip."""
    answered = threading.Event()

    def silent(host: bytes, *arguments: object, flags: int, **others: object) -> list[Any]:
        if flags == socket.AI_NUMERICHOST:
            raise socket.gaierror
        answered.wait(DEADLINE_S)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    start = time.monotonic()
    try:
        with pytest.raises(dial.UnknownHostError, match=r"slow.test: no answer .* within 0.1 s"):
            dial.resolve(TcpAddress("slow.test", 1), 0.1)
        assert time.monotonic() - start < DEADLINE_S / 2
    finally:
        answered.set()


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_it_imports_little(daemon: Daemon) -> None:
    """A ping imports no event loop, configuration, log or JSON, because health checks start it often."""
    address = f"127.0.0.1:{daemon.port}"
    script = f"from echod.__main__ import main\nmain(['ping', '-c', '1', '{address}'])\nimport sys\nprint(*sys.modules)"
    done = run([sys.executable, "-c", script], UNMEASURED)
    assert "1 answered correctly" in done.stdout
    imported = done.stdout.splitlines()[-1].split()
    heavy = {"asyncio", "uvloop", "structlog", "logging", "msgspec", "tomllib", "json", "encodings.idna", "threading"}
    assert "echod.client.ping" in imported
    assert heavy.isdisjoint(imported)


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_options() -> None:
    """Each option sets its field; the default is a round trip per second without an end."""
    plain = Plan(TcpAddress("::1", 9), None, 1, 5, 56)
    assert args.parse(["ping", "[::1]:9"]) == args.Ping(plain, as_json=False)
    asked = Plan(UnixAddress("/a"), 3, 0.5, 2, 0)
    arguments = ["ping", "unix:/a", "-c3", "-i", ".5", "-W2", "-s", "0", "--json"]
    assert args.parse(arguments) == args.Ping(asked, as_json=True)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a"],
        ["a:0"],
        ["systemd:a"],
        ["a:1", "b:1"],
        ["a:1", "-c", "0"],
        ["a:1", "-c", "1.5"],
        ["a:1", "-i", "-1"],
        ["a:1", "-i", "nan"],
        ["a:1", "-W", "0"],
        ["a:1", "-W", "inf"],
        ["a:1", "-s", "-1"],
        ["a:1", "-s", "16777217"],
        ["a:1", "--js"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage exits 2."""
    with pytest.raises(SystemExit) as ended:
        args.parse(["ping", *arguments])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err
