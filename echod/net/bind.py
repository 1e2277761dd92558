"""From addresses to sockets: resolve, bind, or take what a service manager handed over; all or nothing.

None of them listens yet: a client that came while the rest still fails would be reset. Knows no event loop and no
configuration file.
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

from echod.net.address import UNIX_PATH_BYTES, Address, HandedOver, TcpAddress, UnixAddress, normal_host, real_path
from echod.net.sockets import Bound, Endpoint, Key, identity, share_port
from echod.process import lockfile

LOCK_S = 1.0
"""How long others may bind at the same path, each for a moment; bounded, for one of them may be stopped."""


class BindError(Exception):
    """Why an address can't be listened on, and what to do about it."""


class BindErrors(Exception):
    """Every address that can't be listened on, with its reason."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = tuple(errors)


class Wanted(Struct, frozen=True):
    """An address to listen on, and how."""

    address: Address
    reuse_port: bool = False
    proxy_protocol: bool = False
    is_private: bool = False
    """A Unix socket's file is for its user and root alone."""
    name: str = ""
    """What the configuration calls it: `listen[0]`."""


class InheritedSocket(Struct, frozen=True):
    """A listening socket that was handed over, under the name that its unit gives it."""

    name: str
    endpoint: Endpoint
    socket: socket.socket


NONE_KEPT: Mapping[Key, Bound | None] = {}


def bind_all(
    entries: Iterable[Wanted],
    kept: Mapping[Key, Bound | None] = NONE_KEPT,
    inherited: Sequence[InheritedSocket] = (),
    wanted: dict[Key, Wanted] | None = None,
) -> dict[Key, Bound | None]:
    """A bound socket for every endpoint of the entries, in order, but None for those that are `kept`.

    An inherited socket serves the entry whose endpoint it has. Those that no entry wants follow, because clients may
    wait in their backlogs. A kept one that comes with its socket gets its options changed. Each entry goes to `wanted`.
    All or nothing: raises BindErrors with every fault, and nothing stays bound then.
    """
    sockets: dict[Key, Bound | None] = {}
    unclaimed = list(inherited)
    errors: list[str] = []

    def add(endpoint: Endpoint, how: Wanted | None = None) -> None:
        heir = next((heir for heir in unclaimed if heir.endpoint == endpoint), None)
        key = _key(endpoint, sockets, is_there=heir is not None)
        if heir:
            unclaimed.remove(heir)
        if wanted is not None and how:
            wanted[key] = how
        if key in kept:
            sockets[key] = None
            _adapt(None if heir else kept[key], how)
        else:
            sockets[key] = Bound(heir.socket, is_inherited=True) if heir else bind(endpoint, how)

    for entry in entries:
        try:
            for endpoint in _endpoints(entry.address, inherited):
                add(endpoint, entry)
        except BindError as error:
            errors.append(str(error))
    for heir in [*unclaimed]:
        add(heir.endpoint)
    if errors:
        discard(sockets)
        raise BindErrors(errors)
    return sockets


def _key(endpoint: Endpoint, others: Collection[Key], *, is_there: bool) -> Key:
    """A name for one more listener, whose socket may be there already; raises BindError if another has its address."""
    number = next(number for number in count() if (endpoint, number) not in others)
    if number and not is_there and not _is_any_port(endpoint):
        raise BindError(f"{endpoint}: listed twice")
    return endpoint, number


def _is_any_port(endpoint: Endpoint) -> bool:
    return isinstance(endpoint.sockaddr, tuple) and endpoint.sockaddr[1] == 0


def _adapt(bound: Bound | None, how: Wanted | None) -> None:
    if bound and how:
        share_port(bound.socket, is_shared=how.reuse_port)


def _endpoints(address: Address, inherited: Sequence[InheritedSocket]) -> list[Endpoint]:
    if not isinstance(address, HandedOver):
        return resolve(address)
    found = [heir.endpoint for heir in inherited if heir.name == address.name]
    if not found:
        names = ", ".join(sorted({heir.name for heir in inherited})) or "none"
        raise BindError(f"{address}: no socket of that name was handed over; FileDescriptorName= sets it (got {names})")
    return found


def resolve(address: TcpAddress | UnixAddress) -> list[Endpoint]:
    """Every endpoint that the address stands for, however it is written; may wait for a name server.

    Raises BindError.
    """
    match address:
        case UnixAddress(path):
            return [unix_endpoint(path)]
        case TcpAddress(host, port):
            try:
                # As bytes, for a str would import the idna codec (6 ms) to encode what is ASCII anyway.
                name = normal_host(host).encode("ascii")
                found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            except (OSError, UnicodeError) as error:
                words = getattr(error, "strerror", None) or error
                raise BindError(f"{address}: unknown host: {words}") from error
            return list(dict.fromkeys(Endpoint(family, sockaddr) for family, *_, sockaddr in found))


def unix_endpoint(path: str) -> Endpoint:
    """The endpoint of a Unix socket, however its path is written.

    Its directory may be named through a symbolic link because the real path is too long to bind: that path is kept.
    """
    real = real_path(path)
    return Endpoint(socket.AF_UNIX, real if len(os.fsencode(real)) <= UNIX_PATH_BYTES else path)


def is_possible(address: Address) -> bool:
    """Whether this kernel has the address's family: one that was booted without IPv6 has no address of it."""
    if not isinstance(address, TcpAddress) or ":" not in normal_host(address.host):
        return True
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError as error:
        return error.errno != errno.EAFNOSUPPORT
    return True


def discard(sockets: Mapping[Key, Bound | None]) -> None:
    """Close sockets that will not be listened on after all, and remove their files."""
    for bound in sockets.values():
        if bound:
            bound.close()


def bind(endpoint: Endpoint, how: Wanted | None = None) -> Bound:
    """A socket bound to the endpoint; raises BindError."""
    try:
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise BindError(f"{endpoint}: {_advice(endpoint, error)}") from error
    try:
        if isinstance(endpoint.sockaddr, str):
            with _locked(endpoint.sockaddr):
                _remove_stale(endpoint.sockaddr)
                sock.bind(endpoint.sockaddr)
                if how and how.is_private:
                    os.chmod(endpoint.sockaddr, 0o600)  # before anyone can connect: nobody listens yet
                return Bound(sock, identity(endpoint.sockaddr))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if how and how.reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if endpoint.family == socket.AF_INET6:
            # [::] then means IPv6 alone, and 0.0.0.0 can be listed beside it.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(endpoint.sockaddr)
    except OSError as error:
        sock.close()
        raise BindError(f"{endpoint}: {_advice(endpoint, error)}") from error
    except BindError:
        sock.close()
        raise
    return Bound(sock)


def _advice(endpoint: Endpoint, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                "address already in use; `ss -ltnp` shows by whom, -l ADDRESS takes another, "
                "and several echods share one with reuse_port = true in each"
            )
        case errno.EADDRNOTAVAIL:
            return "not an address of this machine; `ip address` lists them"
        case errno.EAFNOSUPPORT:
            return "this kernel has no IPv6; list addresses of IPv4 alone"
        case errno.EMFILE | errno.ENFILE:
            return "no descriptor left; raise the limit of open files (ulimit -n, LimitNOFILE=)"
        case errno.EACCES | errno.EPERM if endpoint.family != socket.AF_UNIX:
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
                words = (error.strerror or str(error)).lower()
                raise BindError(f"unix:{path}: {name}: {words}; remove it if no echod is starting") from error
            raise


def _remove_stale(path: str) -> None:
    """Remove the socket file that a dead process left."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise BindError(f"unix:{path}: a file that is no socket is in the way")
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
