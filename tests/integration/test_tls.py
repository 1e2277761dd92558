"""The protocol over TLS, as clients of TLS 1.2 and 1.3 see it, and the clients that do not get that far."""

import contextlib
import os
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.measurements import Usage
from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, read_to_end, settings, settled
from tests.support.reference import BROKEN, CASED, OTHERS, SPACES, reference
from tests.support.tls import (
    VERSIONS,
    TlsClient,
    authority,
    client_context,
    issue,
    serving_listens,
    serving_tls,
    tls_connect,
)

LIMIT = 65_536

GARBAGE = {
    "plain text": b"hello\nhow are you\n" * 3,
    "HTTP": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "garbage": bytes(range(256)) * 8,
    "huge record": b"\x16\x03\x01\xff\xff" + b"\x01\x00\xff\xfb" + b"a" * 70_000,
    "huge ClientHello": b"".join(
        b"\x16\x03\x01\x40\x00" + (b"\x01\xff\xff\xff" if n == 0 else b"a" * 4) + b"a" * 16_380 for n in range(40)
    ),
    "empty records": b"\x16\x03\x01\x00\x00" * 1000,
    "alert": b"\x15\x03\x03\x00\x02\x02\x28",
}


# -- protocol ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_the_protocol(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """Whatever is sent, the replies are those of the reference; an unterminated last line is answered."""
    texts = [
        " Straße \r\n\nlast".encode(),
        b"".join(b"%d %s\n" % (number, b"x" * (number % 97)) for number in range(2000)),
        "\n".join([*CASED, *SPACES, *OTHERS]).encode(),
        *(b"before\n" + broken + b"\n" for broken in BROKEN),
        b"a" * LIMIT + b"\n" + b"b" * LIMIT,
        b"before\n" + b"c" * (LIMIT + 1) + b"\nafter\n",
        b"",
    ]
    context = client_context(version)
    with serving_tls(tmp_path) as echod:
        for text in texts:
            with tls_connect(echod.port, context) as client:
                client.sendall(text)
                client.half_close()
                assert client.read_to_end() == reference(text, LIMIT, is_ended=True)
        stats = settled(echod, 0)
        assert stats["tls"]["handshakes"] == {"TLSv1.2": 0, "TLSv1.3": 0, "failed": 0} | {
            version.name.replace("_", "."): len(texts)
        }
        assert stats["connections"]["closed"]["reset"] == 0
        closed = echod.events_named("connection closed")
        assert {event["tls"] for event in closed} == {context.maximum_version.name.replace("_", ".")}
        assert "tls_subject" not in closed[0]
        assert echod.stop() == 0


def test_a_fin_without_close_notify_is_a_reset(tmp_path: Path) -> None:
    """The stream may have been cut, so the unterminated line is not answered."""
    with serving_tls(tmp_path) as echod, tls_connect(echod.port) as client:
        assert client.ask(b"one\n") == b"ONE\n"
        client.sendall(b"two")
        client.sock.shutdown(socket.SHUT_WR)
        assert echod.wait_for("connection closed")["reason"] == "reset"
        with pytest.raises(ssl.SSLError):
            client.recv()


def test_errors_and_timeouts_come_as_error_lines(tmp_path: Path) -> None:
    """The error line arrives through TLS, and after it close_notify."""
    flags = settings(timeouts_idle=0.3, timeouts_line=0.3)
    with serving_tls(tmp_path, *flags) as echod:
        for sent, reason in ((b"", "idle for 0.3 s"), (b"partial", "line not finished within 0.3 s")):
            with tls_connect(echod.port) as client:
                client.sendall(sent or b"\n")
                assert client.read_to_end() == (b"" if sent else b"\n") + f"ERROR {reason}\n".encode()
        closed = settled(echod, 0)["connections"]["closed"]
        assert (closed["idle"], closed["line timeout"]) == (1, 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_that_never_reads_is_aborted(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """It is bounded in memory, and its stream ends without close_notify, because replies are missing."""
    with serving_tls(tmp_path, *settings(timeouts_write=1)) as echod:
        with connect(echod.port, receive_buffer=4096) as sock, TlsClient(sock, client_context(version)) as client:
            client.handshake()
            before = Usage.of(echod.pid).rss_bytes
            sock.settimeout(0.2)
            with contextlib.suppress(TimeoutError, ConnectionError):
                while True:
                    client.sendall(b"no reply is read\n" * 960)
            assert echod.wait_for("connection closed")["reason"] == "write timeout"
            assert Usage.of(echod.pid).rss_bytes - before < 4_000_000
            sock.settimeout(DEADLINE_S)
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                client.read_to_end()


# -- limits ------------------------------------------------------------------------------------------------------------


def test_clients_over_a_limit_get_their_error_line_through_tls(tmp_path: Path) -> None:
    with serving_tls(tmp_path, *settings(limits_connections=1)) as echod, tls_connect(echod.port) as client:
        assert client.ask(b"one\n") == b"ONE\n"
        with tls_connect(echod.port) as second:
            assert second.read_to_end() == b"ERROR too many connections\n"
        assert client.ask(b"one\n") == b"ONE\n"
        assert echod.stats()["connections"]["rejected"]["limit"] == 1
    with serving_tls(tmp_path, *settings(limits_connections_per_address=1)) as echod, tls_connect(echod.port) as client:
        assert client.ask(b"one\n") == b"ONE\n"
        with tls_connect(echod.port) as second:
            assert second.read_to_end() == b"ERROR too many connections from your address\n"
    with serving_tls(tmp_path, *settings(limits_connection_rate=1)) as echod:
        lines = []
        for _ in range(3):
            with tls_connect(echod.port) as client:
                client.half_close()
                lines.append(client.read_to_end())
        assert lines.count(b"ERROR connecting too often from your address\n") >= 1
        rejected = echod.stats()["connections"]["rejected"]
        assert rejected["rate"] == len(lines) - lines.count(b"")


def test_one_address_cannot_hold_every_place_with_handshakes(tmp_path: Path) -> None:
    """As many of its handshakes may be under way as it may have connections; others are closed without a byte."""
    flags = settings(limits_connections_per_address=3, timeouts_handshake=60)
    with serving_listens(tmp_path, issue(tmp_path).keys, {}, flags=flags) as echod, contextlib.ExitStack() as stack:
        secret, plain = echod.ports
        silent = [stack.enter_context(connect(secret)) for _ in range(10)]
        assert [read_to_end(client) for client in silent[3:]] == [b""] * 7
        assert echod.stats()["connections"]["rejected"]["address"] == 7
        with connect(plain) as client:
            assert ask(client, b"plain\n") == b"PLAIN\n"
        silent[0].close()
        _failed(echod, 1, accepted=1)
        with tls_connect(secret) as served:
            assert served.ask(b"served\n") == b"SERVED\n"


def test_unix_sockets_speak_tls_too(tmp_path: Path) -> None:
    path = tmp_path / "echod.sock"
    with (
        serving_listens(tmp_path, issue(tmp_path).keys | {"address": f"unix:{path}"}),
        socket.socket(socket.AF_UNIX) as sock,
    ):
        sock.settimeout(DEADLINE_S)
        sock.connect(str(path))
        client = TlsClient(sock).handshake()
        assert client.ask(b"unix\n") == b"UNIX\n"
        client.half_close()
        assert client.read_to_end() == b""


# -- handshakes that fail ----------------------------------------------------------------------------------------------


def _failed(echod: Daemon, count: int, *, accepted: int = 0) -> None:
    """Wait until so many handshakes have failed, and assert that nothing else has been counted."""
    end = time.monotonic() + DEADLINE_S
    while (stats := echod.stats())["tls"]["handshakes"]["failed"] < count:
        assert time.monotonic() < end
    assert stats["tls"]["handshakes"]["failed"] == stats["connections"]["rejected"]["tls"] == count
    assert stats["connections"]["accepted"] == accepted


@pytest.mark.parametrize("kind", GARBAGE)
def test_what_is_no_handshake_is_rejected(tmp_path: Path, kind: str) -> None:
    """No traceback, and at most an alert in reply; memory and descriptors are as before."""
    with serving_tls(tmp_path, *settings(timeouts_handshake=1)) as echod:
        with tls_connect(echod.port) as client:
            client.half_close()
            client.read_to_end()
        settled(echod, 0)
        before = Usage.of(echod.pid)
        for _ in range(20):
            with connect(echod.port) as client, contextlib.suppress(ConnectionError):
                client.sendall(GARBAGE[kind])
                client.shutdown(socket.SHUT_WR)
                assert len(read_to_end(client)) <= 7
        end = time.monotonic() + DEADLINE_S
        while (
            echod.stats()["connections"]["rejected"]["tls"] < 20 or Usage.of(echod.pid).descriptors > before.descriptors
        ):
            assert time.monotonic() < end
        assert Usage.of(echod.pid).rss_bytes - before.rss_bytes < 3_000_000
        assert echod.stop() == 0


def test_half_a_handshake_ends_by_its_timeout_and_disturbs_nobody(tmp_path: Path) -> None:
    """Silent clients, and those that stop at any byte of their first flight."""
    with serving_tls(tmp_path, *settings(timeouts_handshake=1)) as echod, contextlib.ExitStack() as stack:
        hello = TlsClient(stack.enter_context(socket.socket())).hello()
        silent = [stack.enter_context(connect(echod.port)) for _ in range(20)]
        for number, client in enumerate(silent):
            client.sendall(hello[: number * len(hello) // 20])
        began = time.monotonic()
        with tls_connect(echod.port) as served:
            assert served.ask(b"served\n") == b"SERVED\n"
        assert time.monotonic() - began < 1
        for sock in silent:
            assert read_to_end(sock) == b""
        assert 0.9 < time.monotonic() - began < 3
        echod.wait_for("TLS handshake failed", why="not finished within 1 s")
        assert echod.stats()["connections"]["rejected"]["tls"] == 20


def test_a_client_that_leaves_during_its_handshake(tmp_path: Path) -> None:
    """By a reset or in order, before and after its first flight."""
    with serving_tls(tmp_path) as echod:
        with socket.socket() as sock:
            hello = TlsClient(sock).hello()
        for sent in (b"", hello[:100], hello):
            for is_reset in (False, True):
                with connect(echod.port) as client:
                    client.sendall(sent)
                    if is_reset:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        _failed(echod, 6)
        assert echod.stop() == 0


def test_old_versions_are_rejected(tmp_path: Path) -> None:
    """Those below `tls_minimum`, and TLS 1.0 and 1.1 always."""
    listens = [issue(tmp_path).keys, issue(tmp_path).keys | {"tls_minimum": "1.3"}]
    with serving_listens(tmp_path, *listens) as echod:
        ports = echod.ports
        for flag in ("-tls1", "-tls1_1"):
            assert "protocol version" in _probe(ports[0], flag, "-cipher", "ALL:@SECLEVEL=0")
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            tls_connect(ports[1], client_context(ssl.TLSVersion.TLSv1_2))
        with tls_connect(ports[1]) as client:
            assert client.version == "TLSv1.3"
        assert echod.stats()["connections"]["rejected"]["tls"] == 3


# -- what the openssl command line sees --------------------------------------------------------------------------------


def _probe(port: int, *flags: str, text: str = "Q\n") -> str:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost", *flags]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=DEADLINE_S)
    return done.stdout + done.stderr


def test_what_is_offered(tmp_path: Path) -> None:
    """TLS 1.2 and 1.3 with forward secrecy and authenticated ciphers, no compression, no renegotiation."""
    with serving_tls(tmp_path) as echod:
        for flag, version in (("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")):
            shown = _probe(echod.port, flag)
            assert f"New, {version}, Cipher is " in shown
            assert "Compression: NONE" in shown
        for cipher in ("ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"):
            assert f"Cipher is {cipher}" in _probe(echod.port, "-tls1_2", "-cipher", cipher)
        for weak in ("AES256-SHA", "aNULL", "NULL", "PSK", "ECDHE-ECDSA-AES256-SHA"):
            assert "Cipher is (NONE)" in _probe(echod.port, "-tls1_2", "-cipher", f"{weak}:@SECLEVEL=0"), weak
        # The server's order holds, whatever the client prefers.
        both = ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"]
        chosen = {_cipher(_probe(echod.port, "-tls1_2", "-cipher", ":".join(order))) for order in (both, both[::-1])}
        assert chosen == {"ECDHE-ECDSA-AES256-GCM-SHA384"}


def _cipher(shown: str) -> str:
    return shown.partition("Cipher is ")[2].partition("\n")[0]


def test_renegotiation_is_refused(tmp_path: Path) -> None:
    """The session goes on: s_client says that it is refused, and the line after it is answered."""
    command = ["openssl", "s_client", "-connect", "127.0.0.1:{}", "-tls1_2"]
    with serving_tls(tmp_path) as echod:
        command[3] = command[3].format(echod.port)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as openssl:
            assert openssl.stdin
            assert openssl.stdout
            os.set_blocking(openssl.stdout.fileno(), False)
            seen = b""
            for typed, wanted in ((b"before\n", b"BEFORE"), (b"R\n", b"no renegotiation")):
                openssl.stdin.write(typed)
                openssl.stdin.flush()
                end = time.monotonic() + DEADLINE_S
                while wanted not in seen:
                    assert time.monotonic() < end, seen
                    seen += openssl.stdout.read() or b""
                    time.sleep(0.01)
            openssl.kill()
        handshakes = settled(echod, 0)["tls"]["handshakes"]
        assert (handshakes["TLSv1.2"], handshakes["failed"]) == (1, 0)


def test_a_plain_listener_beside_a_tls_listener_serves_as_ever(tmp_path: Path) -> None:
    """Only the connections of the TLS listener have the field `tls`."""
    with serving_listens(tmp_path, issue(tmp_path).keys, {}) as echod:
        secret, plain = echod.ports
        with connect(plain) as client, tls_connect(secret) as other:
            assert ask(client, b"plain\n") == b"PLAIN\n"
            assert other.ask(b"secret\n") == b"SECRET\n"
        settled(echod, 0)
        assert ["tls" in event for event in echod.events_named("connection closed")].count(True) == 1


def test_a_client_that_does_not_trust_the_certificate_leaves(tmp_path: Path) -> None:
    """Its alert is a failed handshake; with TLS 1.3 the server may already have seen a client that left."""
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority("strangers").configure_trust(stranger)
    with serving_tls(tmp_path) as echod:
        with pytest.raises(ssl.SSLCertVerificationError):
            tls_connect(echod.port, stranger)
        assert echod.wait_for("TLS handshake failed")["why"] == "tlsv1 alert unknown ca"
        _failed(echod, 1)
