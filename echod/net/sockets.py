"""Sockets as the kernel sees them: addresses, options, closing a listener without a reset, queued bytes.

This module collects the facts about Linux, each with its source; it knows neither the event loop nor the configuration.
"""

import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from msgspec import Struct

from echod.net.access import AccessRules
from echod.net.tls import Tls

BACKLOG = 4096
"""Complete handshakes that may wait for an accept; the kernel caps it at net.core.somaxconn, 4096 since Linux 5.4."""

_IP_MINTTL = 21  # linux/in.h
_IPV6_MINHOPCOUNT = 73  # linux/in6.h
_SO_BINDTOIFINDEX = 62  # asm-generic/socket.h
_NO_INTERFACE = 2**31 - 1
_NETLINK_SOCK_DIAG = 4  # linux/netlink.h
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_DONE = 3
_SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
_TCP_SYN_RECV = 3  # netinet/tcp.h


RawAddress = tuple[Any, ...] | str | bytes
"""An address in the format of the socket module: a tuple for TCP, a path for a Unix socket, bytes if it is abstract."""


class SocketAddress(Struct, frozen=True):
    """A resolved address to listen on, with its family; a host name may resolve to several."""

    family: socket.AddressFamily
    sockaddr: RawAddress

    def __str__(self) -> str:
        return peer_name(self.family, self.sockaddr)


def peer_name(family: int, sockaddr: RawAddress | None) -> str:
    """Return an address for people to read; `family` is that of the socket, and the address may be of another one.

    The result is "unix" for the usual client of a Unix socket, which has no address of its own.
    """
    if isinstance(sockaddr, tuple):
        host, port = sockaddr[0], sockaddr[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(sockaddr, str | bytes) and sockaddr:
        # A path may contain any character, such as a line feed.
        return "unix:" + "".join(each if each.isprintable() else repr(each)[1:-1] for each in os.fsdecode(sockaddr))
    # None: the peer was gone before it was accepted.
    return "unix" if family == socket.AF_UNIX or sockaddr == "" else "unknown"


class ListenError(Exception):
    """A bound socket cannot be listened on."""


class ListenerKey(NamedTuple):
    """Identifies a listener across reloads and live upgrades."""

    address: SocketAddress
    number: int
    """Tells several listeners of the same `host:0` apart."""


class ListenerSettings(Struct, frozen=True, omit_defaults=True):
    """How to serve the clients of a listener; the defaults apply to a socket without an entry in the configuration."""

    name: str = ""
    """The configuration's entry, such as `listen[0]`."""
    proxy_protocol: bool = False
    """Whether clients send a PROXY header first."""
    reuse_port: bool = False
    """Whether other processes of the same user may listen on the same port."""
    is_private: bool = False
    """Whether only our user and root may connect to the Unix socket."""
    is_tls: bool = False
    """Whether clients speak TLS; without `tls`, as on a predecessor's listener that retires, they are rejected."""
    tls: Tls | None = None
    access: AccessRules | None = None
    """Which clients may connect; None admits all."""


DEFAULT_SETTINGS = ListenerSettings()


class BoundSocket(Struct, frozen=True):
    """A socket to listen on, and the settings of its listener."""

    socket: socket.socket
    settings: ListenerSettings = DEFAULT_SETTINGS
    file: tuple[int, int] | None = None
    """Device and inode of a Unix socket's file: a later file of the same name is not ours to remove."""
    is_inherited: bool = False
    """Whether a service manager holds the socket too; later clients wait in it for the next process."""

    def listen(self) -> None:
        """Start to listen; raises ListenError, for example if another process listens on the port already."""
        if self.is_inherited:
            return  # it listens already, with the backlog of its unit
        try:
            self.socket.listen(BACKLOG)
        except OSError as error:
            name = peer_name(self.socket.family, self.socket.getsockname())
            raise ListenError(f"{name}: {(error.strerror or str(error)).lower()}") from error

    def try_listening(self) -> None:
        """Check whether `listen` would succeed, without any client noticing; raises ListenError. Close the socket then.

        Two sockets with overlapping addresses can both be bound, but only one can listen. A Unix socket in use is
        refused by the bind already, and a shared port conflicts with nobody.
        """
        sock = self.socket
        is_shared = sock.family == socket.AF_UNIX or sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        if not is_shared and _bind_to_no_interface(sock):
            self.listen()

    def close(self) -> None:
        """Close the socket, and remove its file unless another one has replaced it."""
        if self.file is not None:
            with suppress(OSError):
                path = self.socket.getsockname()
                if file_identity(path) == self.file:
                    os.unlink(path)
        self.socket.close()

    def change_owner(self, uid: int, gid: int) -> None:
        """Change the owner of a Unix socket's file; raises OSError."""
        if self.file is None:
            return
        # By descriptor, so that a file that replaces it meanwhile keeps its owner.
        found = os.open(self.socket.getsockname(), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(found)
            if (status.st_dev, status.st_ino) == self.file:
                _chown(found, uid, gid)
        finally:
            os.close(found)


def _chown(found: int, uid: int, gid: int) -> None:
    try:
        os.chown(f"/proc/self/fd/{found}", uid, gid)  # fchown(2) fails for O_PATH
    except FileNotFoundError as error:
        raise OSError(error.errno, "the owner of a Unix socket cannot be changed without /proc") from error


def share_port(sock: socket.socket, *, is_shared: bool) -> None:
    """Allow or forbid that other processes listen on the same port (SO_REUSEPORT), even while the socket listens.

    Measured on Linux 6.18: a later bind succeeds, and the kernel then distributes new clients among all sockets.
    """
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, is_shared)


def is_port_shared(sock: socket.socket) -> bool:
    """Whether other processes may listen on the same port (SO_REUSEPORT); False for a Unix socket."""
    return sock.family != socket.AF_UNIX and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))


def file_identity(path: str) -> tuple[int, int]:
    """Return the device and inode of a file, which distinguish it from a later file with the same name."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


Prepared = Mapping[ListenerKey, BoundSocket | ListenerSettings]
"""The listeners of a configuration: a new socket for each, or only the settings if the listener exists already."""


# -- closing a listener ------------------------------------------------------------------------------------------------


def refuse_new_handshakes(sock: socket.socket) -> None:
    """Refuse new clients, while those whose handshake is under way or complete can still be accepted.

    TCP: the listener is bound to an interface that does not exist. No SYN matches it then, so later clients are refused
    at once; handshakes under way have recorded their interface and continue. Before Linux 5.7 this needs a privilege,
    and if other processes share the port (SO_REUSEPORT), the kernel may still choose this listener. In these cases a
    minimum TTL of 255 drops each SYN that crossed a router or comes from loopback (TTL 64), and its sender retries
    after a second. Accepted sockets inherit that option: see `reset_inherited_options`.
    Unix: shut down for reading, the listener refuses connect(2), and its backlog can be accepted until EINVAL.
    """
    with suppress(OSError):
        if sock.family == socket.AF_UNIX:
            sock.shutdown(socket.SHUT_RD)
        elif sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) or not _bind_to_no_interface(sock):
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MINHOPCOUNT, 255)
            sock.setsockopt(socket.IPPROTO_IP, _IP_MINTTL, 255)  # also for IPv4 clients of a dual-stack listener


def _bind_to_no_interface(sock: socket.socket) -> bool:
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NO_INTERFACE)
    except OSError:
        return False
    return True


def has_handshakes_under_way(sock: socket.socket) -> bool:
    """Whether a handshake with a TCP listener is incomplete (SYN_RECV); False if that cannot be determined.

    Asks sock_diag(7), or if a sandbox forbids that, reads the tables of /proc: 20 ms with 10 000 connections.
    """
    if sock.family == socket.AF_UNIX:
        return False
    port = sock.getsockname()[1]
    try:
        return _diagnose_handshakes(sock.family, port)
    except OSError:
        return _is_handshake_listed(
            "/proc/self/net/tcp6" if sock.family == socket.AF_INET6 else "/proc/self/net/tcp", port
        )


def _diagnose_handshakes(family: int, port: int) -> bool:
    """Request the sockets of the port in SYN_RECV: the first message is such a socket, or the end of the list."""
    head = struct.pack("=IHHII", 72, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0)
    query = struct.pack("=BBxxIH46x", family, socket.IPPROTO_TCP, 1 << _TCP_SYN_RECV, socket.htons(port))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diagnosis:
        diagnosis.send(head + query)
        kind, code = struct.unpack_from("=4xH10xi", diagnosis.recv(8192))
    if kind != _SOCK_DIAG_BY_FAMILY and (kind, code) != (_NLMSG_DONE, 0):
        raise OSError(-code, "no diagnosis")
    return bool(kind == _SOCK_DIAG_BY_FAMILY)


def _is_handshake_listed(table: str, port: int) -> bool:
    """Look for the port in state SYN_RECV (proc_pid_net_tcp(5): number, local address, remote address, state, ...)."""
    end, state = b":%04X" % port, b"%02X" % _TCP_SYN_RECV
    with suppress(OSError), open(table, "rb") as lines:
        return any(columns[3] == state and columns[1].endswith(end) for columns in map(bytes.split, lines))
    return False


def reset_inherited_options(descriptor: int, family: int) -> None:
    """Reset the options that an accepted socket inherits from its listener after `refuse_new_handshakes`."""
    if family == socket.AF_UNIX:
        return
    with suppress(OSError), borrowed(descriptor) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MINHOPCOUNT, 0)
        sock.setsockopt(socket.IPPROTO_IP, _IP_MINTTL, 0)


def pass_on_no_delay(bound: BoundSocket) -> bool:
    """Set TCP_NODELAY on a listener, for its accepted sockets to inherit (Linux); False if each needs it set itself.

    The options of a listener that a service manager also holds are not changed.
    """
    sock = bound.socket
    if sock.family == socket.AF_UNIX:
        return True
    if not bound.is_inherited:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


def set_no_delay(descriptor: int) -> None:
    """Send written data at once, without waiting for the acknowledgement of earlier data (TCP_NODELAY)."""
    with suppress(OSError), borrowed(descriptor) as sock:  # the peer may be gone already
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# -- established connections -------------------------------------------------------------------------------------------

LINGER_S = 1.0
"""How long to read for the peer's end of stream after a half-close: closing with unread input would reset the peer."""


@contextmanager
def borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Yield a socket object for a connection's descriptor, which stays open and belongs to the caller."""
    sock = socket.socket(fileno=descriptor)
    try:
        yield sock
    finally:
        sock.detach()


def half_close(descriptor: int) -> None:
    """End our side of the stream (shutdown(2)); raises OSError if the connection is gone."""
    with borrowed(descriptor) as sock:
        sock.shutdown(socket.SHUT_WR)


def pending_error(descriptor: int) -> int:
    """Return the errno of a connection's error that no call has reported yet, else 0 (socket(7), SO_ERROR)."""
    with borrowed(descriptor) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def reset_on_close(descriptor: int) -> None:
    """Make the close of a connection reset it and discard unacknowledged data (socket(7), SO_LINGER).

    Otherwise the kernel would keep megabytes for minutes for a peer that does not read, and the peer would see no end.
    """
    with borrowed(descriptor) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def peek(descriptor: int, room: memoryview) -> bytes:
    """Return unread input that fits into `room` without consuming it (MSG_PEEK); b"" if there is none."""
    with borrowed(descriptor) as sock, suppress(OSError):
        return room[: sock.recv_into(room, 0, socket.MSG_PEEK)].tobytes()
    return b""


def is_ended(descriptor: int) -> bool:
    """Whether the peer has ended its stream or the connection has failed, even if input is unread (poll(2))."""
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    return bool(poll.poll(0))


def unacknowledged_bytes(descriptor: int) -> int:
    """Return how many sent bytes the peer's kernel has not acknowledged (SIOCOUTQ, tcp(7)); a FIN counts as one.

    For a Unix socket, the memory that holds what the peer has not read: it shows progress, but is no number of bytes.
    """
    return _queued(descriptor, termios.TIOCOUTQ)


def acknowledged_bytes(descriptor: int) -> int:
    """Return how many bytes the peer's kernel has acknowledged since the connection began (TCP_INFO, Linux 4.1)."""
    sock = socket.socket(fileno=descriptor)
    try:
        (count,) = struct.unpack_from("Q", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128), 120)
    finally:
        sock.detach()
    return int(count)


def unread_bytes(descriptor: int) -> int:
    """Return how many bytes have arrived and were not read (SIOCINQ, tcp(7), unix(7))."""
    return _queued(descriptor, termios.FIONREAD)


def _queued(descriptor: int, request: int) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(descriptor, request, b"\0\0\0\0"))[0]
    return count
