"""Sockets as the kernel sees them: their names, how to stop listening without a reset, what is queued in them.

Linux facts live here, each with its source; no event loop and no configuration file is known.
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

BACKLOG = 4096
"""Handshakes that may wait for an accept; the kernel caps it at net.core.somaxconn, 4096 since Linux 5.4."""

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
    """A socket address as people write it, whatever the family of the socket that brought it.

    A client of a Unix socket has no name of its own.
    """
    if isinstance(sockaddr, tuple):
        host, port = sockaddr[0], sockaddr[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(sockaddr, str | bytes) and sockaddr:
        # It may hold anything: what can't be shown in a line would spoil it.
        return "unix:" + "".join(each if each.isprintable() else repr(each)[1:-1] for each in os.fsdecode(sockaddr))
    # None: the peer was gone before it was accepted.
    return "unix" if family == socket.AF_UNIX or sockaddr == "" else "unknown"


class ListenError(Exception):
    """Why a socket that is bound can't be listened on."""


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
        """Let clients come; raises ListenError if another process was quicker."""
        if self.is_inherited:
            return  # it is listened on, with the backlog that its unit says
        try:
            self.socket.listen(BACKLOG)
        except OSError as error:
            name = peer_name(self.socket.family, self.socket.getsockname())
            raise ListenError(f"{name}: {(error.strerror or str(error)).lower()}") from error

    def try_listening(self) -> None:
        """See whether `listen` can go well, on a socket that is to be closed and that no client finds meanwhile.

        Of two new addresses that overlap both can be bound, and only one listened on. Raises ListenError. A Unix socket
        is refused when it is bound already, and who shares a port can't be in anybody's way.
        """
        sock = self.socket
        is_shared = sock.family == socket.AF_UNIX or sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        if not is_shared and _bind_to_no_interface(sock):
            self.listen()

    def close(self) -> None:
        """Close the socket and remove its file, if it is still the same."""
        if self.file is not None:
            with suppress(OSError):
                path = self.socket.getsockname()
                if identity(path) == self.file:
                    os.unlink(path)
        self.socket.close()

    def give(self, uid: int, gid: int) -> None:
        """Make its file another user's, if it is a Unix socket's; raises OSError."""
        if self.file is None:
            return
        # By descriptor: what somebody puts in its place in between is not given away.
        found = os.open(self.socket.getsockname(), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(found)
            if (status.st_dev, status.st_ino) == self.file:
                _chown(found, uid, gid)
        finally:
            os.close(found)


def _chown(found: int, uid: int, gid: int) -> None:
    try:
        os.chown(f"/proc/self/fd/{found}", uid, gid)  # fchown(2) takes no O_PATH
    except FileNotFoundError as error:
        raise OSError(error.errno, "a Unix socket can't be given away without /proc") from error


def share_port(sock: socket.socket, *, is_shared: bool) -> None:
    """Let other processes listen on the same port, or no more of them (SO_REUSEPORT), while it listens already.

    Measured on Linux 6.18: whoever binds later is let in, and the kernel then shares new clients out among all.
    """
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, is_shared)


def is_port_shared(sock: socket.socket) -> bool:
    """Whether other processes may listen on the same port (SO_REUSEPORT); a Unix socket has none."""
    return sock.family != socket.AF_UNIX and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))


def identity(path: str) -> tuple[int, int]:
    """Device and inode of a file, which tell it from a later one of the same name."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


Prepared = Mapping[ListenerKey, BoundSocket | ListenerSettings]
"""The listeners of a configuration: a new socket for each, or only the settings if the listener exists already."""


# -- stopping ----------------------------------------------------------------------------------------------------------


def refuse_new_handshakes(sock: socket.socket) -> None:
    """Let no new client in, while those whose handshake is under way or complete can still be accepted.

    TCP: bound to an interface that doesn't exist the listener is found by no SYN, so later clients are refused at once;
    a handshake under way has been given its interface already and goes on. Before Linux 5.7 that takes a privilege, and
    where other processes share the port (SO_REUSEPORT) the kernel may choose this listener all the same: there a
    minimum TTL of 255 drops each SYN that crossed a router or comes from loopback (TTL 64), and the sender retries a
    second later; what is accepted meanwhile inherits that: see `welcome`. A Unix listener is shut down for reading:
    connect(2) is refused at once, and what is queued can be accepted until EINVAL.
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
    """Whether some client of a TCP listener has still to acknowledge that it is let in; False if nobody can tell.

    Asks sock_diag(7), or where a sandbox forbids that, the tables of /proc: 20 ms with 10 000 connections.
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
    """Ask for sockets of that port in SYN_RECV: the first message of the answer is one, or the end of the list."""
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


def welcome(descriptor: int, family: int) -> None:
    """Undo on an accepted socket what `refuse_new_handshakes` made it inherit."""
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
"""How long to read on after a half-close for the peer's end of stream: closing on unread input would reset it."""


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


def failure(descriptor: int) -> int:
    """Return the errno of a connection's error that no call has reported yet, else 0 (socket(7), SO_ERROR)."""
    with borrowed(descriptor) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def reset_on_close(descriptor: int) -> None:
    """Make the close of a connection reset it, and forget what the peer has not acknowledged (socket(7), SO_LINGER).

    Else the kernel keeps megabytes of it for a peer that takes none, for minutes, in which the peer isn't told either.
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
