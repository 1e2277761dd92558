"""Why connections end and why clients are rejected; the values are the names that the statistics and the log use."""

from contextlib import suppress
from enum import Enum


class CloseReason(Enum):
    """Why an admitted client's connection ended."""

    CLIENT = "client"
    """The client ended its stream and got every reply."""
    RESET = "reset"
    """The client reset the connection, or it failed in another way."""
    IDLE = "idle"
    """The idle timeout ended."""
    LINE_TIMEOUT = "line timeout"
    """The client did not complete a partial line in time."""
    WRITE_TIMEOUT = "write timeout"
    """The client accepted none of its pending replies for too long."""
    LINE_TOO_LONG = "line too long"
    INVALID_UTF8 = "invalid utf-8"
    DRAINED = "drained"
    """A drain finished the connection, and the client was owed nothing."""
    CUT = "cut"
    """A drain aborted the connection while the client was still owed replies."""


class RejectReason(Enum):
    """Why a client was not admitted."""

    LIMIT = "limit"
    """`limits.connections` is reached."""
    ADDRESS = "address"
    """`limits.connections_per_address` is reached for the client's address."""
    PROXY = "proxy"
    """The PROXY header is missing, malformed or late."""
    DENIED = "denied"
    """The listener's `allow` or `deny` excludes the client's address."""
    RATE = "rate"
    """`limits.connection_rate` is exceeded by the client's address."""
    TLS = "tls"
    """The TLS handshake failed or was late."""


EndReason = CloseReason | RejectReason


def end_reason(value: str) -> EndReason:
    """Return the reason with this value; an unknown one, from another version of echod, counts as DRAINED."""
    for kind in (CloseReason, RejectReason):
        with suppress(ValueError):
            return kind(value)
    return CloseReason.DRAINED
