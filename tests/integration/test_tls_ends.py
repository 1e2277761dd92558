"""How TLS connections end at a stop and at a live upgrade, which they cannot cross."""

import asyncio
import random
import signal
import ssl
import time
from pathlib import Path

import pytest

from echod.telemetry.reasons import CloseReason
from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, read_line, serving, settings
from tests.support.installed import Installed
from tests.support.streams import upgrade
from tests.support.tls import TlsClient, client_context, issue, serving_listens, serving_tls, tls_connect, toml

SHORT = settings(timeouts_drain=1, timeouts_drain_quiet=0.1)

V1 = b"PROXY TCP4 192.0.2.9 198.51.100.2 40001 8888\r\n"


class Streamer:
    """Keeps lines in flight until the stream ends, and records how it ended."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.sent = bytearray()
        self.received = bytearray()
        self.error: Exception | None = None

    async def run(self, port: int, context: ssl.SSLContext | None) -> None:
        name = "localhost" if context else None
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
        self._send(writer, 16)
        try:
            while chunk := await reader.read(65_536):
                self.received += chunk
                if not writer.is_closing():
                    self._send(writer, chunk.count(b"\n"))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.error = error
        writer.close()

    def _send(self, writer: asyncio.StreamWriter, count: int) -> None:
        start = self.sent.count(b"\n")
        lines = b"".join(f"{self._name} line {start + n}.\n".encode() for n in range(count))
        self.sent += lines
        writer.write(lines)

    def check(self) -> None:
        """Assert that the replies answer a prefix of the lines, that none is torn, and that there was no reset."""
        assert self.error is None, f"{self._name}: {self.error!r}"
        assert self.received == self.sent.upper()[: len(self.received)], f"{self._name}: not a prefix"
        assert not self.received or self.received.endswith(b"\n"), f"{self._name}: torn reply"


async def _streamers(
    port: int, count: int, context: ssl.SSLContext | None
) -> tuple[list[Streamer], list["asyncio.Task[None]"]]:
    clients = [Streamer(f"client {number}") for number in range(count)]
    tasks = [asyncio.create_task(client.run(port, context)) for client in clients]
    end = time.monotonic() + DEADLINE_S
    while not all(client.received for client in clients):
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    return clients, tasks


# -- stop --------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_stop_under_load_delivers_every_reply(tmp_path: Path, full: bool) -> None:
    """Lines answered are a prefix of lines sent, no torn reply, no reset, exit 0."""
    issue(tmp_path)
    file = tmp_path / "echod.toml"
    file.write_text(toml({"tls_certificate": str(tmp_path / "server.pem"), "tls_key": str(tmp_path / "server.key")}))

    async def one_round(number: int) -> None:
        with Daemon("-c", str(file), *SHORT) as echod:
            await asyncio.to_thread(echod.wait_for, "ready")
            clients, tasks = await _streamers(echod.port, 20, client_context())
            await asyncio.sleep(random.Random(number).uniform(0, 0.3))
            echod.send(signal.SIGTERM)
            await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
            assert await asyncio.to_thread(echod.exit_status) == 0
            for client in clients:
                client.check()
            finished = echod.wait_for("drain finished")
            assert (finished["clean"], finished["cut"]) == (20, 0)
            closed = echod.events_named("connection closed")
            assert {event["reason"] for event in closed} == {CloseReason.DRAINED.value}
            # Every line echod says it answered reached its client.
            assert sum(event["lines"] for event in closed) == sum(client.received.count(b"\n") for client in clients)

    for number in range(50 if full else 5):
        asyncio.run(one_round(number))


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
    flags = settings(timeouts_drain=2, timeouts_drain_quiet=0.2)

    async def scenario(echod: Daemon) -> None:
        secret, plain = echod.ports
        secrets, ended = await _streamers(secret, 50, client_context())
        plains, going = await _streamers(plain, 50, None)
        partial = connect(plain)
        partial.sendall(b"begun before")
        done = await asyncio.to_thread(upgrade, echod)
        assert echod.events_named("TLS connections finished")[-1]["connections"] == 50
        await asyncio.wait_for(asyncio.gather(*ended), DEADLINE_S)
        for client in secrets:
            client.check()
        assert done["connections"] == 51
        known = [len(client.received) for client in plains]
        end = time.monotonic() + DEADLINE_S
        while not all(len(client.received) > before for client, before in zip(plains, known, strict=True)):
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        for client in plains:
            client.check()
        partial.sendall(b" and ended after\n")
        assert await asyncio.to_thread(read_line, partial) == b"BEGUN BEFORE AND ENDED AFTER\n"
        partial.close()
        again = await asyncio.to_thread(tls_connect, secret)
        assert await asyncio.to_thread(again.ask, b"again\n") == b"AGAIN\n"
        again.sock.close()
        for task in going:
            task.cancel()
        await asyncio.gather(*going, return_exceptions=True)

    with serving_listens(tmp_path, issue(tmp_path).keys, {}, flags=flags) as echod:
        asyncio.run(scenario(echod))
        counts = echod.stats()["connections"]
        assert counts["accepted"] == counts["open"] + sum(counts["closed"].values())
        assert counts["closed"]["drained"] == 50


def test_clients_that_come_meanwhile_wait_and_are_served_by_the_next_program(tmp_path: Path) -> None:
    flags = settings(timeouts_drain=5, timeouts_drain_quiet=1)
    with serving_tls(tmp_path, *flags) as echod, tls_connect(echod.port) as client:
        assert client.ask(b"one\n") == b"ONE\n"
        known = len(echod.events)
        echod.send(signal.SIGUSR2)
        echod.wait_for("upgrade proven", after=known)
        assert client.read_to_end() == b""
        client.sock.close()
        with tls_connect(echod.port) as late:
            assert late.ask(b"late\n") == b"LATE\n"
        echod.wait_for("upgrade done", after=known)
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
