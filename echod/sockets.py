"""Listening sockets as the kernel sees them: resolve an address, bind it, stop listening without a reset.

Linux facts live here, each with its source; no event loop and no configuration file is known.
"""

import errno
import fcntl
import os
import socket
import stat
import struct
import termios
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from echod.address import Address, TcpAddress, UnixAddress

BACKLOG = 4096
"""Handshakes that may wait for an accept; the kernel caps it at net.core.somaxconn, 4096 since Linux 5.4."""

_IP_MINTTL = 21  # linux/in.h
_IPV6_MINHOPCOUNT = 73  # linux/in6.h


SockAddr = tuple[Any, ...] | str
"""A socket address as the socket module has it: a tuple for TCP, a path for a Unix socket."""


class BindError(Exception):
    """Why an address can't be listened on, and what to do about it."""


class BindErrors(Exception):
    """Every address that can't be listened on, with its reason."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One socket address to listen on; a host name may resolve to several."""

    family: socket.AddressFamily
    sockaddr: SockAddr

    def __str__(self) -> str:
        return peer_name(self.family, self.sockaddr)


def peer_name(family: int, sockaddr: SockAddr | bytes | None) -> str:
    """A socket address as people write it; a client of a Unix socket has no name of its own."""
    if family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(sockaddr)}" if isinstance(sockaddr, str | bytes) and sockaddr else "unix"
    if not isinstance(sockaddr, tuple):
        return "unknown"  # the peer was gone before it was accepted
    host, port = sockaddr[0], sockaddr[1]
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


def resolve(address: Address) -> list[Endpoint]:
    """Every endpoint that the address stands for; may wait for a name server. Raises BindError."""
    match address:
        case UnixAddress(path):
            return [Endpoint(socket.AF_UNIX, path)]
        case TcpAddress(host, port):
            try:
                # As bytes, for a str would import the idna codec (6 ms) to encode what is ASCII anyway.
                found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            except (OSError, UnicodeError) as error:
                words = getattr(error, "strerror", None) or error
                raise BindError(f"{address}: unknown host: {words}") from error
            return list(dict.fromkeys(Endpoint(family, sockaddr) for family, *_, sockaddr in found))


@dataclass(frozen=True, slots=True)
class Bound:
    """A socket that listens, and for a Unix one device and inode of its file: a later file isn't ours to remove."""

    socket: socket.socket
    file: tuple[int, int] | None

    def close(self) -> None:
        """Close the socket and remove its file, if it is still the same."""
        if self.file is not None:
            with suppress(OSError):
                path = self.socket.getsockname()
                if _identity(path) == self.file:
                    os.unlink(path)
        self.socket.close()


Key = tuple[Endpoint, int]
"""Names a listener across reloads: its endpoint, and a number that tells several of `host:0` apart."""


def listen_all(
    addresses: Iterable[Address], kept: Collection[Key] = (), *, is_private: bool = False
) -> dict[Key, Bound | None]:
    """A listening socket for every endpoint of the addresses, in order, but None for those that are `kept`.

    A private Unix socket is for its user and root alone.
    All or nothing: raises BindErrors with every fault, and nothing stays bound then.
    """
    sockets: dict[Key, Bound | None] = {}
    faults: list[str] = []
    for address in addresses:
        try:
            for endpoint in resolve(address):
                key = next(key for number in count() if (key := (endpoint, number)) not in sockets)
                sockets[key] = None if key in kept else listen(endpoint, is_private=is_private)
        except BindError as error:
            faults.append(str(error))
    if faults:
        discard(sockets)
        raise BindErrors(faults)
    return sockets


def discard(sockets: Mapping[Key, Bound | None]) -> None:
    """Close listeners that will not be used after all, and remove their socket files."""
    for bound in sockets.values():
        if bound:
            bound.close()


def listen(endpoint: Endpoint, *, is_private: bool = False) -> Bound:
    """A socket that listens on the endpoint; raises BindError."""
    try:
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise BindError(f"{endpoint}: {_advice(endpoint, error)}") from error
    try:
        if isinstance(endpoint.sockaddr, str):
            with _stale_file_removed(endpoint.sockaddr):
                sock.bind(endpoint.sockaddr)
                file = _identity(endpoint.sockaddr)
                if is_private:
                    os.chmod(endpoint.sockaddr, 0o600)  # before anyone can connect: nobody listens yet
                sock.listen(BACKLOG)
                return Bound(sock, file)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == socket.AF_INET6:
            # [::] then means IPv6 alone, and 0.0.0.0 can be listed beside it.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(endpoint.sockaddr)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise BindError(f"{endpoint}: {_advice(endpoint, error)}") from error
    except BindError:
        sock.close()
        raise
    return Bound(sock, None)


def _advice(endpoint: Endpoint, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "address already in use; `ss -ltnp` shows by whom, and -l ADDRESS takes another"
        case errno.EADDRNOTAVAIL:
            return "not an address of this machine; `ip address` lists them"
        case errno.EMFILE | errno.ENFILE:
            return "no descriptor left; raise the limit of open files (ulimit -n, LimitNOFILE=)"
        case errno.EACCES | errno.EPERM if endpoint.family != socket.AF_UNIX:
            return "permission denied; a port below 1024 needs CAP_NET_BIND_SERVICE"
        case _:
            return (error.strerror or str(error)).lower()


# -- Unix sockets ------------------------------------------------------------------------------------------------------


@contextmanager
def _stale_file_removed(path: str) -> Iterator[None]:
    """Remove the socket file that a dead process left; two that start at once can't both think so."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(folder, path)
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise BindError(f"unix:{path}: a file that is no socket is in the way")
            if _is_answered(path):
                raise BindError(f"unix:{path}: address already in use; `ss -lxp` shows by whom")
            os.unlink(path)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, path: str) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BindError(f"unix:{path}: another process is binding in this folder right now; try again") from None
    except OSError:
        pass  # a file system without locks: a race of two starts stays possible there


def _is_answered(path: str) -> bool:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError as error:
            # A full backlog is somebody's; so is a socket of another type or one we may not write to.
            return error.errno != errno.ENOENT
    return True


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


# -- stopping ----------------------------------------------------------------------------------------------------------


def refuse_new_handshakes(sock: socket.socket) -> None:
    """Let no new client in, while those whose handshake is under way or complete can still be accepted.

    TCP: with a minimum TTL of 255 the kernel drops each SYN that crossed a router or comes from loopback (TTL 64),
    so the sender retries a second later and is refused then; measured: none of 15 000 late clients reset. What is
    accepted meanwhile inherits the option: see `welcome`. A Unix listener is shut down for reading: connect(2) is
    refused at once, and what is queued can be accepted until EINVAL.
    """
    with suppress(OSError):
        match sock.family:
            case socket.AF_UNIX:
                sock.shutdown(socket.SHUT_RD)
            case socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, _IP_MINTTL, 255)
            case socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MINHOPCOUNT, 255)
                sock.setsockopt(socket.IPPROTO_IP, _IP_MINTTL, 255)  # IPv4 clients of a dual-stack listener


def welcome(sock: socket.socket) -> None:
    """Undo on an accepted socket what `refuse_new_handshakes` made it inherit."""
    with suppress(OSError):
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MINHOPCOUNT, 0)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_IP, _IP_MINTTL, 0)


# -- established connections -------------------------------------------------------------------------------------------


def unacknowledged_bytes(descriptor: int) -> int:
    """Bytes written that the peer's kernel has not acknowledged (SIOCOUTQ, tcp(7)); a FIN counts as one.

    For a Unix socket: memory that holds what the peer has not read; it tells progress, but no number of bytes.
    """
    return _queued(descriptor, termios.TIOCOUTQ)


def unread_bytes(descriptor: int) -> int:
    """Bytes that have arrived and were not read (SIOCINQ, tcp(7), unix(7))."""
    return _queued(descriptor, termios.FIONREAD)


def _queued(descriptor: int, request: int) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(descriptor, request, b"\0\0\0\0"))[0]
    return count
