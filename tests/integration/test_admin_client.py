"""`echod stats` and `echod reload` against real daemons."""

import contextlib
import json
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from echod import __version__
from echod.client import admin
from echod.net.address import TcpAddress, UnixAddress
from tests.integration.test_admin_endpoint import reload
from tests.integration.test_arguments import echod as command
from tests.support.daemon import DEADLINE_S, Daemon, connect, free_port, serving

LISTEN = "[[listen]]\naddress = '127.0.0.1:0'\n"


@pytest.fixture
def local(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/admin"


@pytest.fixture
def file(tmp_path: Path, local: str) -> Path:
    """The configuration of a daemon whose admin endpoint is `local`."""
    file = tmp_path / "echod.toml"
    file.write_text(LISTEN + f"[admin]\nlisten = '{local}'\n")
    return file


@pytest.fixture
def daemon(file: Path) -> Iterator[Daemon]:
    with serving("-c", str(file)) as echod:
        yield echod


# -- stats -------------------------------------------------------------------------------------------------------------


def test_stats_as_json(daemon: Daemon, local: str) -> None:
    """`stats --json` prints the same statistics as the stats dump, in one line."""
    done = command("stats", "--json", "--admin", local)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    stats = json.loads(done.stdout)
    assert stats.keys() == daemon.stats().keys() - {"timestamp", "level", "event"}
    assert stats["pid"] == daemon.pid


def test_stats_for_people(daemon: Daemon, local: str) -> None:
    """`stats` prints a table, without colours if standard output is not a terminal."""
    done = command("stats", "--admin", local)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(rf"echod {__version__}   pid {daemon.pid}   serving   up \d+ s   (no )?fast path", lines[0])
    assert {"connections", "traffic", "process"} < set(lines)
    assert "  rejected                    0" in lines
    assert "more" not in lines
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout


# -- reload ------------------------------------------------------------------------------------------------------------


def test_reload_waits_for_the_verdict_and_prints_it(daemon: Daemon, file: Path, local: str) -> None:
    """`reload` exits 0 with what changed once it is in force, or 1 with every error."""
    done = command("reload", "--admin", local)
    assert (done.returncode, done.stdout, done.stderr) == (0, "reload applied: nothing changed\n", "")
    good = file.read_text()
    file.write_text(good + "[limits]\nconnections = 1\n[timeouts]\nidle = 5\n")
    done = command("reload", "-c", str(file))
    expected = "reload applied: limits.connections, timeouts.idle changed\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    with connect(daemon.port), connect(daemon.port) as second:
        assert second.recv(100) == b"ERROR too many connections\n"
    file.write_text("[limits]\nconnections = 0\n[nonsense]\n")
    done = command("reload", "--admin", local)
    assert (done.returncode, done.stdout) == (1, "")
    assert sorted(done.stderr.splitlines()) == [
        f"echod: reload refused: {file}: limits.connections: expected int >= 1 (got 0)",
        f"echod: reload refused: {file}: nonsense: unknown key (got {{}})",
    ]


def test_reload_says_what_is_not_in_force(tmp_path: Path, local: str) -> None:
    """Each reload names a key that needs a restart until it is in force, also in the endpoint's answer."""
    file = tmp_path / "echod.toml"
    text = f"[admin]\nlisten = '{local}'\n[[listen]]\naddress = '127.0.0.1:{free_port()}'\n"
    file.write_text(text)
    with serving("-c", str(file)):
        file.write_text(text + "reuse_port = true\n")
        waiting = "not in force before a restart or an upgrade: listen[0].reuse_port\n"
        for changed in ("listen", "nothing"):
            done = command("reload", "--admin", local)
            assert (done.returncode, done.stdout) == (0, f"reload applied: {changed} changed\n{waiting}")
        answer = {"changed": [], "restart_needed": ["listen[0].reuse_port"]}
        assert reload(local).content == answer


@pytest.mark.parametrize("question", ["reload", "stats"])
def test_a_broken_file_is_told_by_the_command_itself(question: str, daemon: Daemon, file: Path) -> None:
    """With a broken -c FILE, the command prints its errors and exits 1, without asking the daemon."""
    file.write_text("[limits]\nconnections = 0\n[nonsense]\n")
    done = command(question, "-c", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert sorted(done.stderr.splitlines()) == [
        f"{file}: limits.connections: expected int >= 1 (got 0)",
        f"{file}: nonsense: unknown key (got {{}})",
    ]
    assert daemon.stats()["reloads"]["refused"] == 0


def test_a_reload_while_draining_is_refused(daemon: Daemon, local: str) -> None:
    """A daemon that is stopping refuses `reload`: exit 1."""
    with connect(daemon.port) as client:
        client.sendall(b"a line begun is waited for")
        daemon.send(signal.SIGTERM)
        daemon.wait_for("drain started")
        done = command("reload", "--admin", local)
        assert (done.returncode, done.stderr) == (1, "echod: reload refused: draining\n")
        assert command("stats", "--json", "--admin", local).returncode == 0
        client.sendall(b"\n")
    assert daemon.exit_status() == 0


def test_a_reload_over_tcp_is_refused_with_words() -> None:
    """`reload` over TCP says why it is refused and exits 1."""
    with serving("--set", "admin.listen=127.0.0.1:0") as echod:
        [address] = echod.wait_for("admin endpoint")["listen"]
        done = command("reload", "--admin", address)
        assert done.returncode == 1
        assert done.stderr == f"echod: {address}: a reload is accepted only on the Unix socket (status 403)\n"
        assert json.loads(command("stats", "--json", "--admin", address).stdout)["pid"] == echod.pid


# -- whom they ask -----------------------------------------------------------------------------------------------------


def test_where_the_address_comes_from(daemon: Daemon, file: Path, local: str) -> None:
    """The address: --admin, else admin.listen of FILE, ECHOD_CONFIG or ECHOD_ADMIN_LISTEN, else $RUNTIME_DIRECTORY."""
    nowhere = {"ECHOD_ADMIN_LISTEN": "unix:/no/such/socket", "ECHOD_CONFIG": "/no/such/file"}
    directory = local.removeprefix("unix:").removesuffix("/admin")
    for arguments, more in [
        (["--admin", local], nowhere),
        (["-c", str(file)], {}),
        ([], {"ECHOD_CONFIG": str(file)}),
        ([], {"ECHOD_ADMIN_LISTEN": local}),
        ([], {"RUNTIME_DIRECTORY": directory}),
        ([], {"RUNTIME_DIRECTORY": directory, "ECHOD_ADMIN_LISTEN": "unix:/no/such/socket"}),
    ]:
        done = command("stats", "--json", *arguments, more=more)
        assert (done.returncode, done.stderr) == (0, ""), (arguments, more)
        assert json.loads(done.stdout)["pid"] == daemon.pid


def test_how_many_files_the_shell_may_open_is_nothing_to_them(daemon: Daemon, file: Path) -> None:
    """A connection limit that is too high for the shell's limit of open files is no error for these commands."""
    file.write_text(file.read_text() + "[limits]\nconnections = 1000000\n")
    assert command("stats", "-c", str(file)).returncode == 0


def test_candidates() -> None:
    """The configured address is asked first, but a reload prefers a Unix socket, because TCP refuses it."""
    tcp, unix, runtime = TcpAddress("::1", 9), UnixAddress("/a"), UnixAddress("/run/admin")
    for configured, directory, for_stats, for_reload in [
        ("[::1]:9", "unix:/run/admin", [tcp, runtime], [runtime]),
        ("unix:/a", "unix:/run/admin", [unix, runtime], [unix, runtime]),
        ("[::1]:9", None, [tcp], [tcp]),
        ("", "unix:/run/admin", [runtime], [runtime]),
        ("", None, [], []),
    ]:
        assert admin.candidates(configured, directory, for_reload=False) == for_stats
        assert admin.candidates(configured, directory, for_reload=True) == for_reload


def test_the_endpoint_has_moved_but_the_daemon_is_still_at_its_runtime_directory(tmp_path: Path) -> None:
    """A reload that moves admin.listen reaches the daemon through $RUNTIME_DIRECTORY, as under systemd."""
    file = tmp_path / "echod.toml"
    more = {"RUNTIME_DIRECTORY": str(tmp_path)}
    file.write_text(LISTEN + f"[admin]\nlisten = 'unix:{tmp_path}/old'\n")
    with serving("-c", str(file), environment=more):
        for address in (f"unix:{tmp_path}/new", "127.0.0.1:0"):
            file.write_text(LISTEN + f"[admin]\nlisten = '{address}'\n")
            done = command("reload", "-c", str(file), more=more)
            assert (done.stdout, done.stderr) == ("reload applied: admin.listen changed\n", "")


# -- no answer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["stats", pytest.param("reload", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("arguments", "more", "words"),
    [
        ([], {}, "no admin endpoint is known: name it with --admin ADDRESS, or its configuration with -c FILE"),
        (["--admin", "unix:/no/such/socket"], {}, "nobody answers at unix:/no/such/socket: is echod running? "),
        ([], {"RUNTIME_DIRECTORY": "/no/such"}, "nobody answers at unix:/no/such/admin: is echod running? "),
        (
            [],
            {"RUNTIME_DIRECTORY": "/no/such", "ECHOD_ADMIN_LISTEN": "unix:/b"},
            "nobody answers at unix:/b and unix:/no/such/admin: is echod running? ",
        ),
        ([], {"RUNTIME_DIRECTORY": "such"}, "$RUNTIME_DIRECTORY: unix:such/admin: expected an absolute path"),
        (["--admin", "127.0.0.1:1"], {}, "nobody answers at 127.0.0.1:1: is echod running? "),
        ([], {"ECHOD_ADMIN_LISTEN": "127.0.0.1:0"}, "nobody answers at 127.0.0.1:0: is echod running? "),
        (["--admin", "unix:/dev/null/admin"], {}, "unix:/dev/null/admin: not a directory"),
        (["--admin", "no.such.host.invalid:1"], {}, "no.such.host.invalid:1: "),
    ],
)
def test_nobody_there(question: str, arguments: list[str], more: dict[str, str], words: str) -> None:
    """If nobody answers, the command exits 1 with one line that says where, and what to do."""
    done = command(question, *arguments, more=more)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"echod: {words}")
    assert ("free port" in done.stderr) == ("127.0.0.1:0" in words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["stats", "--admin", "nonsense"],
        ["stats", "--admin"],
        ["stats", "--js"],
        ["stats", "extra"],
        ["reload", "--json"],
        ["reload", "--admin", "unix:relative"],
        ["reload", "-l", "a:1"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    """Wrong usage exits 2."""
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: " in done.stderr


@contextlib.contextmanager
def stranger(answer: bytes) -> Iterator[TcpAddress]:
    """A server that answers any data with `reply` and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                client, _ = server.accept()
                with client:
                    client.settimeout(DEADLINE_S)
                    client.recv(65536)
                    if answer:
                        client.sendall(answer)
                        client.shutdown(socket.SHUT_WR)
                    client.recv(65536)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield TcpAddress("127.0.0.1", server.getsockname()[1])
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[1]",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{nonsense",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + b"[" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n\xff",
        b"HTTP/1.1 409 Conflict\r\nContent-Type: application/json\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
        b"HTTP/1.1 999999 \r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\n\r\n\x1b[2J",
        b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 2000 + b"\r\n",
        b"\0" * 100_000,
    ],
)
def test_somebody_else_answers(answer: bytes) -> None:
    """Whatever other server listens there, the command prints one line, never a traceback."""
    with stranger(answer) as address:
        done = command("stats", "--admin", str(address))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"echod: {address}: ")
    assert done.stderr.strip().isprintable()
    assert len(done.stderr) < 250


@pytest.mark.parametrize("question", ["stats", "reload"])
def test_a_port_for_clients(question: str) -> None:
    """If the address is one where echod serves clients, the message says so."""
    with serving() as echod:
        address = f"127.0.0.1:{echod.port}"
        done = command(question, "--admin", address)
    assert (done.returncode, done.stdout) == (1, "")
    words = f"{address}: echod serves clients at this address; use that of admin.listen"
    assert done.stderr == f"echod: {words}\n"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "the answer is not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 2000 + b"\r\n", "the answer is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{nonsense", "the answer is not JSON"),
    ],
)
def test_what_is_wrong_with_an_answer(answer: bytes, words: str) -> None:
    """The message describes the error instead of naming an exception."""
    with stranger(answer) as address:
        done = command("stats", "--admin", str(address))
    assert done.stderr == f"echod: {address}: not an admin endpoint of echod: {words}\n"


def test_no_answer_in_time() -> None:
    """A daemon whose event loop is stuck does not block the command forever."""
    with stranger(b"") as address, pytest.raises(admin.UnansweredError, match="no answer within 0 s"):
        admin._ask_one(address, "GET", "/stats", 0.2)
