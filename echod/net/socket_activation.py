"""Takes the listening sockets that a service manager passes at the start (sd_listen_fds(3))."""

import os
import socket
from collections.abc import Iterable, MutableMapping

from msgspec import Struct

from echod.net.address import normal_host
from echod.net.bind import InheritedSocket, unix_address
from echod.net.sockets import RawAddress, SocketAddress

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START


class InheritedDescriptor(Struct, frozen=True):
    """The descriptor of a socket that a service manager passed to us, with the name that its unit gives it."""

    name: str
    descriptor: int


def take_descriptors(environment: MutableMapping[str, str], pid: int) -> tuple[InheritedDescriptor, ...]:
    """Return the sockets that were passed to this process; removes their variables, and no child inherits the sockets.

    Descriptors meant for another process are left alone. Raises ValueError if the count is not a number, OSError if a
    descriptor does not exist.
    """
    values = {name: environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    if values["LISTEN_PID"] != str(pid):
        return ()
    names = values["LISTEN_FDNAMES"].split(":")
    taken = []
    for number in range(int(values["LISTEN_FDS"] or 0)):
        descriptor = FIRST_DESCRIPTOR + number
        os.set_inheritable(descriptor, False)
        taken.append(
            InheritedDescriptor(names[number] if number < len(names) and names[number] else "unknown", descriptor)
        )
    return tuple(taken)


class UnusableSocketError(Exception):
    """An inherited descriptor cannot be served."""


def inherit(environment: MutableMapping[str, str], pid: int) -> tuple[InheritedSocket, ...]:
    """Return the sockets that a service manager passed to this process; raises UnusableSocketError."""
    try:
        return adopt(take_descriptors(environment, pid))
    except (ValueError, OSError) as error:
        raise UnusableSocketError(f"LISTEN_FDS: {error}: not the descriptors of a service manager") from error


def adopt(inherited: Iterable[InheritedDescriptor]) -> tuple[InheritedSocket, ...]:
    """Return the sockets of the descriptors; raises UnusableSocketError for one that is no listening stream socket."""
    return tuple(_adopt(each) for each in inherited)


def _adopt(inherited: InheritedDescriptor) -> InheritedSocket:
    try:
        sock = socket.socket(fileno=inherited.descriptor)
        is_known = sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        is_fit = (
            is_known and sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )
    except OSError as error:
        raise UnusableSocketError(f"systemd:{inherited.name}: {(error.strerror or str(error)).lower()}") from error
    if not is_fit:
        sock.close()
        raise UnusableSocketError(
            f"systemd:{inherited.name}: not a listening stream socket; its unit needs ListenStream= and Accept=no"
        )
    sock.setblocking(False)
    return InheritedSocket(inherited.name, _address(sock), sock)


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
