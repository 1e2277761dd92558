"""Listening sockets that a service manager handed over, made ready to be served."""

import socket
from collections.abc import Iterable

from echod.binding import Heir
from echod.sockets import Endpoint
from echod.systemd import Inherited


class UnfitSocketError(Exception):
    """Why a descriptor that was handed over can't be served."""


def adopt(handed: Iterable[Inherited]) -> tuple[Heir, ...]:
    """The sockets behind the descriptors; raises UnfitSocketError if one is none to accept stream clients from."""
    return tuple(_adopt(each) for each in handed)


def _adopt(handed: Inherited) -> Heir:
    try:
        sock = socket.socket(fileno=handed.descriptor)
        is_fit = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise UnfitSocketError(f"systemd:{handed.name}: {(error.strerror or str(error)).lower()}") from error
    if not is_fit:
        sock.close()
        raise UnfitSocketError(
            f"systemd:{handed.name}: no listening stream socket; its unit needs ListenStream= and Accept=no"
        )
    sock.setblocking(False)
    return Heir(handed.name, Endpoint(socket.AddressFamily(sock.family), sock.getsockname()), sock)
