"""A listener in a running event loop: accepts, pauses, and closes without losing a client."""

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from echod.net import bind, listener, sockets
from echod.net.address import TcpAddress, UnixAddress, parse_address
from echod.net.listener import CLOSE_S, QUIET_S, Listener
from echod.net.listener_set import STARVED_INTERVAL_S, ListenerSet
from echod.net.sockets import ListenerSettings, RawAddress
from tests.support.daemon import DEADLINE_S
from tests.unit.test_bind import wanted

IP_MINTTL = 21  # linux/in.h
IPV6_MINHOPCOUNT = 73  # linux/in6.h


def _run(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scenario, DEADLINE_S))


class Harness:
    """A listener, and the clients that it has accepted."""

    def __init__(self, address: str = "127.0.0.1:0", *, is_shared: bool = False) -> None:
        (bound,) = bind.new_sockets(bind.bind_all(wanted(parse_address(address))))
        if is_shared:
            bound.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
        self.starved: list[OSError] = []
        self.listener = Listener(
            bound,
            lambda descriptor, *_: self.accepted.put_nowait(socket.socket(fileno=descriptor)),
            self.starved.append,
        )
        self._address = parse_address(self.listener.address)

    def client(self) -> socket.socket:
        """Return a client whose handshake is complete."""
        match self._address:
            case UnixAddress(path):
                client = socket.socket(socket.AF_UNIX)
                try:
                    client.connect(path)
                except OSError:
                    client.close()
                    raise
            case TcpAddress(host, port):
                client = socket.create_connection((host, port))
        return client


def test_a_close_accepts_the_backlog_first(tmp_path: Path) -> None:
    """Every client whose handshake was complete is accepted, for each kind of address; later clients are refused."""

    async def scenario(address: str) -> None:
        harness = Harness(address)
        harness.listener.pause("full")
        clients = [harness.client() for _ in range(300)]
        harness.listener.resume("full")
        await harness.listener.close()
        assert harness.accepted.qsize() == 300
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            harness.client()
        for sock in (*clients, *(harness.accepted.get_nowait() for _ in clients)):
            sock.close()

    for address in ("127.0.0.1:0", "[::1]:0", f"unix:{tmp_path}/sock"):
        _run(scenario(address))


def test_a_paused_listener_leaves_clients_in_the_backlog() -> None:
    """They are accepted after `resume`, and a close waits for it."""

    async def scenario() -> None:
        harness = Harness()
        harness.listener.pause("full")
        with harness.client():
            await asyncio.sleep(0.05)  # time enough to be accepted, if it were going to be
            assert harness.accepted.empty()
            harness.listener.resume("full")
            (await harness.accepted.get()).close()
        harness.listener.pause("full")
        with harness.client():
            closing = asyncio.ensure_future(harness.listener.close())
            await asyncio.sleep(CLOSE_S + 0.1)  # longer than a close without a pause takes
            assert not closing.done()
            harness.listener.resume("full")
            await closing
            (await harness.accepted.get()).close()

    _run(scenario())


def _forbidden(*_: object) -> bool:
    raise OSError(errno.EAFNOSUPPORT, "as in a sandbox")


@pytest.mark.parametrize("is_sandboxed", [False, True])
@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0"])
def test_a_close_waits_for_handshakes_under_way_and_refuses_later_clients(
    address: str, is_sandboxed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distant client, or one whose packet was lost, is accepted if its handshake began in time."""
    monkeypatch.setattr(listener, "CLOSE_S", 5.0)  # SYN is sent again after a second
    if is_sandboxed:
        monkeypatch.setattr(sockets, "_diagnose_handshakes", _forbidden)

    async def scenario() -> None:
        harness = Harness(address)
        is_v6 = address.startswith("[")
        option = (socket.IPPROTO_IPV6, IPV6_MINHOPCOUNT) if is_v6 else (socket.IPPROTO_IP, IP_MINTTL)
        with socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET) as client:
            client.setblocking(False)
            client.setsockopt(*option, 255)  # it drops the reply to its SYN
            assert client.connect_ex(harness.listener.listening_socket.getsockname()) == errno.EINPROGRESS
            closing = asyncio.ensure_future(harness.listener.close())
            await asyncio.sleep(4 * QUIET_S)  # longer than a close takes without it
            assert not closing.done()
            began_at = time.monotonic()
            with pytest.raises(ConnectionRefusedError):
                harness.client()
            assert time.monotonic() - began_at < 0.9, "not when its SYN is sent again"
            client.setsockopt(*option, 0)
            with await harness.accepted.get() as sock:
                client.send(b"x")
                assert await asyncio.get_running_loop().sock_recv(sock, 10) == b"x"
            await closing

    _run(scenario())


def test_a_handshake_that_never_ends_does_not_delay_a_close() -> None:
    """As in a flood of SYNs: the listener closes after half a second."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        harness = Harness()
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_IP, IP_MINTTL, 255)
            client.connect_ex(harness.listener.listening_socket.getsockname())
            began_at = loop.time()
            await harness.listener.close()
            assert CLOSE_S - 0.1 <= loop.time() - began_at < CLOSE_S + 5, "the kernel would continue for a minute"

    _run(scenario())


def test_sockets_accepted_during_a_close_have_the_usual_options() -> None:
    """They inherit the options that `refuse_new_handshakes` sets on the listener, which are reset."""

    async def scenario() -> None:
        harness = Harness(is_shared=True)
        port = int(harness.listener.address.rpartition(":")[2])
        closing = asyncio.ensure_future(harness.listener.close())
        await asyncio.sleep(0)  # let the close begin
        with socket.socket() as client:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 255)  # as of a peer on the same link: not held back
            client.connect(("127.0.0.1", port))
            with await harness.accepted.get() as sock:
                assert sock.getsockopt(socket.IPPROTO_IP, IP_MINTTL) == 0
        await closing

    _run(scenario())


def test_retiring_listeners_can_be_closed_at_once() -> None:
    """A second signal may come in the same iteration of the event loop in which the first one retired the listeners."""

    async def scenario() -> None:
        listeners = ListenerSet(lambda descriptor, *_: os.close(descriptor), lambda _: None)
        listeners.apply(bind.bind_all(wanted(TcpAddress("127.0.0.1", 0))), deadline_s=8)
        (port,) = (int(address.rpartition(":")[2]) for address in listeners.addresses)
        listeners.apply({}, deadline_s=8)
        listeners.close_now()
        await listeners.retired()
        assert not listeners.are_retiring
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()

    _run(scenario())


def test_a_change_that_fails_leaves_the_listeners_as_they_were() -> None:
    """All or nothing: if one of the new listeners cannot be added to the event loop, none is left."""

    async def scenario() -> None:
        listeners = ListenerSet(lambda descriptor, *_: os.close(descriptor), lambda _: None)
        listeners.apply(bind.bind_all(wanted(TcpAddress("127.0.0.1", 0))), deadline_s=8)
        before = listeners.addresses
        new = bind.bind_all(wanted(TcpAddress("127.0.0.1", 0), TcpAddress("::1", 0)))
        *_, last = bind.new_sockets(new)
        last.socket.close()
        with pytest.raises((OSError, ValueError)):
            listeners.apply(new, deadline_s=8)
        assert listeners.addresses == before
        assert [bound.socket.fileno() for bound in bind.new_sockets(new)] == [-1, -1]
        listeners.apply({}, deadline_s=0)
        await listeners.retired()

    _run(scenario())


def test_clients_that_keep_arriving_during_a_close_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel cannot refuse new handshakes, accepting continues for at most half a second."""
    monkeypatch.setattr(sockets, "refuse_new_handshakes", lambda _: None)
    monkeypatch.setattr(listener, "QUIET_S", 0.3)  # far longer than the interval between clients

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        harness = Harness()
        began_at = loop.time()
        closing = asyncio.ensure_future(harness.listener.close())
        connected = 0
        while not closing.done():
            with contextlib.suppress(ConnectionRefusedError):
                harness.client().close()
                connected += 1
            await asyncio.sleep(0.02)  # the interval between clients
        assert CLOSE_S - 0.1 <= loop.time() - began_at < CLOSE_S + 5, "clients would arrive forever"
        accepted = harness.accepted.qsize()
        assert connected - 1 <= accepted <= connected, "a client that connects at the moment of the close may be reset"
        for _ in range(accepted):
            harness.accepted.get_nowait().close()

    _run(scenario())


def test_starvation_pauses_accepting() -> None:
    """For lack of descriptors or memory, accepting pauses; a client that has vanished causes no pause."""

    async def scenario() -> None:
        harness = Harness()
        assert not harness.listener._on_accept_error(OSError(errno.EMFILE, "Too many open files"))
        assert len(harness.starved) == 1
        with harness.client():
            (await harness.accepted.get()).close()
        assert harness.listener._on_accept_error(ConnectionAbortedError(errno.ECONNABORTED, "gone"))
        harness.listener._on_accept_error(OSError(errno.ENFILE, "Too many open files in system"))
        harness.listener.close_now()
        harness.listener.close_now()
        harness.listener.resume("full")

    _run(scenario())


def test_a_long_starvation_is_reported_once() -> None:
    """`on_starved` is called at most every ten seconds, although each listener retries five times a second."""

    async def scenario() -> None:
        starved: list[OSError] = []
        listeners = ListenerSet(lambda descriptor, *_: os.close(descriptor), starved.append)
        listeners.apply(bind.bind_all(wanted(TcpAddress("127.0.0.1", 0), TcpAddress("127.0.0.1", 0))), deadline_s=8)
        for listener_of_them in [*listeners, *listeners]:
            listener_of_them._on_accept_error(OSError(errno.EMFILE, "Too many open files"))
        assert len(starved) == 1
        listeners._starved_at -= STARVED_INTERVAL_S
        next(iter(listeners))._on_accept_error(OSError(errno.EMFILE, "Too many open files"))
        assert len(starved) == 2
        listeners.apply({}, deadline_s=8)
        listeners.close_now()
        await listeners.retired()

    _run(scenario())


def test_a_change_is_refused_if_another_process_listens_first() -> None:
    """A bound socket does not listen yet: another process may get the port, and the listeners stay as they were."""

    async def scenario() -> None:
        listeners = ListenerSet(lambda descriptor, *_: os.close(descriptor), lambda _: None)
        listeners.apply(bind.bind_all(wanted(TcpAddress("127.0.0.1", 0))), deadline_s=8)
        before = listeners.bound.keys()
        new = bind.bind_all(wanted(TcpAddress("127.0.0.1", 0), TcpAddress("127.0.0.1", 0)))
        (_, second) = bind.new_sockets(new)
        with socket.socket() as quicker:
            quicker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            quicker.bind(second.socket.getsockname())
            quicker.listen()
            with pytest.raises(sockets.ListenError, match="address already in use"):
                listeners.apply(new, deadline_s=8)
        bind.discard(new)
        assert listeners.bound.keys() == before
        listeners.apply({}, deadline_s=8)
        await listeners.retired()

    _run(scenario())


def test_a_retiring_listener_keeps_its_settings() -> None:
    """Clients of a kept listener get the new settings; those in the backlog of a retiring listener get its old ones."""

    async def scenario() -> None:
        accepted: asyncio.Queue[str] = asyncio.Queue()

        def on_accept(descriptor: int, _: RawAddress, settings: ListenerSettings) -> None:
            accepted.put_nowait(settings.name)
            os.close(descriptor)

        listeners = ListenerSet(on_accept, lambda _: None)
        prepared = bind.bind_all([bind.ListenEntry(parse_address("127.0.0.1:0"), ListenerSettings(name="first"))])
        (key,) = prepared
        for name in ("first", "second", "third"):
            listeners.apply(prepared if name == "first" else {key: ListenerSettings(name=name)}, 1.0)
            with socket.create_connection(listeners.bound[key].socket.getsockname()):
                assert await accepted.get() == name
        with socket.create_connection(listeners.bound[key].socket.getsockname()):
            listeners.apply({}, 1.0)
            await listeners.retired()
            assert await accepted.get() == "third"

    _run(scenario())


@pytest.mark.parametrize("is_inherited", [False, True])
def test_accepted_sockets_send_without_delay(is_inherited: bool) -> None:
    """They have TCP_NODELAY; the options of an inherited listener stay as they are."""

    async def scenario() -> None:
        (bound,) = bind.new_sockets(bind.bind_all(wanted(TcpAddress("127.0.0.1", 0))))
        bound.socket.listen()
        accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
        it = Listener(
            sockets.BoundSocket(bound.socket, is_inherited=is_inherited),
            lambda descriptor, *_: accepted.put_nowait(socket.socket(fileno=descriptor)),
            lambda _: None,
        )
        with socket.create_connection(bound.socket.getsockname()):
            with await accepted.get() as sock:
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert not os.get_blocking(sock.fileno())
                assert not sock.get_inheritable()
        assert bool(bound.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) is not is_inherited
        it.close_now()

    _run(scenario())


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0"])
def test_the_address_of_a_client_has_the_format_of_the_socket_module(address: str) -> None:
    """It is the same from the compiled and the Python acceptor."""

    async def scenario() -> None:
        accepted: asyncio.Queue[RawAddress] = asyncio.Queue()

        def on_accept(descriptor: int, peer: RawAddress, _: ListenerSettings) -> None:
            os.close(descriptor)
            accepted.put_nowait(peer)

        (bound,) = bind.new_sockets(bind.bind_all(wanted(parse_address(address))))
        it = Listener(bound, on_accept, lambda _: None)
        with socket.create_connection(bound.socket.getsockname()[:2]) as client:
            assert await accepted.get() == client.getsockname()
        it.close_now()

    _run(scenario())
