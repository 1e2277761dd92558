"""Behind a balancer: clients whose PROXY header names their address are served, counted and logged with it."""

import contextlib
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echod.net.sockets import _NETLINK_SOCK_DIAG, _NLM_F_REQUEST, _SOCK_DIAG_BY_FAMILY
from tests.integration.test_inheriting import activated, two_sockets
from tests.support.daemon import (
    DEADLINE_S,
    Daemon,
    Event,
    ask,
    connect,
    free_port,
    read_line,
    read_to_end,
    serving,
    settings,
    with_constants,
)
from tests.support.installed import Installed
from tests.support.streams import upgrade
from tests.unit.test_proxy_header import BAD, GOOD, IPV4, IPV6, v2

V1 = b"PROXY TCP4 192.0.2.1 198.51.100.2 40001 8888\r\n"
HEADER_S = 5


@pytest.fixture
def patient(installed: Installed) -> Installed:
    """Wait longer for a header, for tests in which it may take long on a busy machine."""
    installed.add("patient", {"server.proxy_handshake": "HEADER_S = 60.0"})
    installed.switch("patient")
    return installed


@contextlib.contextmanager
def proxied(directory: Path, *arguments: str, address: str = "127.0.0.1:0", **options: Any) -> Iterator[Daemon]:
    """Run an echod whose clients send a PROXY header."""
    with serving("-c", str(_told(directory, address)), *arguments, **options) as echod:
        yield echod


def _told(directory: Path, address: str, *, is_proxied: bool = True) -> Path:
    file = directory / "echod.toml"
    file.write_text(f'[[listen]]\naddress = "{address}"\nproxy_protocol = {str(is_proxied).lower()}\n')
    return file


def _v1(host: str) -> bytes:
    return f"PROXY TCP{6 if ':' in host else 4} {host} {host} 40001 8888\r\n".encode()


def _counted(echod: Daemon) -> Event:
    """Return the counters, which are consistent."""
    counted: Event = echod.stats()["connections"]
    assert counted["accepted"] == counted["open"] + sum(counted["closed"].values())
    return counted


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def _taken(client: socket.socket) -> None:
    """Wait until echod has read everything that was sent, unless it stays unread."""
    end = time.monotonic() + DEADLINE_S
    while _unread(client):
        assert time.monotonic() < end, "not read"


def _unread(client: socket.socket) -> int:
    """Return the bytes that the other end has not read: sock_diag(7), because /proc/net/tcp is long."""
    (host, port), (own_host, own_port) = client.getpeername(), client.getsockname()
    sides = struct.pack("!HH16s16s", port, own_port, socket.inet_aton(host), socket.inet_aton(own_host))
    head = struct.pack("=IHHII", 72, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    query = struct.pack("=BBxxI", socket.AF_INET, socket.IPPROTO_TCP, 0xFFFFFFFF) + sides + bytes(4) + b"\xff" * 8
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diagnosis:
        diagnosis.send(head + query)
        kind, unread = struct.unpack_from("=4xH66xI", diagnosis.recv(8192))
    assert kind == _SOCK_DIAG_BY_FAMILY, "no such connection"
    return int(unread)


# -- clients with a header ---------------------------------------------------------------------------------------------

PEERS = {
    V1: "192.0.2.1:40001",
    v2(0x21, 0x11, IPV4): "192.0.2.1:40001",
    _v1("2001:db8::1"): "[2001:db8::1]:40001",
    v2(0x21, 0x21, IPV6): "[2001:db8::1]:40001",
    v2(0x21, 0x31, b"/run/client".ljust(216, b"\0")): "unix:/run/client",
    v2(0x21, 0x31, b"/\xff\n".ljust(216, b"\0")): r"unix:/\udcff\n",
    v2(0x21, 0x31, bytes(216)): "unix",
}
NONE_TOLD = (b"PROXY UNKNOWN\r\n", v2(0x20, 0x00), v2(0x21, 0x00), v2(0x20, 0x11, IPV4))


def _client(target: str | tuple[str, int]) -> socket.socket:
    if isinstance(target, tuple):
        return socket.create_connection(target, DEADLINE_S)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE_S)
    client.connect(target)
    return client


@pytest.mark.parametrize("family", ["IPv4", "IPv6", "Unix"])
def test_the_log_names_the_real_client(tmp_path: Path, family: str) -> None:
    """Its family may differ from the socket's; LOCAL and UNKNOWN keep the socket's peer; no text is lost."""
    path = str(tmp_path / "sock")
    address = {"IPv4": "127.0.0.1:0", "IPv6": "[::1]:0", "Unix": f"unix:{path}"}[family]
    with proxied(tmp_path, address=address) as echod:
        for header, peer in (*PEERS.items(), *((header, None) for header in NONE_TOLD)):
            known = len(echod.events)
            with _client(path if family == "Unix" else (address.rpartition(":")[0].strip("[]"), echod.port)) as client:
                name = client.getsockname()
                client.sendall(header + b"hello\nPROXY is but a word here\r\nbye")
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == b"HELLO\nPROXY IS BUT A WORD HERE\nBYE\n"
            closed = echod.wait_for("connection closed", after=known, lines=3)
            own = "unix" if family == "Unix" else f"[::1]:{name[1]}" if family == "IPv6" else f"127.0.0.1:{name[1]}"
            assert (closed["peer"], closed["bytes_in"]) == (peer or own, 35), header
        assert _counted(echod)["accepted"] == len(PEERS) + len(NONE_TOLD)


@pytest.mark.parametrize("header", NONE_TOLD)
def test_a_balancer_s_health_check_that_ends_with_a_reset_counts_as_client(tmp_path: Path, header: bytes) -> None:
    """A header without a client, no further byte, and a reset; with a byte after the header it counts as a reset."""
    with proxied(tmp_path) as echod:
        for sent, reason in ((b"", "client"), (b"hello\n", "reset")):
            with connect(echod.port) as client:
                client.sendall(header + sent)
                _until(lambda: _counted(echod)["open"] == 1)
                if sent:
                    assert client.recv(100) == b"HELLO\n"
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            _until(lambda: _counted(echod)["open"] == 0)
            assert _counted(echod)["closed"][reason] == 1, header


@pytest.mark.parametrize("header", [V1, v2(0x21, 0x21, IPV6 + b"\x04\x00\x05extra")])
def test_a_header_may_arrive_in_any_two_pieces(tmp_path: Path, header: bytes) -> None:
    """Wherever it is split, with the client's text behind it or later, every line is answered."""
    whole = header + b"hello\n"
    with proxied(tmp_path) as echod:
        for length in range(1, len(whole)):
            with connect(echod.port) as client:
                client.sendall(whole[:length])
                _taken(client)
                client.sendall(whole[length:])
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == b"HELLO\n", length
        counted = _counted(echod)
        assert (counted["accepted"], counted["rejected"]["proxy"]) == (len(whole) - 1, 0)


def test_a_header_may_arrive_byte_by_byte(patient: Installed, tmp_path: Path) -> None:
    """The client is counted only when the header is complete."""
    with patient.serving("-c", str(_told(tmp_path, "127.0.0.1:0"))) as echod, connect(echod.port) as client:
        for byte in V1[:-1]:
            client.sendall(bytes([byte]))
            _taken(client)
        before = _counted(echod)
        assert (before["open"], before["accepted"], sum(before["rejected"].values())) == (0, 0, 0)
        client.sendall(V1[-1:])
        assert ask(client, b"hello\n") == b"HELLO\n"
        assert _counted(echod)["open"] == 1


# -- clients without a header ------------------------------------------------------------------------------------------


def test_a_bad_header_closes_without_a_byte(tmp_path: Path) -> None:
    """There is no reset either, however much input follows; the client counts only as rejected."""
    with proxied(tmp_path, "--log-level", "debug") as echod:
        for name, header in BAD.items():
            with connect(echod.port) as client:
                client.sendall(header + b"\r\nhello\n" * 5000)
                assert read_to_end(client) == b"", name
        counted = _counted(echod)
        assert counted["rejected"] == dict.fromkeys(counted["rejected"], 0) | {"proxy": len(BAD)}
        assert (counted["accepted"], counted["open"]) == (0, 0)
        assert len(echod.events_named("no PROXY header")) == len(BAD)
        with connect(echod.port) as client:
            assert ask(client, V1 + b"hello\n") == b"HELLO\n"


@pytest.mark.parametrize("sent", [b"", V1[:20], v2(0x21, 0x11, IPV4)[:-1]])
def test_a_client_that_closes_before_its_header_is_complete(tmp_path: Path, sent: bytes) -> None:
    """It sees our end of stream if it ended its own; a reset is noticed; both are counted."""
    with proxied(tmp_path) as echod:
        with connect(echod.port) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == b""
        with connect(echod.port) as client:
            client.sendall(sent)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        while _counted(echod)["rejected"]["proxy"] < 2:
            pass
        assert _counted(echod)["accepted"] == 0


def test_the_time_for_a_header_is_limited(tmp_path: Path) -> None:
    """It counts from the accept, however slowly the header arrives, and other clients are served meanwhile."""
    header_s = 2.0
    with proxied(tmp_path, command=with_constants(f"server.proxy_handshake.HEADER_S = {header_s}")) as echod:
        began_at = time.monotonic()
        with connect(echod.port) as silent, connect(echod.port) as dribbling, connect(echod.port) as quick:
            silent.settimeout(0.2)
            quick.sendall(V1)
            for byte in V1[:12]:
                dribbling.sendall(bytes([byte]))
                assert ask(quick, b"hello\n") == b"HELLO\n"
                with contextlib.suppress(TimeoutError):
                    assert silent.recv(1) == b""
                    break
            silent.settimeout(DEADLINE_S)
            assert (read_to_end(silent), read_to_end(dribbling)) == (b"", b"")
            took_s = time.monotonic() - began_at
            assert header_s - 0.1 <= took_s < header_s + 2
            assert ask(quick, b"hello\n") == b"HELLO\n"
        counted = _counted(echod)
        assert (counted["rejected"]["proxy"], counted["accepted"]) == (2, 1)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_the_limit_per_address_applies_to_the_real_client(tmp_path: Path) -> None:
    """Its spelling does not matter; the balancer does not count, nor do clients of Unix sockets."""
    unix = v2(0x21, 0x31, b"/run/client".ljust(216, b"\0"))
    with (
        proxied(tmp_path, *settings(limits_connections_per_address=2)) as echod,
        contextlib.ExitStack() as clients,
    ):

        def told(header: bytes) -> bytes:
            return ask(clients.enter_context(connect(echod.port)), header + b"hello\n")

        for one, same in (("192.0.2.1", "::ffff:c000:201"), ("2001:db8::1", "2001:0DB8:0::1")):
            assert [told(_v1(one)), told(_v1(same))] == [b"HELLO\n"] * 2
            assert told(_v1(one)) == told(_v1(same)) == b"ERROR too many connections from your address\n"
        assert [told(_v1("192.0.2.2")), *(told(unix) for _ in range(3))] == [b"HELLO\n"] * 4
        counted = _counted(echod)
        assert (counted["accepted"], counted["rejected"]["address"]) == (8, 4)


def test_clients_without_a_complete_header_count_in_the_limit(tmp_path: Path) -> None:
    """They hold a descriptor: the next client beyond the limit is rejected, and they are admitted later."""
    with (
        proxied(tmp_path, *settings(limits_connections=2)) as echod,
        connect(echod.port) as one,
        connect(echod.port) as two,
    ):
        one.sendall(V1[:5])
        two.sendall(V1[:5])
        with connect(echod.port) as three:
            three.sendall(V1)
            assert read_to_end(three) == b"ERROR too many connections\n"
        counted = _counted(echod)
        assert (counted["open"], counted["accepted"], counted["rejected"]["limit"]) == (0, 0, 1)
        assert [ask(client, V1[5:] + b"hello\n") for client in (one, two)] == [b"HELLO\n"] * 2
        one.close()
        two.close()
        echod.wait_for("connection closed", lines=1)
        while _counted(echod)["open"]:
            pass
        with connect(echod.port) as four:
            assert ask(four, V1 + b"hello\n") == b"HELLO\n"


# -- which listeners ---------------------------------------------------------------------------------------------------


def test_a_reload_changes_an_existing_listener(tmp_path: Path) -> None:
    """It applies to later clients, without a restart; connected clients and handshakes under way continue."""
    address = f"127.0.0.1:{free_port()}"
    plain, told = b"PROXY TCP4 192.0.2.1 198.51.100.2 40001 8888\n", b"hello\n"
    with serving("-c", str(_told(tmp_path, address, is_proxied=False))) as echod, connect(echod.port) as old:
        assert ask(old, V1) == plain
        _told(tmp_path, address)
        applied = echod.reload("reload applied")
        assert (applied["changed"], applied["restart_needed"]) == (["listen"], [])
        with connect(echod.port) as new, connect(echod.port) as half:
            half.sendall(V1[:10])
            _taken(half)
            assert ask(new, V1 + told) == b"HELLO\n"
            _told(tmp_path, address, is_proxied=False)
            assert echod.reload("reload applied")["restart_needed"] == []
            with connect(echod.port) as newest:
                assert ask(newest, V1) == plain
            assert ask(half, V1[10:] + told) == b"HELLO\n"
            assert [ask(client, told) for client in (old, new)] == [b"HELLO\n"] * 2


def test_each_listener_has_its_own_setting(tmp_path: Path) -> None:
    """A listener with the PROXY protocol beside one without; a removed listener waits for its handshakes."""
    file = tmp_path / "echod.toml"
    plain = f'[[listen]]\naddress = "unix:{tmp_path}/sock"\n'
    file.write_text(f'{plain}[[listen]]\naddress = "127.0.0.1:0"\nproxy_protocol = true\n')
    with serving("-c", str(file)) as echod, connect(echod.port) as half, socket.socket(socket.AF_UNIX) as direct:
        direct.connect(f"{tmp_path}/sock")
        direct.settimeout(DEADLINE_S)
        assert ask(direct, b"proxy\n") == b"PROXY\n"
        half.sendall(V1[:10])
        _taken(half)
        file.write_text(plain)
        echod.reload("reload applied")
        assert ask(half, V1[10:] + b"hello\n") == b"HELLO\n"
        assert _counted(echod)["rejected"]["proxy"] == 0


def test_an_inherited_socket_takes_the_settings_of_its_entry(tmp_path: Path) -> None:
    """It is matched by name; a socket without an entry has the defaults."""
    file = _told(tmp_path, "systemd:web")
    with two_sockets() as (one, other), activated(one, other, names="x:web", arguments=("-c", str(file))) as echod:
        web, rest = echod.ports
        assert [web, rest] == [other.getsockname()[1], one.getsockname()[1]]
        with connect(web) as client, connect(rest) as direct:
            assert ask(client, V1 + b"hello\n") == b"HELLO\n"
            assert ask(direct, b"proxy\n") == b"PROXY\n"
        assert echod.stop() == 0


def test_the_self_probe_needs_no_header(tmp_path: Path) -> None:
    """The watchdog is notified, and the probe is not counted."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(DEADLINE_S)
        environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "400000"}
        with proxied(tmp_path, environment=environment) as echod:
            fed = 0
            while fed < 4:
                fed += manager.recv(4096).count(b"WATCHDOG=1")
            assert sum(_counted(echod)["rejected"].values()) == 0


# -- a stop ------------------------------------------------------------------------------------------------------------


def test_a_drain_waits_for_a_header(tmp_path: Path) -> None:
    """The client connected before the stop and is served."""
    with proxied(tmp_path, *settings(timeouts_drain_quiet=0.2)) as echod, connect(echod.port) as client:
        client.sendall(V1[:10])
        _taken(client)
        echod.send(signal.SIGTERM)
        echod.wait_for("drain progress", connections=0)
        client.sendall(V1[10:] + b"hello\n")
        assert read_to_end(client) == b"HELLO\n"
        assert echod.exit_status() == 0
        assert echod.wait_for("drain finished")["clean"] == 1


def test_a_drain_ends_without_the_header(tmp_path: Path) -> None:
    """The drain waits no longer than for any client; a client with half a header sees the end of the stream."""
    with proxied(tmp_path, *settings(timeouts_drain=1)) as echod, connect(echod.port) as client:
        client.sendall(V1[:10])
        _taken(client)
        began_at = time.monotonic()
        echod.send(signal.SIGTERM)
        assert read_to_end(client) == b""
        client.close()
        assert echod.exit_status() == 0
        assert 1 <= time.monotonic() - began_at < 3.5
        assert echod.wait_for("drain finished", clean=0, cut=0)


def test_a_second_signal_ends_the_wait(tmp_path: Path) -> None:
    """A client without a complete header is owed nothing."""
    with proxied(tmp_path) as echod, connect(echod.port) as client:
        client.sendall(V1[:10])
        _taken(client)
        began_at = time.monotonic()
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started")
        echod.send(signal.SIGTERM)
        assert echod.exit_status() == 0
        assert time.monotonic() - began_at < 3
        with contextlib.suppress(ConnectionResetError):
            assert read_to_end(client) == b""


# -- an upgrade --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [V1, v2(0x21, 0x11, IPV4)])
def test_a_header_crosses_an_upgrade(patient: Installed, tmp_path: Path, header: bytes) -> None:
    """The part that was read is kept, the rest is read by the next program, and the listener keeps its setting."""
    told = _told(tmp_path, "127.0.0.1:0")
    with patient.serving("-c", str(told)) as echod, contextlib.ExitStack() as clients:
        split = [0, 1, 13, len(header) - 1]
        waiting = [(clients.enter_context(connect(echod.port)), length) for length in split]
        for client, length in waiting:
            client.sendall(header[:length])
            _taken(client)
        for _ in range(2):
            upgrade(echod)
        assert (_counted(echod)["accepted"], _counted(echod)["open"]) == (0, 0)
        for client, length in waiting:
            client.sendall(header[length:] + b"hello\n")
            assert read_line(client) == b"HELLO\n"
            client.close()
            assert echod.wait_for("connection closed", peer="192.0.2.1:40001", bytes_in=6)
        with connect(echod.port) as bad:
            assert ask(bad, b"no header\n") == b""
        counted = _counted(echod)
        assert (counted["accepted"], counted["rejected"]["proxy"]) == (len(split), 1)


def test_a_listener_that_an_upgrade_removes_keeps_its_setting(tmp_path: Path) -> None:
    """Clients in its backlog at the upgrade are served by the next program as by this one."""
    plain = f'[[listen]]\naddress = "unix:{tmp_path}/sock"\n'
    (file := tmp_path / "echod.toml").write_text(f'{plain}[[listen]]\naddress = "127.0.0.1:0"\nproxy_protocol = true\n')
    with serving("-c", str(file)) as echod, contextlib.ExitStack() as clients:
        file.write_text(plain)
        port, known = echod.port, len(echod.events)
        echod.send(signal.SIGUSR2)
        echod.wait_for("upgrade proven", after=known)
        waiting = []
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                waiting.append(clients.enter_context(connect(port)))
                waiting[-1].sendall(V1 + b"hello\n")
                time.sleep(0.002)
        assert {read_line(client) for client in waiting} == {b"HELLO\n"}
        assert echod.wait_for("upgrade done", after=known)["listen"] == [f"unix:{tmp_path}/sock"]
        assert _counted(echod)["accepted"] == len(waiting)


def test_the_time_for_a_header_continues_across_an_upgrade(tmp_path: Path) -> None:
    """It is five seconds from the accept, not from the upgrade."""
    with proxied(tmp_path) as echod:
        port, began_at = echod.port, time.monotonic()
        changed_at = began_at
        with connect(port) as client:
            client.sendall(V1[:10])
            _taken(client)
            while changed_at < began_at + 1:  # a slow machine takes its time for one upgrade
                gap_s = upgrade(echod)["gap_ms"] / 1000
                changed_at = time.monotonic() - gap_s
            assert read_to_end(client) == b""
            assert began_at + HEADER_S <= time.monotonic() < changed_at + HEADER_S - 0.25


# -- probes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_proxied", [False, True])
@pytest.mark.parametrize("level", ["info", "debug"])
def test_a_balancer_s_probes_do_not_flood_the_log(tmp_path: Path, level: str, is_proxied: bool) -> None:
    """A connection without a line is logged at debug, whether it is closed or reset."""
    header = v2(0x20, 0x00) if is_proxied else b""
    told = _told(tmp_path, "127.0.0.1:0", is_proxied=is_proxied)
    with serving("-c", str(told), "--log-level", level) as echod:
        for ends_how in (b"\0\0\0\0\0\0\0\0", b"\1\0\0\0\0\0\0\0") * 3:
            with connect(echod.port) as probe:
                probe.sendall(header)
                while not _counted(echod)["open"]:
                    pass
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ends_how)
            while _counted(echod)["open"]:
                pass
        with connect(echod.port) as client:
            assert ask(client, header + b"hello\n") == b"HELLO\n"
        echod.wait_for("connection closed", lines=1)
        assert len(echod.events_named("connection closed")) == (7 if level == "debug" else 1)
        assert _counted(echod)["accepted"] == 7


# -- a balancer --------------------------------------------------------------------------------------------------------


@pytest.fixture
def haproxy() -> str:
    if not (found := shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")):
        pytest.skip("no haproxy here (Debian: apt-get install haproxy)")
    return found


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_behind_haproxy(tmp_path: Path, haproxy: str, version: str, host: str) -> None:
    """Headers of both versions with their TLVs; its health checks are neither logged nor rejected."""
    with proxied(tmp_path) as echod, socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
        free.close()
        (tmp_path / "haproxy.cfg").write_text(
            "defaults\n mode tcp\n timeout connect 5s\n timeout client 20s\n timeout server 20s\n"
            f"frontend front\n bind {host}:{port}\n unique-id-format %ci:%cp\n default_backend back\n"
            f"backend back\n server echod 127.0.0.1:{echod.port} {version} check inter 100\n"
        )
        with _running(haproxy, "-db", "-f", str(tmp_path / "haproxy.cfg")):
            with _connected(host, port) as client:
                name = client.getsockname()[1]
                assert ask(client, b"hello\n") == b"HELLO\n"
                while _counted(echod)["accepted"] < 4:  # the probes
                    pass
                client.sendall(b"bye")
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == b"BYE\n"
        closed = echod.wait_for("connection closed")
        assert closed["peer"] == (f"[{host}]:{name}" if ":" in host else f"{host}:{name}")
        assert len(echod.events_named("connection closed")) == 1
        assert _counted(echod)["rejected"]["proxy"] == 0


@contextlib.contextmanager
def _running(*command: str) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


def _connected(host: str, port: int) -> socket.socket:
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            return socket.create_connection((host, port), DEADLINE_S)
        except ConnectionRefusedError:
            assert time.monotonic() < end


def test_every_valid_header_is_followed_by_service(tmp_path: Path) -> None:
    """Whatever it contains, the client behind it gets its reply."""
    with proxied(tmp_path) as echod:
        for name, (header, *_) in GOOD.items():
            with connect(echod.port) as client:
                assert ask(client, header + b"hello\n") == b"HELLO\n", name
