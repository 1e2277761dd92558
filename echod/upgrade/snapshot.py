"""Between what lives in this process and what is written of it for the next program: connections, listening sockets.

The one side describes, the other makes sockets of descriptors again. Nothing here changes what it describes, so a
handover that fails has cost nothing.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from echod.config.schema import Config
from echod.net.bind import InheritedSocket
from echod.net.socket_activation import Inherited, UnusableSocketError, adopt
from echod.net.sockets import BoundSocket, ListenerKey, RawAddress, SocketAddress
from echod.server.clients import Clients
from echod.server.connection import Connection
from echod.server.proxy_handshake import ProxyHandshake
from echod.server.state import ConnectionState, SavedAddress
from echod.upgrade.state_file import HandoverError, Listening, State

ListenerSet = dict[ListenerKey, BoundSocket]


# -- what is left to the next program ----------------------------------------------------------------------------------


def clients(all_clients: Clients) -> Iterator[ConnectionState]:
    """Describe every client, one by one because pending replies may be large."""
    for connection, is_counted in all_clients.each():
        yield past(connection, is_counted=is_counted)
    yield from map(state_of_handshake, all_clients.handshakes)


def descriptors(all_clients: Clients) -> list[int]:
    """Return the descriptor of every client."""
    connections = [connection.descriptor for connection, _ in all_clients.each()]
    return connections + [handshake.sock.fileno() for handshake in all_clients.handshakes]


def past(connection: Connection, *, is_counted: bool) -> ConnectionState:
    """Everything about a connection that the next program has to know."""
    return ConnectionState(
        descriptor=connection.descriptor,
        family=socket.AF_UNIX if connection.is_unix else socket.AF_INET,
        peer=address_of(connection.sockaddr),
        is_counted=is_counted,
        opened_at=connection.opened_at,
        bytes_in=connection.bytes_in,
        bytes_out=connection.bytes_out,
        lines=connection.lines,
        unfinished=connection.echo.unfinished,
        unsent=connection.pending,
        reason=connection.reason and connection.reason.value,
        pace=connection.activity.save(),
    )


def state_of_handshake(handshake: ProxyHandshake) -> ConnectionState:
    """Everything about a client whose PROXY header isn't there yet."""
    return ConnectionState(
        descriptor=handshake.sock.fileno(),
        family=handshake.sock.family,
        peer=address_of(handshake.peer),
        is_counted=False,
        opened_at=handshake.began_at,
        header=handshake.header,
    )


def listening(listeners: Mapping[ListenerKey, BoundSocket]) -> list[Listening]:
    """Everything about listening sockets."""
    return [
        Listening(
            descriptor=bound.socket.fileno(),
            family=key.address.family,
            address=address_of(key.address.sockaddr),
            number=key.number,
            settings=bound.settings,
            file=bound.file,
            is_inherited=bound.is_inherited,
        )
        for key, bound in listeners.items()
    ]


def config(in_force: Config) -> dict[str, Any]:
    """The configuration in force."""
    described: dict[str, Any] = msgspec.to_builtins(in_force)
    return described


def address_of(sockaddr: RawAddress) -> SavedAddress:
    """A socket address as it is written."""
    return [*sockaddr] if isinstance(sockaddr, tuple) else os.fsencode(sockaddr)


# -- what the program before has left ----------------------------------------------------------------------------------


class Predecessor(Struct, frozen=True):
    """What the program before us in this process has left: its state, with sockets for descriptors."""

    state: State
    listeners: ListenerSet
    admin: ListenerSet
    inherited: tuple[InheritedSocket, ...]
    clients: Iterable[tuple[int, RawAddress, ConnectionState]]
    """To be gone through once."""

    @property
    def config(self) -> Config:
        """The configuration that was in force, as far as this program knows its keys."""
        try:
            return msgspec.convert(self.state.service.config, Config)
        except msgspec.ValidationError:
            return Config()

    @property
    def ourselves(self) -> list[RawAddress]:
        """Clients under way that are our own."""
        return [sockaddr_of(address) for address in self.state.service.ourselves]


def predecessor(state: State, clients: Iterable[ConnectionState]) -> Predecessor:
    """Take the sockets over, each client's when it is asked for; raises HandoverError."""
    try:
        for _, descriptor in state.process.inherited:
            os.set_inheritable(descriptor, False)
        inherited = adopt(Inherited(name, descriptor) for name, descriptor in state.process.inherited)
        known = {heir.socket.fileno(): heir.socket for heir in inherited}
        listeners, admin = (_bound(each, known) for each in (state.service.listeners, state.service.admin))
    except (OSError, UnusableSocketError) as error:
        raise HandoverError(f"a listening socket: {error}") from error
    return Predecessor(state, listeners, admin, inherited, _clients(clients))


class Outline(Struct, frozen=True):
    """The listeners that a state tells of, by their names alone, for who is not to hold them."""

    listeners: dict[ListenerKey, None]
    admin: dict[ListenerKey, None]
    inherited: tuple[InheritedSocket, ...]
    """With a closed socket each: they are listened on already, so nobody needs another."""


def outline(state: State) -> Outline:
    """What a program has to know of the listeners to prepare what it would do with them."""
    addresses = {each.descriptor: _key(each).address for each in state.service.listeners}
    with socket.socket() as closed:
        inherited = tuple(
            InheritedSocket(name, addresses[descriptor], closed) for name, descriptor in state.process.inherited
        )
    listeners, admin = (
        {_key(each): None for each in described} for described in (state.service.listeners, state.service.admin)
    )
    return Outline(listeners, admin, inherited)


def _bound(described: Iterable[Listening], known: Mapping[int, socket.socket]) -> ListenerSet:
    bound: ListenerSet = {}
    for each in described:
        sock = known.get(each.descriptor) or _socket(each.descriptor)
        bound[_key(each)] = BoundSocket(sock, each.settings, each.file, each.is_inherited)
    return bound


def _key(described: Listening) -> ListenerKey:
    address = SocketAddress(socket.AddressFamily(described.family), sockaddr_of(described.address))
    return ListenerKey(address, described.number)


def _clients(clients: Iterable[ConnectionState]) -> Iterator[tuple[int, RawAddress, ConnectionState]]:
    for each in clients:
        with suppress(OSError):  # no such descriptor: nothing is left of it
            os.set_inheritable(each.descriptor, False)
            yield each.descriptor, sockaddr_of(each.peer), each


def _socket(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    return sock


def sockaddr_of(address: SavedAddress) -> RawAddress:
    """A socket address as the socket module has it."""
    if isinstance(address, list):
        return tuple(address)
    return address if address.startswith(b"\0") else os.fsdecode(address)
