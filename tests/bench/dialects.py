"""How a line is put to each server: the request and its reply."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dialect:
    """A protocol to send a line to a server."""

    name: str
    ask: Callable[[str], tuple[bytes, bytes]]
    """The request for a line without its LF, and its only correct reply."""


def _upper(line: str) -> tuple[bytes, bytes]:
    return f"{line}\n".encode(), f"{line.upper()}\n".encode()


def _memcached(line: str) -> tuple[bytes, bytes]:
    """A meta get of a key that isn't there, as many bytes long as the line with its LF."""
    return f"mg {line[4:]}\r\n".encode(), b"EN\r\n"


def _redis(line: str) -> tuple[bytes, bytes]:
    """ECHO in RESP, as client libraries send it."""
    bulk = f"${len(line.encode())}\r\n{line}\r\n".encode()
    return b"*2\r\n$4\r\nECHO\r\n" + bulk, bulk


UPPER = Dialect("upper", _upper)
MEMCACHED = Dialect("memcached", _memcached)
REDIS = Dialect("redis", _redis)
