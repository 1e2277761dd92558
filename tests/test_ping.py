"""`echod ping`: real commands against real daemons, and against servers that lie, drop, stall or aren't there."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from echod import cli
from echod.address import TcpAddress, UnixAddress
from echod.round_trips import Plan
from tests.daemon import DEADLINE_S, Daemon, serving
from tests.test_cli import PYTHON_M_ECHOD, environment
from tests.test_cli import echod as command

REPLY = re.compile(r"57 bytes from (\S+): seq=(\d+) time=\d+\.\d{3} ms")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with serving() as echod:
        yield echod


# -- against echod -----------------------------------------------------------------------------------------------------


def test_it_reads_as_ping_does(daemon: Daemon) -> None:
    """A header, a line for each reply, the loss and the times; exit 0."""
    address = f"127.0.0.1:{daemon.port}"
    done = command("ping", "-c", "3", "-i", "0.01", address)
    assert (done.returncode, done.stderr) == (0, "")
    header, *replies, empty, title, loss, times = done.stdout.splitlines()
    assert header == f"PING {address} ({address}) 56 bytes of text."
    told = [found.groups() for line in replies if (found := REPLY.fullmatch(line))]
    assert told == [(address, "1"), (address, "2"), (address, "3")]
    assert (empty, title) == ("", f"--- {address} echod ping statistics ---")
    assert re.fullmatch(r"3 round trips, 3 answered right, 0% loss, time \d+ ms", loss)
    assert re.fullmatch(r"round trip min/avg/max/p50/p99 = (\d+\.\d{3}/){4}\d+\.\d{3} ms", times)
    assert daemon.wait_for("connection closed")["lines"] == 3


def test_every_kind_of_address(tmp_path: Path) -> None:
    """A name, IPv4, IPv6 and a Unix socket are reached."""
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
    """`--json` prints an object a line: each round trip, then all."""
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
    """A text of any size that the server takes is answered right."""
    done = command("ping", "-c", "3", "-i", "0", "-s", str(size), f"127.0.0.1:{daemon.port}")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(f"{size + 1} bytes from ") == 3


def test_ctrl_c_ends_it_with_the_summary(daemon: Daemon) -> None:
    """Ctrl-C: the summary, exit 0 if all were answered right; each line is there at once, in a pipe too."""
    asked = [*PYTHON_M_ECHOD, "ping", "-i", "60", f"127.0.0.1:{daemon.port}"]
    with subprocess.Popen(asked, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ping:
        assert ping.stdout
        assert "PING" in ping.stdout.readline()
        assert "seq=1" in ping.stdout.readline()
        ping.send_signal(signal.SIGINT)
        rest, errors = ping.communicate(timeout=DEADLINE_S)
    assert (ping.returncode, errors) == (0, "")
    assert "1 round trip, 1 answered right, 0% loss" in rest


def test_a_reader_that_has_enough(daemon: Daemon) -> None:
    """`echod ping ... | head -1` ends at once and without a word."""
    asked = [*PYTHON_M_ECHOD, "ping", "-i", "0.01", f"127.0.0.1:{daemon.port}"]
    with subprocess.Popen(asked, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ping:
        assert ping.stdout
        assert ping.stderr
        ping.stdout.readline()
        ping.stdout.close()
        assert ping.wait(DEADLINE_S) == 1
        assert ping.stderr.read() == b""


# -- against others ----------------------------------------------------------------------------------------------------

Answer = Callable[[socket.socket, bytes], None]


@contextlib.contextmanager
def server(answer: Answer) -> Iterator[str]:
    """A server that does `answer` with each line of a client, one client after the other."""
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


def lie(client: socket.socket, line: bytes) -> None:
    client.sendall(line)


def double(client: socket.socket, line: bytes) -> None:
    client.sendall(line.decode().upper().encode() * 2)


def drop(client: socket.socket, line: bytes) -> None:
    client.shutdown(socket.SHUT_RDWR)


def drop_in_the_middle(client: socket.socket, line: bytes) -> None:
    client.sendall(b"HAL")
    client.shutdown(socket.SHUT_RDWR)


def stall(client: socket.socket, line: bytes) -> None:
    """Say nothing at all."""


def stall_in_the_middle(client: socket.socket, line: bytes) -> None:
    client.sendall(b"HAL")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refuse, "told: 'ERROR too many connections'"),
        (lie, "wrong reply: 'bcdß"),
        (double, "more than the reply: '1 BCD"),
        (drop, "connection closed without a reply"),
        (drop_in_the_middle, "connection closed in the middle of a reply: 'HAL'"),
        (stall, "no reply from {} within 0.2 s"),
        (stall_in_the_middle, "reply not finished within 0.2 s: 'HAL'"),
    ],
)
def test_no_right_answer(answer: Answer, words: str) -> None:
    """Whatever a server does instead of answering right, it is said in a line, and the exit status is 1."""
    with server(answer) as address:
        done = command("ping", "-c", "2", "-i", "0", "-W", "0.2", "-s", "12", address)
    assert (done.returncode, done.stderr) == (1, "")
    _, first, second, *_ = done.stdout.splitlines()
    assert words.format(address) in first
    assert second.startswith("seq=2 ")
    assert "2 round trips, 0 answered right, 100% loss" in done.stdout


def test_nobody_listens() -> None:
    """Nobody there: refused, said for each round trip, exit 1; an unknown name is said at once."""
    done = command("ping", "-c", "2", "-i", "0", "127.0.0.1:1")
    assert (done.returncode, done.stderr) == (1, "")
    assert "seq=2 127.0.0.1:1: connection refused" in done.stdout
    done = command("ping", "-c", "1", "no.such.host.invalid:1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("echod: no.such.host.invalid: ")


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_options() -> None:
    """Each option says how to ask; without one it is every second without an end."""
    plain = Plan(TcpAddress("::1", 9), None, 1, 5, 56)
    assert cli.parse(["ping", "[::1]:9"]) == cli.Ping(plain, as_json=False)
    asked = Plan(UnixAddress("/a"), 3, 0.5, 2, 0)
    arguments = ["ping", "unix:/a", "-c3", "-i", ".5", "-W2", "-s", "0", "--json"]
    assert cli.parse(arguments) == cli.Ping(asked, as_json=True)


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
        cli.parse(["ping", *arguments])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err
