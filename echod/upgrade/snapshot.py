"""Translates between what lives in this process and the state for the next program: connections, listeners, addresses.

Nothing here changes what it describes, so an upgrade that fails has cost nothing.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import msgspec
from msgspec import Struct

from echod.config.schema import Config
from echod.net.bind import InheritedSocket
from echod.net.socket_activation import InheritedDescriptor, UnusableSocketError, adopt
from echod.net.sockets import BoundSocket, ListenerKey, RawAddress, SocketAddress
from echod.server.clients import Clients
from echod.server.connection import Connection
from echod.server.proxy_handshake import ProxyHandshake
from echod.server.state import ConnectionState, SavedAddress
from echod.upgrade.state_file import HandoverError, ListenerState, State

Listeners = dict[ListenerKey, BoundSocket]


# -- for the next program ----------------------------------------------------------------------------------------------


def clients(all_clients: Clients) -> Iterator[ConnectionState]:
    """Describe every client, one by one because pending replies may be large."""
    for connection, is_counted in all_clients.each():
        yield _connection_state(connection, is_counted=is_counted)
    yield from map(_handshake_state, all_clients.handshakes)


def descriptors(all_clients: Clients) -> list[int]:
    """Return the descriptor of every client."""
    connections = [connection.descriptor for connection, _ in all_clients.each()]
    return connections + [handshake.sock.fileno() for handshake in all_clients.handshakes]


def _connection_state(connection: Connection, *, is_counted: bool) -> ConnectionState:
    return ConnectionState(
        descriptor=connection.descriptor,
        family=socket.AF_UNIX if connection.is_unix else socket.AF_INET,
        peer=saved_address(connection.sockaddr),
        is_counted=is_counted,
        opened_at=connection.opened_at,
        bytes_in=connection.bytes_in,
        bytes_out=connection.bytes_out,
        lines=connection.lines,
        unanswered=connection.echo.unanswered,
        pending=connection.pending,
        reason=connection.reason and connection.reason.value,
        activity=connection.activity.save(),
    )


def _handshake_state(handshake: ProxyHandshake) -> ConnectionState:
    return ConnectionState(
        descriptor=handshake.sock.fileno(),
        family=handshake.sock.family,
        peer=saved_address(handshake.arrival.peer),
        listener=handshake.arrival.settings.name,
        is_counted=False,
        opened_at=handshake.began_at,
        proxy_header=handshake.header,
    )


def listeners(bound: Mapping[ListenerKey, BoundSocket]) -> list[ListenerState]:
    """Describe listeners."""
    return [
        ListenerState(
            descriptor=each.socket.fileno(),
            family=key.address.family,
            address=saved_address(key.address.sockaddr),
            number=key.number,
            settings=msgspec.structs.replace(each.settings, tls=None, access=None),  # the next program reads them anew
            file=each.file,
            is_inherited=each.is_inherited,
        )
        for key, each in bound.items()
    ]


def saved_address(address: RawAddress) -> SavedAddress:
    """Return a socket address as the state holds it."""
    return [*address] if isinstance(address, tuple) else os.fsencode(address)


# -- from the predecessor ----------------------------------------------------------------------------------------------


class Predecessor(Struct, frozen=True, kw_only=True):
    """What the program that ran in this process before has left: its state, with sockets in place of descriptors."""

    state: State
    listeners: Listeners
    admin_listeners: Listeners
    inherited: tuple[InheritedSocket, ...]
    clients: Iterable[tuple[int, RawAddress, ConnectionState]]
    """Descriptor, peer and state of every client; to be iterated over once."""

    @property
    def config(self) -> Config:
        """The configuration that was in force; the defaults if this program does not understand it."""
        try:
            return msgspec.convert(self.state.service.config, Config)
        except msgspec.ValidationError:
            return Config()

    @property
    def self_probes(self) -> list[RawAddress]:
        """The client addresses of the predecessor's self-probes that are not accepted yet."""
        return [raw_address(address) for address in self.state.service.self_probes]


def predecessor(state: State, client_states: Iterable[ConnectionState]) -> Predecessor:
    """Take over the listening sockets; each client's socket is taken over when it is iterated to.

    Raises HandoverError.
    """
    try:
        for _, descriptor in state.process.inherited:
            os.set_inheritable(descriptor, False)
        inherited = adopt(InheritedDescriptor(name, descriptor) for name, descriptor in state.process.inherited)
        known = {each.socket.fileno(): each.socket for each in inherited}
        return Predecessor(
            state=state,
            listeners=_take_over(state.service.listeners, known),
            admin_listeners=_take_over(state.service.admin_listeners, known),
            inherited=inherited,
            clients=_take_over_clients(client_states),
        )
    except (OSError, UnusableSocketError) as error:
        raise HandoverError(f"a listening socket: {error}") from error


def _take_over(states: Iterable[ListenerState], known: Mapping[int, socket.socket]) -> Listeners:
    bound: Listeners = {}
    for state in states:
        sock = known.get(state.descriptor) or _socket(state.descriptor)
        bound[_key(state)] = BoundSocket(sock, state.settings, state.file, state.is_inherited)
    return bound


def _take_over_clients(states: Iterable[ConnectionState]) -> Iterator[tuple[int, RawAddress, ConnectionState]]:
    for state in states:
        with suppress(OSError):  # no such descriptor: the client is gone
            os.set_inheritable(state.descriptor, False)
            yield state.descriptor, raw_address(state.peer), state


def _socket(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    return sock


class Outline(Struct, frozen=True, kw_only=True):
    """The listeners of a state without their sockets, for a preflight, which must not hold them."""

    listeners: dict[ListenerKey, None]
    admin_listeners: dict[ListenerKey, None]
    inherited: tuple[InheritedSocket, ...]
    """Each has the same closed socket, because nobody listens on it in a preflight."""


def outline(state: State) -> Outline:
    """Return what a preflight has to know of the listeners."""
    addresses = {each.descriptor: _key(each).address for each in state.service.listeners}
    with socket.socket() as closed:
        inherited = tuple(
            InheritedSocket(name, addresses[descriptor], closed) for name, descriptor in state.process.inherited
        )
    return Outline(
        listeners={_key(each): None for each in state.service.listeners},
        admin_listeners={_key(each): None for each in state.service.admin_listeners},
        inherited=inherited,
    )


def _key(state: ListenerState) -> ListenerKey:
    address = SocketAddress(socket.AddressFamily(state.family), raw_address(state.address))
    return ListenerKey(address, state.number)


def raw_address(address: SavedAddress) -> RawAddress:
    """Return a saved address as the socket module has it."""
    if isinstance(address, list):
        return tuple(address)
    return address if address.startswith(b"\0") else os.fsdecode(address)
