"""Binding: what can be bound, the errors, inherited sockets, and what the kernel tells about sockets."""

import fcntl
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from echod.net import bind, socket_activation, sockets
from echod.net.address import Address, SystemdAddress, TcpAddress, UnixAddress
from echod.net.bind import ListenEntry
from echod.net.socket_activation import InheritedDescriptor
from echod.process import lockfile
from tests.support.daemon import DEADLINE_S

Sockets = dict[sockets.ListenerKey, sockets.BoundSocket]

ANY = TcpAddress("127.0.0.1", 0)


def wanted(*addresses: Address) -> list[ListenEntry]:
    return [ListenEntry(address) for address in addresses]


@pytest.fixture
def opened() -> Iterator[Sockets]:
    """A dict whose sockets are closed at the end."""
    found: Sockets = {}
    yield found
    bind.discard(found)


def bind_new(entries: list[ListenEntry], inherited: Sequence[bind.InheritedSocket] = ()) -> Sockets:
    """Bind the entries; none of them exists already."""
    prepared = bind.bind_all(entries, inherited=inherited)
    return dict(zip(prepared, bind.new_sockets(prepared), strict=True))


def _names(found: Sockets) -> list[str]:
    return [sockets.peer_name(bound.socket.family, bound.socket.getsockname()) for bound in found.values()]


def test_port_0_may_be_listed_several_times(opened: Sockets) -> None:
    """Each entry gets a listener of its own; an existing one is not bound again."""
    opened |= bind_new(wanted(ANY, ANY))
    assert len(set(_names(opened))) == 2
    again = bind.bind_all(wanted(ANY, ANY, ANY), kept=opened)
    try:
        assert [isinstance(each, sockets.BoundSocket) for each in again.values()] == [False, False, True]
    finally:
        bind.discard(again)


def test_bound_sockets_do_not_listen_yet(opened: Sockets, tmp_path: Path) -> None:
    """They refuse clients, which would be reset if a later step failed."""
    opened |= bind_new(wanted(ANY, UnixAddress(str(tmp_path / "sock"))))
    for bound in opened.values():
        with socket.socket(bound.socket.family) as client, pytest.raises(ConnectionRefusedError):
            client.connect(bound.socket.getsockname())
        bound.listen()
        with socket.socket(bound.socket.family) as client:
            client.connect(bound.socket.getsockname())


def test_all_or_nothing_with_every_error(tmp_path: Path) -> None:
    """One address that cannot be bound leaves none bound, and each error is reported."""
    path = tmp_path / "sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(bind.BindErrors) as raised:
            bind.bind_all(wanted(UnixAddress(str(path)), TcpAddress("127.0.0.1", port), TcpAddress("192.0.2.1", 1)))
    assert not path.exists()
    assert [fault.partition("; ")[0] for fault in raised.value.errors] == [
        f"127.0.0.1:{port}: address already in use",
        "192.0.2.1:1: not an address of this machine",
    ]


def test_the_error_of_a_taken_port_says_what_to_do() -> None:
    """It says how several instances can share a port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = TcpAddress("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(bind.BindErrors, match="several echods share one with reuse_port = true in each"):
            bind.bind_all(wanted(address))


def test_a_host_name_stands_for_each_of_its_addresses() -> None:
    """`localhost` may be IPv4 and IPv6; an unknown host is an error."""
    endpoints = bind.resolve(TcpAddress("localhost", 7))
    assert endpoints
    assert {str(endpoint) for endpoint in endpoints} <= {"127.0.0.1:7", "[::1]:7"}
    with pytest.raises(bind.BindError, match=re.escape("no.such.host.invalid:7: unknown host")):
        bind.resolve(TcpAddress("no.such.host.invalid", 7))
    with pytest.raises(bind.BindError, match="unknown host"):
        bind.resolve(TcpAddress("x" * 64 + ".invalid", 7))
    with pytest.raises(bind.BindError, match="unknown host"):
        bind.resolve(TcpAddress("fe80::1%ß", 7))


def test_both_wildcards_can_be_listed(opened: Sockets) -> None:
    """[::] means IPv6 only, so 0.0.0.0 can be listed beside it."""
    opened |= bind_new(wanted(TcpAddress("0.0.0.0", 0)))
    port = int(_names(opened)[0].rpartition(":")[2])
    opened |= bind_new(wanted(TcpAddress("::", port)))
    assert len(opened) == 2


def test_the_error_of_a_low_port_names_the_capability() -> None:
    """A port below 1024 needs CAP_NET_BIND_SERVICE."""
    unprivileged = (
        "import os; from echod.net import bind; from echod.net.address import TcpAddress\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: bind.bind_all([bind.ListenEntry(TcpAddress('127.0.0.1', 7))])\n"
        "except bind.BindErrors as error: print(error)"
    )
    if os.geteuid() != 0 or int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 7:
        pytest.skip("needs root to give up, and low ports that are privileged")
    done = subprocess.run([sys.executable, "-c", unprivileged], capture_output=True, text=True, timeout=DEADLINE_S)
    assert "127.0.0.1:7: permission denied; a port below 1024 needs CAP_NET_BIND_SERVICE" in done.stdout, done.stderr


def test_a_path_that_another_process_is_binding_is_refused(tmp_path: Path) -> None:
    """Two processes that start at once cannot both replace a stale file."""
    lock = lockfile.lock(f"{tmp_path}/sock.lock")
    try:
        with pytest.raises(bind.BindErrors, match="another process is binding there"):
            bind.bind_all(wanted(UnixAddress(str(tmp_path / "sock"))))
    finally:
        os.close(lock)
    with pytest.raises(bind.BindErrors, match="no such file or directory"):
        bind.bind_all(wanted(UnixAddress(str(tmp_path / "missing" / "sock"))))


def test_a_short_lock_by_another_process_is_waited_for(opened: Sockets, tmp_path: Path) -> None:
    """A lock file that a killed process left is no obstacle."""
    lock = lockfile.lock(f"{tmp_path}/sock.lock")
    done = threading.Timer(0.2, os.close, [lock])
    done.start()
    opened |= bind_new(wanted(UnixAddress(str(tmp_path / "sock"))))
    done.join()
    assert os.listdir(tmp_path) == ["sock"]


def test_a_lock_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """The error says what to do with it."""
    (tmp_path / "sock.lock").symlink_to("nowhere")
    with pytest.raises(bind.BindErrors, match=rf"{tmp_path}/sock.lock: .*; remove it if no echod is starting"):
        bind.bind_all(wanted(UnixAddress(str(tmp_path / "sock"))))
    assert os.listdir(tmp_path) == ["sock.lock"]


def test_a_lock_on_the_directory_does_not_prevent_binding(opened: Sockets, tmp_path: Path) -> None:
    """Every user who can read a directory can lock it (flock(2))."""
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        opened |= bind_new(wanted(UnixAddress(str(tmp_path / "sock"))))
    finally:
        os.close(directory)


def test_only_one_of_many_processes_that_start_at_once_gets_the_path(tmp_path: Path) -> None:
    """Each finds the same stale file; one replaces it, and the others report that the address is in use."""
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    results: list[sockets.BoundSocket | str] = []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait(DEADLINE_S)
        try:
            results.extend(bind_new(wanted(UnixAddress(path))).values())
        except bind.BindErrors as error:
            results.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    (bound,) = (result for result in results if isinstance(result, sockets.BoundSocket))
    others = [result for result in results if isinstance(result, str)]
    assert others == [f"unix:{path}: address already in use; `ss -lxp` shows by whom"] * 7
    bound.close()
    assert os.listdir(tmp_path) == []


# -- one address in two spellings --------------------------------------------------------------------------------------


@pytest.fixture
def spellings(tmp_path: Path) -> list[UnixAddress]:
    """The same path, written in four ways."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    names = ("real/q", "real//q", "link/q", "link/../real/./q")
    return [UnixAddress(f"{tmp_path}/{name}") for name in names]


@pytest.mark.parametrize("is_listening", [False, True])
def test_a_live_socket_is_not_replaced_under_another_spelling(
    is_listening: bool, opened: Sockets, spellings: list[UnixAddress]
) -> None:
    """Its file stays, whether it listens already or not."""
    opened |= bind_new(wanted(spellings[0]))
    for bound in opened.values():
        if is_listening:
            bound.listen()
        for other in spellings:
            with pytest.raises(bind.BindErrors, match="already in use"):
                bind.bind_all(wanted(other))
            assert sockets.file_identity(spellings[0].path) == bound.file
        if is_listening:
            with pytest.raises(BlockingIOError):  # and the question was no client
                bound.socket.accept()


def test_a_live_socket_behind_a_long_path_is_not_replaced(opened: Sockets, tmp_path: Path) -> None:
    """A path bound through a symbolic link, because the resolved one is too long, is recognized by its file."""
    real = tmp_path / ("x" * 100) / ("y" * 100)
    real.mkdir(parents=True)
    first, second = tmp_path / "1", tmp_path / "2"
    for link in (first, second):
        link.symlink_to(real)
    opened |= bind_new(wanted(UnixAddress(f"{first}/q")))
    assert (real / "q").is_socket()
    for link in (first, second):
        with pytest.raises(bind.BindErrors, match="already in use"):
            bind.bind_all(wanted(UnixAddress(f"{link}/q")))


def test_another_spelling_of_an_address_is_the_existing_listener(opened: Sockets, spellings: list[UnixAddress]) -> None:
    """A reload recognizes an existing listener by the resolved address."""
    opened |= bind_new(wanted(spellings[0], TcpAddress("127.0.0.1", 0), TcpAddress("::1", 0)))
    ports = [int(name.rpartition(":")[2]) for name in _names(opened)[1:]]
    (path, v4, v6) = opened
    there = dict.fromkeys(
        [
            path,
            sockets.ListenerKey(sockets.SocketAddress(v4.address.family, ("127.0.0.1", ports[0])), 0),
            sockets.ListenerKey(sockets.SocketAddress(v6.address.family, ("::1", ports[1], 0, 0)), 0),
        ]
    )
    for unix in spellings:
        for mapped in ("::ffff:127.0.0.1", "::FFFF:7f00:1"):
            for loopback in ("::1", "0:0:0:0:0:0:0:1"):
                addresses = wanted(unix, TcpAddress(mapped, ports[0]), TcpAddress(loopback, ports[1]))
                assert bind.bind_all(addresses, kept=there) == dict.fromkeys(there, sockets.DEFAULT_SETTINGS)


def test_two_spellings_of_one_address_are_an_error(spellings: list[UnixAddress]) -> None:
    """Nothing stays bound then."""
    for one, other in (
        (spellings[0], spellings[2]),
        (TcpAddress("127.0.0.1", 7), TcpAddress("::ffff:127.0.0.1", 7)),
        (TcpAddress("127.0.0.1", 7), TcpAddress("LOCALHOST", 7)),
    ):
        with pytest.raises(bind.BindErrors, match=r"(/q|127\.0\.0\.1:7): listed twice"):
            bind.bind_all(wanted(one, other))
    assert not os.path.exists(spellings[0].path)


def test_an_ipv4_mapped_address_is_the_ipv4_address(opened: Sockets) -> None:
    """As an IPv6-only socket, the kernel would refuse it."""
    opened |= bind_new(wanted(TcpAddress("::ffff:127.0.0.1", 0)))
    assert [bound.socket.family for bound in opened.values()] == [socket.AF_INET]


def test_a_unix_listener_with_a_full_backlog_is_in_use(tmp_path: Path) -> None:
    """Its owner is only too busy to accept."""
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)
        with pytest.raises(bind.BindErrors, match="already in use"):
            bind.bind_all(wanted(UnixAddress(path)))


def test_instances_share_a_port(opened: Sockets) -> None:
    """With reuse_port several sockets listen on one port; a socket without it is refused."""
    opened |= bind_new([ListenEntry(ANY, sockets.ListenerSettings(reuse_port=True))])
    port = int(_names(opened)[0].rpartition(":")[2])
    second = bind_new([ListenEntry(TcpAddress("127.0.0.1", port), sockets.ListenerSettings(reuse_port=True))])
    try:
        assert _names(second) == _names(opened)
        for bound in opened.values():
            bound.listen()
        with pytest.raises(bind.BindErrors, match="already in use"):
            bind.bind_all(wanted(TcpAddress("127.0.0.1", port)))
    finally:
        bind.discard(second)


# -- inherited sockets -----------------------------------------------------------------------------------------------


def inherited_socket(name: str, path: str = "") -> bind.InheritedSocket:
    """Return a listening socket as a service manager passes it."""
    sock = socket.socket(socket.AF_UNIX) if path else socket.socket()
    sock.bind(path or ("127.0.0.1", 0))
    sock.listen()
    (passed,) = socket_activation.adopt([InheritedDescriptor(name, sock.detach())])
    return passed


def test_inherited_sockets_are_matched_by_address_or_name(opened: Sockets, tmp_path: Path) -> None:
    """Inherited sockets that no entry claims are served too, and the remaining entries are bound."""
    by_address, by_name, unwanted = (
        inherited_socket("a"),
        inherited_socket("web", str(tmp_path / "web")),
        inherited_socket("b"),
    )
    host, port = by_address.socket.getsockname()
    entries = wanted(SystemdAddress("web"), TcpAddress(host, port), ANY)
    opened |= bind_new(entries, inherited=[by_address, by_name, unwanted])
    bounds = [*opened.values()]
    assert [bound.is_inherited for bound in bounds] == [True, True, False, True]
    assert [bounds[0].socket, bounds[1].socket, bounds[3].socket] == [
        by_name.socket,
        by_address.socket,
        unwanted.socket,
    ]
    again = bind.bind_all(entries, kept=opened, inherited=[by_address, by_name, unwanted])
    assert [*again] == [*opened]
    assert bind.new_sockets(again) == []


def test_an_inherited_socket_is_matched_under_another_spelling(opened: Sockets, spellings: list[UnixAddress]) -> None:
    """The resolved addresses are compared."""
    mapped = socket.create_server(("::ffff:127.0.0.1", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    port = mapped.getsockname()[1]
    inherited = [
        inherited_socket("a", spellings[2].path),
        *socket_activation.adopt([InheritedDescriptor("b", mapped.detach())]),
    ]
    opened |= bind_new(wanted(spellings[1], TcpAddress("127.0.0.1", port)), inherited=inherited)
    assert [bound.socket for bound in opened.values()] == [each.socket for each in inherited]


def test_an_entry_claims_every_inherited_socket_of_its_name(opened: Sockets) -> None:
    """The sockets of a unit have its name by default."""
    inherited = [inherited_socket("echod.socket"), inherited_socket("echod.socket")]
    opened |= bind_new(wanted(SystemdAddress("echod.socket")), inherited=inherited)
    assert [bound.socket for bound in opened.values()] == [each.socket for each in inherited]


def test_a_dual_stack_socket_is_matched_only_by_name(opened: Sockets) -> None:
    """[::]:PORT means IPv6 only, and `ListenStream=PORT` means both families."""
    sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    port = sock.getsockname()[1]
    (passed,) = socket_activation.adopt([InheritedDescriptor("web", sock.detach())])
    with closing(passed.socket):
        with pytest.raises(bind.BindErrors, match="already in use"):
            bind.bind_all(wanted(TcpAddress("::", port)), inherited=[passed])
    (again,) = socket_activation.adopt(
        [InheritedDescriptor("web", socket.create_server(("::1", 0), family=socket.AF_INET6).detach())]
    )
    opened |= bind_new(wanted(SystemdAddress("web")), inherited=[again])
    assert [bound.socket for bound in opened.values()] == [again.socket]


def test_a_name_without_an_inherited_socket_is_an_error() -> None:
    """The error lists the names that exist."""
    passed = inherited_socket("web")
    with (
        closing(passed.socket),
        pytest.raises(bind.BindErrors, match=re.escape("systemd:wbe: no inherited socket has that name")),
    ):
        bind.bind_all(wanted(SystemdAddress("wbe")), inherited=[passed])


def test_the_file_of_an_inherited_socket_is_not_removed(opened: Sockets, tmp_path: Path) -> None:
    """The service manager still listens on it."""
    path = tmp_path / "sock"
    for bound in bind_new([], [inherited_socket("a", str(path))]).values():
        bound.close()
    assert path.exists()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_an_inherited_socket_that_does_not_listen_is_an_error(kind: socket.SocketKind) -> None:
    """Accept=yes passes connections, and ListenDatagram= datagram sockets: neither can be served."""
    descriptor = socket.socket(socket.AF_INET, kind).detach()
    with pytest.raises(socket_activation.UnusableSocketError, match="systemd:web: not a listening stream socket"):
        socket_activation.adopt([InheritedDescriptor("web", descriptor)])


def test_an_inherited_descriptor_that_is_not_a_socket_is_an_error() -> None:
    """It may be any file."""
    descriptor = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(socket_activation.UnusableSocketError, match="systemd:web: socket operation on non-socket"):
        socket_activation.adopt([InheritedDescriptor("web", descriptor)])
    os.close(descriptor)


# -- the kernel's side -------------------------------------------------------------------------------------------------


def test_a_bound_unix_socket_is_in_use_before_it_listens(tmp_path: Path) -> None:
    """Its file is not stale; that of a closed socket is."""
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as starting:
        starting.bind(path)
        with pytest.raises(bind.BindErrors, match="already in use"):
            bind.bind_all(wanted(UnixAddress(path)))
    bind.discard(bind.bind_all(wanted(UnixAddress(path))))


def test_peer_names() -> None:
    """Addresses are shown as people write them."""
    assert sockets.peer_name(socket.AF_INET, ("10.0.0.1", 80)) == "10.0.0.1:80"
    assert sockets.peer_name(socket.AF_INET6, ("::1", 80, 0, 0)) == "[::1]:80"
    assert sockets.peer_name(socket.AF_UNIX, "") == "unix"
    assert sockets.peer_name(socket.AF_UNIX, "/run/x") == "unix:/run/x"
    assert sockets.peer_name(socket.AF_INET, None) == "unknown"


def test_unread_and_unacknowledged_bytes() -> None:
    """The kernel reports unread input (SIOCINQ) and sent bytes that are not acknowledged (SIOCOUTQ)."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with closing(accepted):
            client.sendall(b"12345")
            accepted.recv(1, socket.MSG_PEEK)
            assert sockets.unread_bytes(accepted.fileno()) == 5
            assert sockets.unacknowledged_bytes(client.fileno()) in (0, 5)
