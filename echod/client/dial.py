"""From an address as people write it to a connection, within a time: every address that a name stands for is tried."""

import socket
import time
from typing import Any

from echod.net.address import TcpAddress, UnixAddress

SocketAddress = tuple[Any, ...] | str
"""As the socket module has it: a path, or host, port and for IPv6 two more."""

Found = list[tuple[int, SocketAddress]]
"""What a target stands for: families and addresses, in the order to try them."""

LEAST_S = 0.001
"""What is left, at least, of a time that is over: 0 would mean not to wait at all, which is another error."""


class UnknownHostError(Exception):
    """The name stands for no address."""


class UnreachableError(Exception):
    """Nobody could be connected to; why not, for each address."""


def left_s(end: float) -> float:
    """The seconds up to then, by the monotonic clock, but never none."""
    return max(end - time.monotonic(), LEAST_S)


def resolve(target: TcpAddress | UnixAddress, wait_s: float) -> Found:
    """Every address that the target stands for, with its family, in the order to try them. Raises UnknownHostError."""
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
    """In a thread, because a name server that is silent takes as long as it likes, Ctrl-C or not."""
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
    """A connection to the first address where somebody listens; the time is shared among those not tried yet.

    Raises UnreachableError.
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
    """The address as people write it."""
    return f"unix:{address}" if isinstance(address, str) else str(TcpAddress(*address[:2]))


def words(error: OSError) -> str:
    """What went wrong with a connection, as the middle of a sentence."""
    return "no connection in time" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
