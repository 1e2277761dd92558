"""Listening sockets: what binds, what doesn't and why, and what the kernel still delivers while one is being closed."""

import fcntl
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from echod import sockets
from echod.address import TcpAddress, UnixAddress
from tests.daemon import DEADLINE_S

Sockets = dict[sockets.Key, sockets.Bound | None]

ANY = TcpAddress("127.0.0.1", 0)


@pytest.fixture
def opened() -> Iterator[Sockets]:
    """A dict whose sockets are closed at the end."""
    found: Sockets = {}
    yield found
    sockets.discard(found)


def _names(found: Sockets) -> list[str]:
    return [sockets.peer_name(bound.socket.family, bound.socket.getsockname()) for bound in found.values() if bound]


def test_several_free_ports_can_be_asked_for(opened: Sockets) -> None:
    """Port 0 twice means two listeners; a kept one is not bound again."""
    opened |= sockets.listen_all([ANY, ANY])
    assert len(set(_names(opened))) == 2
    again = sockets.listen_all([ANY, ANY, ANY], kept=opened)
    try:
        assert [bound is None for bound in again.values()] == [True, True, False]
    finally:
        sockets.discard(again)


def test_all_or_nothing_with_every_fault(tmp_path: Path) -> None:
    """One address that can't be had leaves none bound, and each fault is named."""
    path = tmp_path / "sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(sockets.BindErrors) as raised:
            sockets.listen_all([UnixAddress(str(path)), TcpAddress("127.0.0.1", port), TcpAddress("192.0.2.1", 1)])
    assert not path.exists()
    assert [fault.partition("; ")[0] for fault in raised.value.faults] == [
        f"127.0.0.1:{port}: address already in use",
        "192.0.2.1:1: not an address of this machine",
    ]


def test_a_host_name_stands_for_each_of_its_addresses() -> None:
    """`localhost` may be IPv4 and IPv6; an unknown host is a fault that says so."""
    endpoints = sockets.resolve(TcpAddress("localhost", 7))
    assert endpoints
    assert {str(endpoint) for endpoint in endpoints} <= {"127.0.0.1:7", "[::1]:7"}
    with pytest.raises(sockets.BindError, match=re.escape("no.such.host.invalid:7: unknown host")):
        sockets.resolve(TcpAddress("no.such.host.invalid", 7))
    with pytest.raises(sockets.BindError, match="unknown host"):
        sockets.resolve(TcpAddress("x" * 64 + ".invalid", 7))


def test_both_wildcards_can_be_listed(opened: Sockets) -> None:
    """[::] means IPv6 alone, so 0.0.0.0 can be listed beside it."""
    opened |= sockets.listen_all([TcpAddress("0.0.0.0", 0)])
    port = int(_names(opened)[0].rpartition(":")[2])
    opened |= sockets.listen_all([TcpAddress("::", port)])
    assert len(opened) == 2


def test_a_low_port_without_the_privilege_says_what_is_needed() -> None:
    """A port below 1024 needs CAP_NET_BIND_SERVICE, and the message says so."""
    unprivileged = (
        "import os; from echod import sockets; from echod.address import TcpAddress\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: sockets.listen_all([TcpAddress('127.0.0.1', 7)])\n"
        "except sockets.BindErrors as error: print(error)"
    )
    if os.geteuid() != 0 or int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 7:
        pytest.skip("needs root to give up, and low ports that are privileged")
    done = subprocess.run([sys.executable, "-c", unprivileged], capture_output=True, text=True, timeout=DEADLINE_S)
    assert "127.0.0.1:7: permission denied; a port below 1024 needs CAP_NET_BIND_SERVICE" in done.stdout, done.stderr


def test_a_socket_file_in_a_folder_that_another_binds_in_is_left_to_it(tmp_path: Path) -> None:
    """Two that start at once can't both take a stale file for theirs."""
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(sockets.BindErrors, match="another process is binding in this folder"):
            sockets.listen_all([UnixAddress(str(tmp_path / "sock"))])
    finally:
        os.close(folder)
    with pytest.raises(sockets.BindErrors, match="no such file or directory"):
        sockets.listen_all([UnixAddress(str(tmp_path / "missing" / "sock"))])


def test_a_unix_listener_with_a_full_backlog_is_alive(tmp_path: Path) -> None:
    """A live socket file is an error, also when its owner is too busy to accept."""
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)
        with pytest.raises(sockets.BindErrors, match="already in use"):
            sockets.listen_all([UnixAddress(path)])


def test_names_of_peers() -> None:
    """A socket address as people write it."""
    assert sockets.peer_name(socket.AF_INET, ("10.0.0.1", 80)) == "10.0.0.1:80"
    assert sockets.peer_name(socket.AF_INET6, ("::1", 80, 0, 0)) == "[::1]:80"
    assert sockets.peer_name(socket.AF_UNIX, "") == "unix"
    assert sockets.peer_name(socket.AF_UNIX, "/run/x") == "unix:/run/x"
    assert sockets.peer_name(socket.AF_INET, None) == "unknown"


def test_bytes_on_their_way_are_told() -> None:
    """What has arrived and was not read (SIOCINQ), and what the peer's kernel acknowledged (SIOCOUTQ)."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with closing(accepted):
            client.sendall(b"12345")
            accepted.recv(1, socket.MSG_PEEK)
            assert sockets.unread_bytes(accepted.fileno()) == 5
            assert sockets.unacknowledged_bytes(client.fileno()) in (0, 5)
