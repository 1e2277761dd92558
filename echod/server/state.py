"""The state of an established connection, as one program hands it to the next in a live upgrade."""

from typing import Any

from msgspec import Struct

SavedAddress = list[Any] | bytes
"""A socket address: host, port and the like, or the path of a Unix socket."""


class ConnectionState(Struct, kw_only=True, omit_defaults=True):
    """An established connection: what was, as far as a program that goes on with it has to know."""

    descriptor: int
    family: int
    peer: SavedAddress
    is_counted: bool = True
    """False for one that is being turned away, is ourselves, or has its PROXY header still to come."""
    opened_at: float
    bytes_in: int = 0
    bytes_out: int = 0
    lines: int = 0
    unfinished: bytes = b""
    """The line begun."""
    unsent: bytes = b""
    """Replies that the kernel has not taken yet; part of `bytes_out`."""
    reason: str | None = None
    """Why it is ending, if it is."""
    is_aborted: bool = False
    pace: dict[str, float | None] = {}
    header: bytes | None = None
    """The PROXY header as far as it has come; None where it is whole, or none is expected."""
