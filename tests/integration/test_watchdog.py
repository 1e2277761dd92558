"""What a daemon tells the service manager: readiness, reloads, signs of life and the drain."""

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, connect_once_open, settings
from tests.support.tls import ca_file, issue, toml

DEAF = (
    "import sys; from echod import __main__\nfrom echod.net import listener\n"
    "accept, served = listener.Listener._accept_batch, []\n"
    "def accept_once(self):\n"
    "    served.append(1)\n"
    "    return accept(self) if len(served) == 1 else self._loop.remove_reader(self._socket)\n"
    "listener.Listener._accept_batch = accept_once\n"
    "sys.exit(__main__.main(sys.argv[1:]))"
)
"""A daemon that serves one client, its own first self-probe, and none after it."""


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path)}
        self.heard: list[str] = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(DEADLINE_S)
        self.socket.bind(str(path))

    def next(self) -> str:
        self.heard.append(self.socket.recv(10_000).decode())
        return self.heard[-1]

    def wait_for(self, beginning: str) -> str:
        while not (message := self.next()).startswith(beginning):
            pass
        return message


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    it = Manager(tmp_path / "notify")
    with contextlib.closing(it.socket):
        yield it


def test_ready_is_sent_once_clients_are_served(manager: Manager, tmp_path: Path) -> None:
    """READY=1 is the first message, and a client that connects then is answered."""
    with Daemon("-l", f"unix:{tmp_path}/sock", environment=manager.environment) as echod:
        assert manager.next() == "READY=1\nSTATUS=0 connections open, 0 accepted"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "sock"))
            assert ask(client, b"hello\n") == b"HELLO\n"
            assert manager.wait_for("STATUS=1") == "STATUS=1 connection open, 1 accepted"
        assert echod.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (("--set", "limits.connections=0"), 78, "--set: limits.connections: expected int >= 1 (got '0')"),
        (("-l", "unix:/"), 1, "echod: could not start: listen: unix:/: "),
    ],
)
def test_a_failed_start_reports_its_reason(
    manager: Manager, arguments: tuple[str, ...], status: int, reason: str
) -> None:
    """The last status names the error."""
    with Daemon(*arguments, environment=manager.environment) as echod:
        assert manager.next().startswith(f"STATUS={reason}")
        assert echod.process.wait(DEADLINE_S) == status


def test_a_reload_and_its_error_are_reported(manager: Manager, tmp_path: Path) -> None:
    """RELOADING=1, then READY=1 whatever the result; the status names the error until a reload succeeds."""
    file = tmp_path / "echod.toml"
    file.write_text("[[listen]]\naddress = '127.0.0.1:0'\n")
    with Daemon("-c", str(file), environment=manager.environment) as echod:
        manager.wait_for("READY=1")
        file.write_text("[limits]\nline_bytes = 0\n")
        echod.send(signal.SIGHUP)
        assert manager.wait_for("RELOADING=1").startswith("RELOADING=1\nMONOTONIC_USEC=")
        refused = manager.wait_for("READY=1")
        assert refused.startswith("READY=1\nSTATUS=0 connections open, 0 accepted; last reload refused: ")
        assert "limits.line_bytes" in refused
        file.write_text("[[listen]]\naddress = '127.0.0.1:0'\n")
        echod.send(signal.SIGHUP)
        manager.wait_for("RELOADING=1")
        assert manager.wait_for("READY=1") == "READY=1\nSTATUS=0 connections open, 0 accepted"
        assert echod.stop() == 0


def test_a_drain_is_reported_and_extends_its_time(manager: Manager) -> None:
    """STOPPING=1 at the beginning, then EXTEND_TIMEOUT_USEC once a second, with what is left."""
    arguments = ("-l", "127.0.0.1:0", *settings(timeouts_drain=4))
    with Daemon(*arguments, environment=manager.environment) as echod, connect(echod.port) as client:
        client.sendall(b"a line begun")
        while echod.stats()["bytes_in"] == 0:
            pass
        echod.send(signal.SIGTERM)
        assert manager.wait_for("STOPPING=1") == "STOPPING=1\nSTATUS=draining: 1 connection left, 4 s left"
        for _ in range(2):
            extended = manager.wait_for("EXTEND")
            assert extended.startswith("EXTEND_TIMEOUT_USEC=3000000\nSTATUS=draining: 1 connection left, ")
        assert echod.exit_status() == 0
        assert not [message for message in manager.heard if message.startswith("WATCHDOG")]


def test_signs_of_life_are_in_time_and_their_self_probes_are_not_counted(manager: Manager) -> None:
    """The loop sends one every third of the interval, after a self-probe that is in no statistic or log line."""
    environment = manager.environment | {"WATCHDOG_USEC": "1500000"}
    with Daemon("-l", "127.0.0.1:0", "--log-level", "debug", environment=environment) as echod:
        manager.wait_for("READY=1")
        began = time.monotonic()
        for _ in range(5):
            manager.wait_for("WATCHDOG=1")
        assert 0.5 < time.monotonic() - began < DEADLINE_S / 4
        stats = echod.stats()
        assert (stats["connections"]["accepted"], stats["lines"]) == (0, 0)
        assert echod.stop() == 0
        assert not echod.events_named("connection closed")


@pytest.mark.parametrize("address", ["[::1]:0", "0.0.0.0:0", "[::]:0", "unix:"])
def test_the_self_probe_works_on_any_listener(manager: Manager, tmp_path: Path, address: str) -> None:
    """The self-probe works on IPv6, wildcard addresses and Unix sockets."""
    address = f"unix:{tmp_path}/sock" if address == "unix:" else address
    environment = manager.environment | {"WATCHDOG_USEC": "3000000"}
    with Daemon("-l", address, environment=environment) as echod:
        for _ in range(3):
            manager.wait_for("WATCHDOG=1")
        assert echod.stats()["connections"]["accepted"] == 0
        assert echod.stop() == 0
        assert not echod.events_named("self-check failed")


def test_the_self_probe_of_a_tls_listener_needs_no_certificate(manager: Manager, tmp_path: Path) -> None:
    """It is recognized by its address, before any handshake, also if clients must present a certificate."""
    file = tmp_path / "echod.toml"
    file.write_text(toml(issue(tmp_path).keys | {"tls_client_ca": str(ca_file(tmp_path)), "deny": ["127.0.0.0/8"]}))
    environment = manager.environment | {"WATCHDOG_USEC": "3000000"}
    with Daemon("-c", str(file), environment=environment) as echod:
        for _ in range(3):
            manager.wait_for("WATCHDOG=1")
        stats = echod.stats()
        assert stats["connections"]["rejected"] == dict.fromkeys(stats["connections"]["rejected"], 0)
        assert stats["tls"]["handshakes"]["failed"] == 0
        assert echod.stop() == 0
        assert not echod.events_named("self-check failed")


def test_a_daemon_that_serves_nobody_gives_no_sign_of_life(manager: Manager) -> None:
    """A loop that runs but no longer accepts clients gives no sign of life, and the log says why."""
    environment = manager.environment | {"WATCHDOG_USEC": "3000000"}  # the first round trip must be in time
    with Daemon("-l", "127.0.0.1:0", command=(sys.executable, "-c", DEAF), environment=environment) as echod:
        echod.wait_for("self-check failed")
        echod.process.kill()
        manager.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            manager.wait_for("nothing begins like this")
        assert manager.heard.count("WATCHDOG=1") == 1, "the first"


def test_a_long_error_is_shortened_and_stays_one_line(manager: Manager, tmp_path: Path) -> None:
    """Systemd would ignore more than 4096 bytes, READY=1 included; a line feed would begin another assignment."""
    file = tmp_path / "echod.toml"
    file.write_text("[[listen]]\naddress = '127.0.0.1:0'\n")
    with Daemon("-c", str(file), environment=manager.environment) as echod:
        manager.wait_for("READY=1")
        file.write_text("".join(f"[unknown-{number}]\n" for number in range(200)))
        echod.send(signal.SIGHUP)
        manager.wait_for("RELOADING=1")
        assert len(manager.wait_for("READY=1").encode()) < 1100
        file.write_text('[[listen]]\naddress = "127.0.0.1:0"\n[log]\nfile = "/nowhere/\\nMAINPID=1"\n')
        echod.send(signal.SIGHUP)
        manager.wait_for("RELOADING=1")
        assert manager.wait_for("READY=1").count("\n") == 1
        assert echod.stop() == 0


def test_at_the_connection_limit_a_sign_of_life_needs_no_self_probe(manager: Manager) -> None:
    """At the limit no client could be served, so the watchdog is fed without a self-probe."""
    environment = manager.environment | {"WATCHDOG_USEC": "300000"}
    arguments = ("-l", "127.0.0.1:0", *settings(limits_connections=1))
    with Daemon(*arguments, environment=environment) as echod, connect_once_open(echod.port) as client:
        assert ask(client, b"hello\n") == b"HELLO\n"
        for _ in range(3):
            manager.wait_for("WATCHDOG=1")
        assert echod.stats()["connections"]["rejected"]["limit"] == 0
        client.close()
        assert echod.stop() == 0
