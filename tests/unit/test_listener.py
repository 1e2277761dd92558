"""A listener in a running loop: accepts, pauses, and closes without losing a client."""

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


class Door:
    """A listener and those who came through it."""

    def __init__(self, address: str = "127.0.0.1:0", *, is_shared: bool = False) -> None:
        (bound,) = bind.new_sockets(bind.bind_all(wanted(parse_address(address))))
        if is_shared:
            bound.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.came: asyncio.Queue[socket.socket] = asyncio.Queue()
        self.starved: list[OSError] = []
        self.listener = Listener(
            bound, lambda descriptor, *_: self.came.put_nowait(socket.socket(fileno=descriptor)), self.starved.append
        )
        self._address = parse_address(self.listener.address)

    def client(self) -> socket.socket:
        """A client whose handshake is complete."""
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


def test_who_waits_is_accepted_before_the_close(tmp_path: Path) -> None:
    """Every client whose handshake was complete is accepted, whatever the kind of address; later ones are refused."""

    async def scenario(address: str) -> None:
        door = Door(address)
        door.listener.pause("full")
        clients = [door.client() for _ in range(300)]
        door.listener.resume("full")
        await door.listener.close()
        assert door.came.qsize() == 300
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            door.client()
        for sock in (*clients, *(door.came.get_nowait() for _ in clients)):
            sock.close()

    for address in ("127.0.0.1:0", "[::1]:0", f"unix:{tmp_path}/sock"):
        _run(scenario(address))


def test_a_paused_listener_leaves_clients_in_the_backlog() -> None:
    """`pause` until `resume`; who waits is accepted before a close ends."""

    async def scenario() -> None:
        door = Door()
        door.listener.pause("full")
        with door.client():
            await asyncio.sleep(0.05)  # time enough to be accepted, if it were going to be
            assert door.came.empty()
            door.listener.resume("full")
            (await door.came.get()).close()
        door.listener.pause("full")
        with door.client():
            closing = asyncio.ensure_future(door.listener.close())
            await asyncio.sleep(CLOSE_S + 0.1)  # longer than a close takes that isn't paused
            assert not closing.done()
            door.listener.resume("full")
            await closing
            (await door.came.get()).close()

    _run(scenario())


def _forbidden(*_: object) -> bool:
    raise OSError(errno.EAFNOSUPPORT, "as in a sandbox")


@pytest.mark.parametrize("is_sandboxed", [False, True])
@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0"])
def test_a_handshake_under_way_is_waited_for_and_later_clients_are_refused(
    address: str, is_sandboxed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is far away, or loses a packet, gets in when it began in time; who comes later is refused at once."""
    monkeypatch.setattr(listener, "CLOSE_S", 5.0)  # SYN is sent again after a second
    if is_sandboxed:
        monkeypatch.setattr(sockets, "_diagnose_handshakes", _forbidden)

    async def scenario() -> None:
        door = Door(address)
        is_v6 = address.startswith("[")
        option = (socket.IPPROTO_IPV6, IPV6_MINHOPCOUNT) if is_v6 else (socket.IPPROTO_IP, IP_MINTTL)
        with socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET) as client:
            client.setblocking(False)
            client.setsockopt(*option, 255)  # the answer to its SYN doesn't arrive
            assert client.connect_ex(door.listener.listening_socket.getsockname()) == errno.EINPROGRESS
            closing = asyncio.ensure_future(door.listener.close())
            await asyncio.sleep(4 * QUIET_S)  # longer than a close takes without it
            assert not closing.done()
            began_at = time.monotonic()
            with pytest.raises(ConnectionRefusedError):
                door.client()
            assert time.monotonic() - began_at < 0.9, "not when its SYN is sent again"
            client.setsockopt(*option, 0)
            with await door.came.get() as sock:
                client.send(b"x")
                assert await asyncio.get_running_loop().sock_recv(sock, 10) == b"x"
            await closing

    _run(scenario())


def test_a_handshake_that_never_ends_holds_no_close_up() -> None:
    """As in a flood of SYNs: half a second, and the listener is closed."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        door = Door()
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_IP, IP_MINTTL, 255)
            client.connect_ex(door.listener.listening_socket.getsockname())
            began_at = loop.time()
            await door.listener.close()
            assert CLOSE_S - 0.1 <= loop.time() - began_at < CLOSE_S + 5, "the kernel goes on for a minute"

    _run(scenario())


def test_accepted_while_a_shared_port_is_closed_a_socket_is_no_different() -> None:
    """What `refuse_new_handshakes` sets on the listener is undone on what is accepted from it."""

    async def scenario() -> None:
        door = Door(is_shared=True)
        port = int(door.listener.address.rpartition(":")[2])
        closing = asyncio.ensure_future(door.listener.close())
        await asyncio.sleep(0)  # it has begun
        with socket.socket() as client:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 255)  # as of a peer on the same link: not held back
            client.connect(("127.0.0.1", port))
            with await door.came.get() as sock:
                assert sock.getsockopt(socket.IPPROTO_IP, IP_MINTTL) == 0
        await closing

    _run(scenario())


def test_listeners_that_are_closed_at_once_are_gone() -> None:
    """A second signal may come in the very turn of the loop in which the first began to close the listeners."""

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
    """All or nothing: one of the new listeners can't be watched, and none of them is left."""

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


def test_clients_that_keep_coming_while_it_closes_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel can't hold new handshakes back, accepting goes on while they come, for half a second at most."""
    monkeypatch.setattr(sockets, "refuse_new_handshakes", lambda _: None)
    monkeypatch.setattr(listener, "QUIET_S", 0.3)  # far from the pace of those who come, however slow the machine

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        door = Door()
        began_at = loop.time()
        closing = asyncio.ensure_future(door.listener.close())
        came = 0
        while not closing.done():
            with contextlib.suppress(ConnectionRefusedError):
                door.client().close()
                came += 1
            await asyncio.sleep(0.02)  # the pace of those who come
        assert CLOSE_S - 0.1 <= loop.time() - began_at < CLOSE_S + 5, "they would come for ever"
        accepted = door.came.qsize()
        assert came - 1 <= accepted <= came, "who comes in the very moment of the close may be reset"
        for _ in range(accepted):
            door.came.get_nowait().close()

    _run(scenario())


def test_starvation_pauses_and_ends() -> None:
    """When descriptors or memory are missing, accepting pauses for a moment; a lost client is no starvation."""

    async def scenario() -> None:
        door = Door()
        assert not door.listener._on_accept_error(OSError(errno.EMFILE, "Too many open files"))
        assert len(door.starved) == 1
        with door.client():
            (await door.came.get()).close()
        assert door.listener._on_accept_error(ConnectionAbortedError(errno.ECONNABORTED, "gone"))
        door.listener._on_accept_error(OSError(errno.ENFILE, "Too many open files in system"))
        door.listener.close_now()
        door.listener.close_now()
        door.listener.resume("full")

    _run(scenario())


def test_a_long_starvation_is_told_once() -> None:
    """Whoever owns the listeners hears of it every ten seconds at most, though each tries again five times a second."""

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


def test_a_port_that_another_process_listened_on_first_changes_nothing() -> None:
    """Bound is not yet listened on: who is quicker in between keeps the port, and the listeners stay as they were."""

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
def test_each_reply_is_sent_at_once(is_inherited: bool) -> None:
    """Accepted sockets have TCP_NODELAY; the options of an inherited listener stay as they are."""

    async def scenario() -> None:
        (bound,) = bind.new_sockets(bind.bind_all(wanted(TcpAddress("127.0.0.1", 0))))
        bound.socket.listen()
        came: asyncio.Queue[socket.socket] = asyncio.Queue()
        it = Listener(
            sockets.BoundSocket(bound.socket, is_inherited=is_inherited),
            lambda descriptor, *_: came.put_nowait(socket.socket(fileno=descriptor)),
            lambda _: None,
        )
        with socket.create_connection(bound.socket.getsockname()):
            with await came.get() as accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert not os.get_blocking(accepted.fileno())
                assert not accepted.get_inheritable()
        assert bool(bound.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) is not is_inherited
        it.close_now()

    _run(scenario())


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0"])
def test_an_accepted_client_comes_with_its_address(address: str) -> None:
    """The address is that of the socket module, whichever code accepts."""

    async def scenario() -> None:
        came: asyncio.Queue[RawAddress] = asyncio.Queue()

        def on_accept(descriptor: int, peer: RawAddress, _: ListenerSettings) -> None:
            os.close(descriptor)
            came.put_nowait(peer)

        (bound,) = bind.new_sockets(bind.bind_all(wanted(parse_address(address))))
        it = Listener(bound, on_accept, lambda _: None)
        with socket.create_connection(bound.socket.getsockname()[:2]) as client:
            assert await came.get() == client.getsockname()
        it.close_now()

    _run(scenario())
