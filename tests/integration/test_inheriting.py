"""Sockets that a service manager passes at the start: descriptors from 3 on, and the LISTEN_* variables."""

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.daemon import Daemon, ask, connect, read_to_end, settings

HANDS_OVER = """
import fcntl, os, sys
above = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 100) for number in sys.argv[1:3]]
for target, descriptor in enumerate(above, 3):
    os.dup2(descriptor, target)
    os.close(descriptor)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "echod", *sys.argv[3:]])
"""


@contextlib.contextmanager
def activated(*sockets: socket.socket, names: str, arguments: tuple[str, ...] = ()) -> Iterator[Daemon]:
    """Run an echod that inherits two sockets with these names."""
    first, second = (sock.fileno() for sock in sockets)
    command = (sys.executable, "-c", HANDS_OVER, str(first), str(second))
    environment = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": names}
    with Daemon(*arguments, command=command, environment=environment, descriptors=(first, second)) as echod:
        yield echod


@contextlib.contextmanager
def two_sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two listening sockets of another process."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        yield one, other


def test_without_a_listen_only_inherited_sockets_are_served() -> None:
    """Clients that waited in them are served too."""
    with two_sockets() as (one, other), connect(one.getsockname()[1]) as early:
        early.sendall(b"early\n")
        with activated(one, other, names="a:b") as echod:
            assert echod.ports == [one.getsockname()[1], other.getsockname()[1]]
            assert early.recv(100) == b"EARLY\n"
            with connect(other.getsockname()[1]) as client:
                assert ask(client, b"hello\n") == b"HELLO\n"
            assert echod.stop() == 0


def test_an_entry_claims_the_socket_of_its_name(tmp_path: Path) -> None:
    """The other entries are bound, and the other sockets are served."""
    arguments = ("-l", "systemd:web", "-l", f"unix:{tmp_path}/sock")
    with two_sockets() as (one, other), activated(one, other, names="x:web", arguments=arguments) as echod:
        listen = echod.wait_for("ready")["listen"]
        assert [address.rpartition(":")[2] for address in listen] == [
            str(other.getsockname()[1]),
            f"{tmp_path}/sock",
            str(one.getsockname()[1]),
        ]
        assert echod.stop() == 0


def test_a_name_without_an_inherited_socket_prevents_the_start() -> None:
    """The error lists the names that exist."""
    with two_sockets() as (one, other), activated(one, other, names="x:y", arguments=("-l", "systemd:web")) as echod:
        assert echod.process.wait() == 1
        echod._reader.join()
        (complaint,) = echod.other_lines
        assert "systemd:web: no inherited socket has that name" in complaint
        assert "(got x, y)" in complaint


def test_a_stop_empties_the_socket_once_and_leaves_it_to_its_owner() -> None:
    """Later clients wait in an inherited socket for the next process."""
    with two_sockets() as (one, other):
        with activated(one, other, names="a:b", arguments=tuple(settings(timeouts_drain_quiet=0))) as echod:
            with connect(echod.port) as client:
                assert ask(client, b"hello\n") == b"HELLO\n"
                assert echod.stop() == 0
                assert read_to_end(client) == b""
        with connect(one.getsockname()[1]) as waiting:  # no refusal, no reset
            waiting.sendall(b"waiting\n")
            assert one.getsockopt(socket.IPPROTO_IP, 21) == 0, "IP_MINTTL would drop the handshakes of later clients"
            with activated(one, other, names="a:b") as echod:
                assert waiting.recv(100) == b"WAITING\n"
                assert echod.stop() == 0


def test_a_reload_keeps_inherited_sockets(tmp_path: Path) -> None:
    """They are served whatever the new configuration lists, because their clients wait for this process."""
    file = tmp_path / "echod.toml"
    file.write_text("[[listen]]\naddress = 'systemd:web'\n")
    with two_sockets() as (one, other), activated(one, other, names="web:x", arguments=("-c", str(file))) as echod:
        assert len(echod.ports) == 2
        file.write_text(f"[[listen]]\naddress = 'unix:{tmp_path}/sock'\n")
        assert len(echod.reload("reload applied")["listen"]) == 3
        for sock in (one, other):
            with connect(sock.getsockname()[1]) as client:
                assert ask(client, b"hello\n") == b"HELLO\n"
        assert echod.stop() == 0
