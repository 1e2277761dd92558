"""Connect to an address as users write it, within a time limit; try every address that a name resolves to."""

import socket
import time
from typing import Any

from echod.net.address import TcpAddress, UnixAddress

SocketAddress = tuple[Any, ...] | str
"""An address of the socket module: a path, or host, port and for IPv6 two more items."""

Found = list[tuple[int, SocketAddress]]
"""Address families and addresses, in the order to try them."""

LEAST_S = 0.001
"""The least timeout of a socket operation: 0 would make the socket non-blocking, which fails with another error."""


class UnknownHostError(Exception):
    """The name cannot be resolved."""


class UnusableFileError(Exception):
    """A certificate or key file cannot be used; the message names it."""


class UnreachableError(Exception):
    """No address accepts a connection; the message says why, for each of them."""


def left_s(end: float) -> float:
    """Return the seconds until `end` (time.monotonic), at least `LEAST_S`."""
    return max(end - time.monotonic(), LEAST_S)


def resolve(target: TcpAddress | UnixAddress, wait_s: float) -> Found:
    """Return every address of the target, in the order to try them; raise UnknownHostError."""
    if isinstance(target, UnixAddress):
        return [(socket.AF_UNIX, target.path)]
    try:
        return _looked_up(target, socket.AI_NUMERICHOST)
    except OSError:
        return _looked_up_within(target, wait_s)


def _looked_up(target: TcpAddress, flags: int) -> Found:
    # As bytes, or Python would import its IDNA codec, though a name here is always ASCII.
    found = socket.getaddrinfo(target.host.encode(), target.port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]


def _looked_up_within(target: TcpAddress, wait_s: float) -> Found:
    """Resolve in a thread, because getaddrinfo(3) has no timeout and Ctrl-C does not interrupt it."""
    import threading

    found: Found = []
    errors = [f"no answer from the name server within {wait_s:g} s"]

    def look_up() -> None:
        try:
            found.extend(_looked_up(target, 0))
        except OSError as error:
            errors[:] = [words(error)]

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(wait_s)
    if not found:
        raise UnknownHostError(f"{target.host}: {errors[0]}")
    return found


def connect(found: Found, end: float) -> tuple[socket.socket, SocketAddress]:
    """Connect to the first address that accepts; return the connection and the address. Raise UnreachableError.

    Each attempt may take its share of the time that is left until `end`.
    """
    errors = []
    for left, (family, address) in zip(range(len(found), 0, -1), found, strict=True):
        now = time.monotonic()
        try:
            return _connect_one(family, address, now + left_s(end) / left), address
        except OSError as error:
            errors.append(f"{name(address)}: {words(error)}")
    raise UnreachableError("; ".join(errors))


def _connect_one(family: int, address: SocketAddress, end: float) -> socket.socket:
    connecting = socket.socket(family)
    try:
        while True:
            connecting.settimeout(left_s(end))
            try:
                connecting.connect(address)
            except BlockingIOError:  # the backlog of a Unix socket is full
                if time.monotonic() > end:
                    raise TimeoutError from None
                time.sleep(0.01)
            else:
                break
        if family != socket.AF_UNIX:
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connecting.close()
        raise
    return connecting


def name(address: SocketAddress) -> str:
    """Return the address as users write it."""
    return f"unix:{address}" if isinstance(address, str) else str(TcpAddress(*address[:2]))


def words(error: OSError) -> str:
    """Describe an error of a connection."""
    return "connection timed out" if isinstance(error, TimeoutError) else (error.strerror or "").lower() or str(error)
