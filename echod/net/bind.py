"""Turns configured addresses into sockets: resolves and binds them, or takes inherited sockets; all or nothing.

No new socket listens yet: if a later step failed, a client that had connected already would be reset. Knows neither an
event loop nor the configuration file.
"""

import errno
import os
import socket
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import count

from msgspec import Struct

from echod.net.address import UNIX_PATH_BYTES, Address, SystemdAddress, TcpAddress, UnixAddress, normal_host, real_path
from echod.net.sockets import (
    DEFAULT_SETTINGS,
    BoundSocket,
    ListenerKey,
    ListenerSettings,
    Prepared,
    SocketAddress,
    file_identity,
    share_port,
)
from echod.process import lockfile

LOCK_S = 1.0
"""How long to wait for other processes that bind the same path, each for a moment; one of them may be stopped."""


class BindError(Exception):
    """An address cannot be listened on; the message says why, and what to do about it."""


class BindErrors(Exception):
    """The errors of every address that cannot be listened on."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = tuple(errors)


class ListenEntry(Struct, frozen=True):
    """An address to listen on, as configured, and the settings of its listeners."""

    address: Address
    settings: ListenerSettings = DEFAULT_SETTINGS


class InheritedSocket(Struct, frozen=True):
    """A listening socket that a service manager passed to us, with the name that its unit gives it."""

    name: str
    address: SocketAddress
    socket: socket.socket


NONE_KEPT: Mapping[ListenerKey, BoundSocket | None] = {}


def bind_all(
    entries: Iterable[ListenEntry],
    kept: Mapping[ListenerKey, BoundSocket | None] = NONE_KEPT,
    inherited: Sequence[InheritedSocket] = (),
) -> Prepared:
    """Bind a socket for every address of the entries, in order; those in `kept` exist and are not bound again.

    An inherited socket serves the entry that has its address or its name. Inherited sockets that no entry claims come
    last, because clients may wait in their backlogs. If `kept` holds the socket of a listener, its options are adapted.
    Raises BindErrors with every error; no new socket stays bound then.
    """
    prepared: dict[ListenerKey, BoundSocket | ListenerSettings] = {}
    unclaimed = list(inherited)
    errors: list[str] = []

    def add(address: SocketAddress, settings: ListenerSettings) -> None:
        claimed = next((each for each in unclaimed if each.address == address), None)
        key = _key(address, prepared, is_inherited=claimed is not None)
        if claimed:
            unclaimed.remove(claimed)
        prepared[key] = settings if key in kept else _bind_or_take(address, settings, claimed)
        if not claimed and (bound := kept.get(key)):
            share_port(bound.socket, is_shared=settings.reuse_port)

    for entry in entries:
        try:
            for address in _resolve_or_find(entry.address, inherited):
                add(address, entry.settings)
        except BindError as error:
            errors.append(str(error))
    for each in [*unclaimed]:
        add(each.address, DEFAULT_SETTINGS)
    if errors:
        discard(prepared)
        raise BindErrors(errors)
    return prepared


def _key(address: SocketAddress, others: Collection[ListenerKey], *, is_inherited: bool) -> ListenerKey:
    """Return the key of one more listener; raises BindError if another listener has the same address."""
    number = next(number for number in count() if ListenerKey(address, number) not in others)
    is_any_port = isinstance(address.sockaddr, tuple) and address.sockaddr[1] == 0
    if number and not is_inherited and not is_any_port:
        raise BindError(f"{address}: listed twice")
    return ListenerKey(address, number)


def _resolve_or_find(address: Address, inherited: Sequence[InheritedSocket]) -> list[SocketAddress]:
    if not isinstance(address, SystemdAddress):
        return resolve(address)
    found = [each.address for each in inherited if each.name == address.name]
    if not found:
        names = ", ".join(sorted({each.name for each in inherited})) or "none"
        raise BindError(f"{address}: no inherited socket has that name; FileDescriptorName= sets it (got {names})")
    return found


def resolve(address: TcpAddress | UnixAddress) -> list[SocketAddress]:
    """Return every socket address that the address stands for; raises BindError. May wait for a name server."""
    match address:
        case UnixAddress(path):
            return [unix_address(path)]
        case TcpAddress(host, port):
            try:
                # As bytes: a str would import the idna codec (6 ms), although the host is ASCII.
                name = normal_host(host).encode("ascii")
                found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or error
                raise BindError(f"{address}: unknown host: {reason}") from error
            return list(dict.fromkeys(SocketAddress(family, sockaddr) for family, *_, sockaddr in found))


def unix_address(path: str) -> SocketAddress:
    """Return the socket address of a Unix socket, with symbolic links in its path resolved.

    If the resolved path is too long to bind, the path stays as it is written.
    """
    real = real_path(path)
    return SocketAddress(socket.AF_UNIX, real if len(os.fsencode(real)) <= UNIX_PATH_BYTES else path)


def is_possible(address: Address) -> bool:
    """Whether the kernel supports the address's family; it may have been booted without IPv6."""
    if not isinstance(address, TcpAddress) or ":" not in normal_host(address.host):
        return True
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError as error:
        return error.errno != errno.EAFNOSUPPORT
    return True


def _bind_or_take(address: SocketAddress, settings: ListenerSettings, claimed: InheritedSocket | None) -> BoundSocket:
    return BoundSocket(claimed.socket, settings, is_inherited=True) if claimed else bind(address, settings)


def new_sockets(prepared: Prepared) -> list[BoundSocket]:
    """Return the sockets that were bound or inherited, without the listeners that exist already."""
    return [each for each in prepared.values() if isinstance(each, BoundSocket)]


def discard(prepared: Prepared) -> None:
    """Close the new sockets, which will not be listened on after all, and remove their files."""
    for bound in new_sockets(prepared):
        bound.close()


def bind(address: SocketAddress, settings: ListenerSettings = DEFAULT_SETTINGS) -> BoundSocket:
    """Return a socket bound to the address; raises BindError."""
    try:
        sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise BindError(f"{address}: {_advice(address, error)}") from error
    try:
        if isinstance(address.sockaddr, str):
            with _locked(address.sockaddr):
                _remove_stale(address.sockaddr)
                sock.bind(address.sockaddr)
                if settings.is_private:
                    os.chmod(address.sockaddr, 0o600)  # nobody can connect yet, because the socket does not listen
                return BoundSocket(sock, settings, file_identity(address.sockaddr))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if settings.reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if address.family == socket.AF_INET6:
            # [::] then means IPv6 only, and 0.0.0.0 can be listed beside it.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address.sockaddr)
    except OSError as error:
        sock.close()
        raise BindError(f"{address}: {_advice(address, error)}") from error
    except BindError:
        sock.close()
        raise
    return BoundSocket(sock, settings)


def _advice(address: SocketAddress, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                "address already in use; `ss -ltnp` shows by whom, -l ADDRESS takes another, "
                "and several echods share one with reuse_port = true in each"
            )
        case errno.EADDRNOTAVAIL:
            return "not an address of this machine; `ip address` lists its addresses"
        case errno.EAFNOSUPPORT:
            return "this kernel has no IPv6; listen on IPv4 addresses only"
        case errno.EMFILE | errno.ENFILE:
            return "no descriptor left; raise the limit of open files (ulimit -n, LimitNOFILE=)"
        case errno.EACCES | errno.EPERM if address.family != socket.AF_UNIX:
            return "permission denied; a port below 1024 needs CAP_NET_BIND_SERVICE"
        case _:
            return (error.strerror or str(error)).lower()


# -- Unix sockets ------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Lock the path while binding: two daemons that start at once could both find and replace the same stale file.

    The lock is a file beside the socket's that only our user can open. The directory itself is no alternative, because
    every user who can read it could lock it.
    """
    name = f"{path}.lock"
    try:
        descriptor = _wait_for_lock(path, name)
    except lockfile.LockError:
        descriptor = None  # on a file system without locks, two starts can still interfere
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(name)
        if descriptor is not None:
            os.close(descriptor)


def _wait_for_lock(path: str, name: str) -> int:
    end = time.monotonic() + LOCK_S
    while True:
        try:
            return lockfile.lock(name)
        except BlockingIOError:
            if time.monotonic() > end:
                raise BindError(f"unix:{path}: another process is binding there; try again") from None
            time.sleep(0.005)
        except OSError as error:
            if os.path.lexists(name):
                reason = (error.strerror or str(error)).lower()
                raise BindError(f"unix:{path}: {name}: {reason}; remove it if no echod is starting") from error
            raise


def _remove_stale(path: str) -> None:
    """Remove the socket file of a process that has ended; raises BindError if a process still uses it."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise BindError(f"unix:{path}: the file exists and is not a socket")
        if _is_bound(path):
            raise BindError(f"unix:{path}: address already in use; `ss -lxp` shows by whom")
        os.unlink(path)


def _is_bound(path: str) -> bool:
    """Whether a process has the socket of this file open, listening or about to listen.

    The kernel finds the socket by the file's inode, however the path is written. A live stream socket refuses our
    datagram socket with EPROTOTYPE (connect(2)), so nothing enters its backlog; a stale file gives ECONNREFUSED.
    """
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            # A socket that we may not write to (EACCES) belongs to another user.
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True
