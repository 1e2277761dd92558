"""Who may connect: allow, deny and the connection rate, for each kind of address and behind a balancer."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_inheriting import activated
from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, read_to_end, settings
from tests.support.tls import issue, serving_listens, tls_connect, toml
from tests.unit.test_proxy_header import v2

TOO_OFTEN = b"ERROR connecting too often from your address\n"


def _header(host: str, version: int) -> bytes:
    if version == 1:
        return f"PROXY TCP{6 if ':' in host else 4} {host} {host} 40001 8888\r\n".encode()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = socket.inet_pton(family, host)
    return v2(0x21, 0x21 if ":" in host else 0x11, packed * 2 + b"\x9c\x41\x22\xb8")


def _rejected(echod: Daemon, reason: str) -> int:
    count: int = echod.stats()["connections"]["rejected"][reason]
    return count


def _is_served(sock: socket.socket) -> bool:
    """Whether a line is answered; otherwise assert that not a byte comes."""
    with sock:
        sock.settimeout(DEADLINE_S)
        sock.sendall(b"served\n")
        sock.shutdown(socket.SHUT_WR)
        received = read_to_end(sock)
        assert received in (b"SERVED\n", b"")
        return bool(received)


# -- allow and deny ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "is_served"),
    [
        ({"allow": ["127.0.0.0/8"]}, True),
        ({"allow": ["10.0.0.0/8", "127.0.0.1"]}, True),
        ({"allow": ["10.0.0.0/8"]}, False),
        ({"deny": ["127.0.0.0/8"]}, False),
        ({"deny": ["10.0.0.0/8"]}, True),
        ({"allow": ["127.0.0.0/8"], "deny": ["127.0.0.1/32"]}, False),
        ({"allow": ["::ffff:127.0.0.0/104"]}, True),
        ({"allow": ["::1"]}, False),
        ({"deny": ["::/0"]}, True),
        ({"deny": ["0.0.0.0/0"]}, False),
    ],
)
def test_a_denied_client_is_closed_without_a_byte(tmp_path: Path, rules: dict[str, Any], *, is_served: bool) -> None:
    """An IPv4 client of a dual-stack listener, whose address is IPv4-mapped, is seen as the IPv4 client that it is."""
    file = tmp_path / "echod.toml"
    file.write_text(toml(*({"address": f"systemd:{name}"} | rules for name in ("v4", "dual"))))
    with (
        socket.create_server(("127.0.0.1", 0)) as v4,
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as dual,
        activated(v4, dual, names="v4:dual", arguments=("-c", str(file))) as echod,
    ):
        for port in echod.ports:
            assert _is_served(connect(port)) == is_served
        counts = echod.stats()["connections"]
        assert counts["rejected"]["denied"] == (0 if is_served else 2)
        assert counts["accepted"] == (2 if is_served else 0)
        assert echod.stop() == 0


def test_ipv6_clients(tmp_path: Path) -> None:
    with serving_listens(
        tmp_path, {"address": "[::1]:0", "allow": ["::1/128"]}, {"address": "[::1]:0", "deny": ["::/16"]}
    ) as echod:
        allowed, denied = echod.ports
        assert _is_served(socket.create_connection(("::1", allowed)))
        assert not _is_served(socket.create_connection(("::1", denied)))


def test_unix_clients_are_exempt_from_everything(tmp_path: Path) -> None:
    path = tmp_path / "echod.sock"
    rules = {"address": f"unix:{path}", "allow": ["10.0.0.0/8"], "deny": ["0.0.0.0/0", "::/0"]}
    with serving_listens(tmp_path, rules, flags=settings(limits_connection_rate=1)):
        for _ in range(5):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(path))
            assert _is_served(client)


def test_a_denied_client_of_a_tls_listener_gets_no_handshake(tmp_path: Path) -> None:
    with serving_listens(tmp_path, issue(tmp_path).keys | {"deny": ["127.0.0.1"]}) as echod:
        with connect(echod.port) as client:
            client.sendall(b"\x16\x03\x01")
            assert read_to_end(client) == b""
        stats = echod.stats()
        assert stats["connections"]["rejected"]["denied"] == 1
        assert stats["connections"]["rejected"]["tls"] == stats["tls"]["handshakes"]["failed"] == 0


def test_a_reload_changes_the_rules_for_new_clients_only(tmp_path: Path) -> None:
    with serving_listens(tmp_path, {}) as echod, connect(echod.port) as established:
        (tmp_path / "echod.toml").write_text(toml({"deny": ["127.0.0.0/8"]}))
        assert "listen" in str(echod.reload("reload applied")["changed"])
        assert not _is_served(connect(echod.port))
        assert ask(established, b"still\n") == b"STILL\n"
        (tmp_path / "echod.toml").write_text(toml({}))
        echod.reload("reload applied")
        assert _is_served(connect(echod.port))


# -- behind a balancer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_the_address_in_the_proxy_header_decides(tmp_path: Path, version: int) -> None:
    """Not the balancer's own, which the rules would deny."""
    rules = {"proxy_protocol": True, "allow": ["192.0.2.0/24", "2001:db8::/32"], "deny": ["192.0.2.7"]}
    with serving_listens(tmp_path, rules) as echod:
        for host, is_served in (
            ("192.0.2.1", True),
            ("192.0.2.7", False),
            ("198.51.100.1", False),
            ("2001:db8::1", True),
            ("2001:db9::1", False),
            ("::ffff:192.0.2.1", True),
            ("::ffff:192.0.2.7", False),
        ):
            client = connect(echod.port)
            client.sendall(_header(host, version))
            assert _is_served(client) == is_served, host
        assert _rejected(echod, "denied") == 4


@pytest.mark.parametrize("header", [b"PROXY UNKNOWN\r\n", v2(0x20, 0x00, b"")], ids=["UNKNOWN", "LOCAL"])
def test_without_an_address_in_the_header_the_balancer_s_own_decides(tmp_path: Path, header: bytes) -> None:
    """So a balancer's health checks need its address in `allow`."""
    for allow, is_served in (["192.0.2.0/24"], False), (["192.0.2.0/24", "127.0.0.1"], True):
        with serving_listens(tmp_path, {"proxy_protocol": True, "allow": allow}) as echod:
            client = connect(echod.port)
            client.sendall(header)
            assert _is_served(client) == is_served


def test_whoever_may_connect_to_a_proxied_listener_is_believed(tmp_path: Path) -> None:
    """A header can name any address, so `deny` is no protection from those who can write one: a firewall is.

    A listener without `proxy_protocol` takes the header for a line: there, an address cannot be forged.
    """
    rules = {"deny": ["127.0.0.0/8"]}
    with serving_listens(tmp_path, rules | {"proxy_protocol": True}, rules) as echod:
        proxied, direct = echod.ports
        forger = connect(proxied)
        forger.sendall(_header("192.0.2.1", 1))
        assert _is_served(forger)
        with connect(direct) as client:
            client.sendall(_header("192.0.2.1", 1))
            assert read_to_end(client) == b""
        assert _rejected(echod, "denied") == 1


@pytest.mark.parametrize("version", [1, 2])
def test_the_header_comes_first_and_then_the_handshake(tmp_path: Path, version: int) -> None:
    """In one packet, or byte by byte."""
    with serving_listens(tmp_path, issue(tmp_path).keys | {"proxy_protocol": True}) as echod:
        header = _header("192.0.2.9", version)
        with tls_connect(echod.port, before=header) as client:
            assert client.ask(b"one\n") == b"ONE\n"
        assert echod.wait_for("connection closed")["peer"] == "192.0.2.9:40001"
        with connect(echod.port) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in header:
                sock.sendall(bytes([byte]))
        with connect(echod.port) as sock:
            sock.sendall(b"\x16\x03\x01\x02\x00\x01")
            assert read_to_end(sock) == b""
        assert _rejected(echod, "proxy") == 1


# -- rate --------------------------------------------------------------------------------------------------------------


def _served(port: int, before: bytes = b"") -> bool:
    with connect(port) as client:
        client.sendall(before + b"served\n")
        client.shutdown(socket.SHUT_WR)
        received = read_to_end(client)
        assert received in (b"SERVED\n", TOO_OFTEN)
        return received == b"SERVED\n"


def test_a_burst_is_served_and_then_the_rate(tmp_path: Path) -> None:
    """The others get their error line; a second later there is room again."""
    with serving_listens(tmp_path, {}, flags=settings(limits_connection_rate=10)) as echod:
        began = time.monotonic()
        served = sum(_served(echod.port) for _ in range(40))
        seconds = time.monotonic() - began
        assert 10 <= served <= 11 + 10 * seconds
        assert _rejected(echod, "rate") == 40 - served
        time.sleep(1.1)  # the rate's own time: the bucket of one second's worth is empty again
        assert _served(echod.port)


def test_each_address_has_its_own_rate(tmp_path: Path) -> None:
    """Behind a balancer the client's counts; of IPv6 addresses the first 64 bits."""
    listen = {"proxy_protocol": True}
    with serving_listens(tmp_path, listen, flags=settings(limits_connection_rate=1)) as echod:
        headers = [_header(host, 1) for host in ("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8:0:1::1")]
        assert [_served(echod.port, header) for header in headers] == [True] * 4
        again = [_header(host, 1) for host in ("192.0.2.1", "::ffff:192.0.2.2", "2001:db8::2", "2001:db8:0:1::2")]
        began = time.monotonic()
        served = [_served(echod.port, header) for header in again]
        assert served == [False] * 4 or time.monotonic() - began > 0.5


def test_a_reload_changes_the_rate(tmp_path: Path) -> None:
    with serving_listens(tmp_path, {}) as echod:
        assert all(_served(echod.port) for _ in range(20))
        (tmp_path / "echod.toml").write_text(toml({}, more="[limits]\nconnection_rate = 1\n"))
        assert echod.reload("reload applied")["changed"] == ["limits.connection_rate"]
        assert not all(_served(echod.port) for _ in range(5))
