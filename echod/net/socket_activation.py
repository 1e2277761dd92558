"""Listening sockets that a service manager handed over, made ready to be served."""

import os
import socket
from collections.abc import Iterable, MutableMapping

from msgspec import Struct

from echod.net.address import normal_host
from echod.net.bind import InheritedSocket, unix_address
from echod.net.sockets import RawAddress, SocketAddress

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START


class Inherited(Struct, frozen=True):
    """A listening socket that was handed over, under the name that its unit gives it."""

    name: str
    descriptor: int


def take_descriptors(environment: MutableMapping[str, str], pid: int) -> tuple[Inherited, ...]:
    """The sockets handed over to this process; their variables are removed, and no child inherits them.

    What is meant for another process is left alone but for its variables. Raises ValueError if the count is no number,
    OSError if there is no such descriptor.
    """
    said = {name: environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    if said["LISTEN_PID"] != str(pid):
        return ()
    names = said["LISTEN_FDNAMES"].split(":")
    taken = []
    for number in range(int(said["LISTEN_FDS"] or 0)):
        descriptor = FIRST_DESCRIPTOR + number
        os.set_inheritable(descriptor, False)
        taken.append(Inherited(names[number] if number < len(names) and names[number] else "unknown", descriptor))
    return tuple(taken)


class UnusableSocketError(Exception):
    """Why a descriptor that was handed over can't be served."""


def inherit(environment: MutableMapping[str, str], pid: int) -> tuple[InheritedSocket, ...]:
    """The sockets that a service manager handed over to this process; raises UnusableSocketError."""
    try:
        return adopt(take_descriptors(environment, pid))
    except (ValueError, OSError) as error:
        raise UnusableSocketError(f"LISTEN_FDS: {error}: not the descriptors of a service manager") from error


def adopt(handed: Iterable[Inherited]) -> tuple[InheritedSocket, ...]:
    """The sockets behind the descriptors; raises UnusableSocketError if one is none to accept stream clients from."""
    return tuple(_adopt(each) for each in handed)


def _adopt(handed: Inherited) -> InheritedSocket:
    try:
        sock = socket.socket(fileno=handed.descriptor)
        is_known = sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        is_fit = (
            is_known and sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )
    except OSError as error:
        raise UnusableSocketError(f"systemd:{handed.name}: {(error.strerror or str(error)).lower()}") from error
    if not is_fit:
        sock.close()
        raise UnusableSocketError(
            f"systemd:{handed.name}: no listening stream socket; its unit needs ListenStream= and Accept=no"
        )
    sock.setblocking(False)
    return InheritedSocket(handed.name, _address(sock), sock)


def _address(sock: socket.socket) -> SocketAddress:
    """Return the address of an inherited socket as `bind.resolve` would return it for the configured address.

    A dual-stack socket gets an address that no configured address resolves to.
    """
    name: RawAddress = sock.getsockname()
    if isinstance(name, str) and name.startswith("/"):
        return unix_address(name)
    if isinstance(name, tuple) and sock.family == socket.AF_INET6:
        host = normal_host(name[0])
        if ":" not in host:  # IPv4-mapped
            return SocketAddress(socket.AF_INET, (host, name[1]))
        if not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            name = (*name, "and IPv4")
    return SocketAddress(socket.AddressFamily(sock.family), name)
