"""How TLS connections end at a stop and at a live upgrade, which they cannot cross."""

import asyncio
import random
import signal
import ssl
import threading
import time
from pathlib import Path

import pytest

from echod.telemetry.reasons import CloseReason
from tests.support.clients import finished, pipeline
from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, serving, settings, settled
from tests.support.installed import Installed
from tests.support.streams import upgrade
from tests.support.tls import TlsClient, issue, serving_listens, serving_tls, tls_connect, toml

SHORT = settings(timeouts_drain=1, timeouts_drain_quiet=0.1)

V1 = b"PROXY TCP4 192.0.2.9 198.51.100.2 40001 8888\r\n"


class Streamer(threading.Thread):
    """Keeps lines in flight until close_notify, and records how the stream ended."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__()
        self._port = port
        self._number = number
        self.sent = bytearray()
        self.received = bytearray()
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            with tls_connect(self._port) as client:
                self._send(client, 16)
                while chunk := client.recv():  # a FIN without close_notify is an error
                    self.received += chunk
                    self._send(client, chunk.count(b"\n"))
        except OSError as error:
            self.error = error

    def _send(self, client: TlsClient, count: int) -> None:
        start = self.sent.count(b"\n")
        lines = b"".join(b"client %d line %d.\n" % (self._number, start + n) for n in range(count))
        self.sent += lines
        client.sendall(lines)

    def check(self) -> None:
        """Assert that the replies answer a prefix of the lines, that none is torn, and that there was no reset."""
        self.join(DEADLINE_S)
        assert self.error is None, repr(self.error)
        assert self.received == self.sent.upper()[: len(self.received)]
        assert not self.received or self.received.endswith(b"\n")


def _streamers(port: int, count: int) -> list[Streamer]:
    """Start this many clients, and wait until each has its first replies."""
    clients = [Streamer(port, number) for number in range(count)]
    for client in clients:
        client.start()
    end = time.monotonic() + DEADLINE_S
    while not all(client.received for client in clients):
        assert time.monotonic() < end
        time.sleep(0.01)
    return clients


# -- stop --------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_stop_under_load_delivers_every_reply(tmp_path: Path, full: bool) -> None:
    """Lines answered are a prefix of lines sent, no torn reply, no reset, exit 0."""
    file = tmp_path / "echod.toml"
    file.write_text(toml(issue(tmp_path).keys))
    for number in range(50 if full else 2):
        with Daemon("-c", str(file), *SHORT) as echod:
            clients = _streamers(echod.port, 20)
            time.sleep(random.Random(number).uniform(0, 0.3))  # a random moment
            echod.send(signal.SIGTERM)
            assert echod.exit_status() == 0
            for client in clients:
                client.check()
            finished = echod.wait_for("drain finished")
            assert (finished["clean"], finished["cut"]) == (20, 0)
            closed = echod.events_named("connection closed")
            assert {event["reason"] for event in closed} == {CloseReason.DRAINED.value}
            # Every line echod says it answered reached its client.
            assert sum(event["lines"] for event in closed) == sum(client.received.count(b"\n") for client in clients)


def test_a_stop_waits_for_a_handshake_under_way_no_longer_than_the_drain(tmp_path: Path) -> None:
    with serving_tls(tmp_path, *SHORT) as echod, connect(echod.port) as silent, tls_connect(echod.port) as client:
        assert client.ask(b"one\n") == b"ONE\n"
        began = time.monotonic()
        echod.send(signal.SIGTERM)
        assert client.read_to_end() == b""
        assert silent.recv(1) == b""
        assert echod.exit_status() == 0
        assert time.monotonic() - began < 5


def test_a_second_signal_aborts_a_client_that_is_owed_replies(tmp_path: Path) -> None:
    """Its stream ends without close_notify, so that it notices."""
    with serving_tls(tmp_path, *settings(timeouts_drain=60)) as echod, tls_connect(echod.port) as client:
        client.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            while True:
                client.sendall(b"no reply is read\n" * 960)
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started")
        echod.send(signal.SIGTERM)
        assert echod.exit_status() == 3
        client.sock.settimeout(DEADLINE_S)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            client.read_to_end()


# -- live upgrade ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(180)
def test_an_upgrade_finishes_tls_connections_and_takes_plain_ones_along(tmp_path: Path) -> None:
    """50 plain streams are byte-exact across it, 50 TLS streams end at a line with close_notify; then both go on."""

    async def scenario(echod: Daemon) -> None:
        secret, plain = echod.ports
        plains = await pipeline(f"127.0.0.1:{plain}", 50)
        secrets = await asyncio.to_thread(_streamers, secret, 50)
        with connect(plain) as partial:
            partial.sendall(b"begun before")
            done = await asyncio.to_thread(upgrade, echod)
            assert done["connections"] == 51
            assert echod.events_named("TLS connections finished")[-1]["connections"] == 50
            for client in secrets:
                await asyncio.to_thread(client.check)
            await finished(plains)
            assert await asyncio.to_thread(ask, partial, b" and ended after\n") == b"BEGUN BEFORE AND ENDED AFTER\n"
        again = await asyncio.to_thread(tls_connect, secret)
        with again:
            assert await asyncio.to_thread(again.ask, b"again\n") == b"AGAIN\n"
            again.half_close()
            assert await asyncio.to_thread(again.read_to_end) == b""

    flags = settings(timeouts_drain=2, timeouts_drain_quiet=0.2)
    with serving_listens(tmp_path, issue(tmp_path).keys, {}, flags=flags) as echod:
        asyncio.run(asyncio.wait_for(scenario(echod), 120))
        counts = settled(echod, 0)["connections"]
        assert (counts["closed"]["drained"], counts["closed"]["reset"], counts["closed"]["cut"]) == (50, 0, 0)


def test_clients_that_come_meanwhile_wait_and_are_served_by_the_next_program(tmp_path: Path) -> None:
    """A partial line holds the upgrade up; a plain client is served all the time."""
    flags = settings(timeouts_drain=60, timeouts_drain_quiet=0.2)
    keys = issue(tmp_path).keys
    with serving_listens(tmp_path, keys, keys | {"proxy_protocol": True}, {}, flags=flags) as echod:
        secret, proxied, plain = echod.ports
        with tls_connect(secret) as client, connect(plain) as other, connect(proxied) as begun:
            begun.sendall(V1[:20])
            assert client.ask(b"one\npartial") == b"ONE\n"
            known = len(echod.events)
            echod.send(signal.SIGUSR2)
            echod.wait_for("upgrade proven", after=known)
            assert ask(other, b"plain\n") == b"PLAIN\n"
            with connect(secret) as late:
                waiting = [TlsClient(late), TlsClient(begun)]
                late.sendall(waiting[0].hello())
                begun.sendall(V1[20:] + waiting[1].hello())
                for each in waiting:
                    each.sock.settimeout(0.3)
                    with pytest.raises(TimeoutError):
                        each.sock.recv(1)
                assert ask(other, b"plain\n") == b"PLAIN\n"
                client.sendall(b" line\n")
                assert client.read_to_end() == b"PARTIAL LINE\n"
                client.half_close()
                for each in waiting:
                    each.sock.settimeout(DEADLINE_S)
                    assert each.handshake().ask(b"late\n") == b"LATE\n"
            echod.wait_for("upgrade done", after=known)
            assert ask(other, b"plain\n") == b"PLAIN\n"
            assert echod.stats()["upgrades"] == 1


def test_an_upgrade_that_fails_after_that_serves_tls_again(installed: Installed, tmp_path: Path) -> None:
    """TLS connections have ended by then, but new ones are served, also those that were in the middle of a header."""
    files = issue(tmp_path)
    file = tmp_path / "echod.toml"
    file.write_text(toml(files.keys, files.keys | {"proxy_protocol": True}))
    installed.prove_at_once()
    with installed.serving("-c", str(file), *SHORT) as echod, connect(echod.ports[1]) as proxied:
        proxied.sendall(V1[:10])
        with tls_connect(echod.ports[0]) as client:
            assert client.ask(b"one\n") == b"ONE\n"
            script = installed.directory / "one/bin/echod"
            script.write_text(script.read_text().replace("exit 0", f"{{ chmod a-x {script}; exit 0; }}", 1))
            echod.send(signal.SIGUSR2)
            assert client.read_to_end() == b""
        refused = echod.wait_for("upgrade refused")
        assert "permission denied" in refused["errors"][0]
        assert echod.wait_for("TLS connections finished")["connections"] == 1
        with tls_connect(echod.ports[0]) as client:
            assert client.ask(b"two\n") == b"TWO\n"
        proxied.sendall(V1[10:])
        other = TlsClient(proxied).handshake()
        assert other.ask(b"three\n") == b"THREE\n"


def test_a_proxy_header_on_a_tls_listener_crosses_an_upgrade(tmp_path: Path) -> None:
    """The part that was read crosses; the handshake is the next program's, with `allow` as it says now."""
    listen = issue(tmp_path).keys | {"proxy_protocol": True, "allow": ["192.0.2.0/24"]}
    with serving_listens(tmp_path, listen, listen | {"allow": ["10.0.0.0/8"]}, flags=SHORT) as echod:
        with connect(echod.ports[0]) as allowed, connect(echod.ports[1]) as denied:
            for client in (allowed, denied):
                client.sendall(V1[:20])
            for client in (allowed, denied):
                client.sendall(V1[20:30])
            upgrade(echod)
            denied.sendall(V1[30:])
            assert denied.recv(1) == b""
            allowed.sendall(V1[30:])
            assert TlsClient(allowed).handshake().ask(b"crossed\n") == b"CROSSED\n"
        assert echod.stats()["connections"]["rejected"]["denied"] == 1


def test_an_upgrade_without_tls_is_as_before() -> None:
    with serving() as echod, connect(echod.port) as client:
        client.sendall(b"begun")
        upgrade(echod)
        assert ask(client, b" and ended\n") == b"BEGUN AND ENDED\n"
        assert not echod.events_named("TLS connections finished")
