"""The state of an established connection, as one program hands it to the next in a live upgrade."""

import socket
from typing import Any

from msgspec import Struct

SavedAddress = list[Any] | bytes
"""A socket address: host, port and what follows them, or the path of a Unix socket."""


class ConnectionState(Struct, kw_only=True, omit_defaults=True):
    """Everything that a program needs to know to continue with an established connection.

    The names of the fields are a wire format: see `echod.upgrade.state_file`. Times are of CLOCK_MONOTONIC.
    """

    descriptor: int
    family: int
    peer: SavedAddress
    is_counted: bool = True
    """Whether limits and statistics count it: not if it is being rejected, is our own self-probe, or has no complete
    PROXY header yet."""
    opened_at: float
    bytes_in: int = 0
    bytes_out: int = 0
    lines: int = 0
    unanswered: bytes = b""
    """Input that was read but not answered yet: a partial line, or complete lines before it."""
    pending: bytes = b""
    """Replies that the kernel has not accepted yet; they are part of `bytes_out`."""
    reason: str | None = None
    """Why it is ending, if it is."""
    activity: dict[str, float | None] = {}
    listener: str = ""
    """The name of its listener, such as `listen[0]`, if the client is not admitted yet."""
    proxy_header: bytes | None = None
    """The part of the PROXY header that was read; None if the header is complete or none is expected."""

    @property
    def is_unix(self) -> bool:
        """Whether the client connected through a Unix socket."""
        return self.family == socket.AF_UNIX
