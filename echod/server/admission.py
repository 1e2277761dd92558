"""Admission control: enforces the connection limits, and ends the clients beyond them with an error line.

Owns the connections that are being rejected, the self-probes, and the number of clients per address. `Clients` owns the
connections that are served.
"""

import time
from collections import Counter

import structlog

from echod.config.schema import RESERVED_FILES, Limits
from echod.server.connection import Connection
from echod.server.rate_limit import RateLimit
from echod.telemetry.reasons import RejectReason
from echod.telemetry.stats import Stats

MIN_LINGERING = RESERVED_FILES // 2
MAX_LINGERING = 1024
"""Bounds for how many rejected clients may linger at once to read their error line. Between them, it is the number of
descriptors that the admitted connections leave. The oldest is closed for the next, so rejected clients delay nobody."""

LOG_INTERVAL_S = 10.0
"""The shortest time between two log lines about rejected clients, so that a flood of clients does not flood the log."""

ERRORS = {
    RejectReason.LIMIT: "too many connections",
    RejectReason.ADDRESS: "too many connections from your address",
    RejectReason.PROXY: "",
    RejectReason.DENIED: "",
    RejectReason.RATE: "connecting too often from your address",
    RejectReason.TLS: "",
}
"""The error line for each rejected client; an empty one is not sent."""

_MAPPED = "::ffff:"

log = structlog.get_logger()


class Admission:
    """Decides whether a client is admitted, and keeps rejected clients until they are closed."""

    def __init__(self, stats: Stats, open_files: int) -> None:
        """`open_files` is the process's limit of descriptors."""
        self._rejected: dict[Connection, None] = {}  # a set that keeps its order: the oldest first
        self._others: set[Connection] = set()
        self.listeners = 0
        """How many listeners there are: each takes a descriptor."""
        self._stats = stats
        self._open_files = open_files
        self._per_host: Counter[str | None] = Counter()
        self._handshakes: Counter[str | None] = Counter()
        self._rate = RateLimit()
        self._logged = dict(stats.rejected)
        self._logged_at = float("-inf")

    @property
    def uncounted(self) -> list[Connection]:
        """The connections outside limits and statistics: rejected clients that linger, and self-probes."""
        return [*self._rejected, *self._others]

    @property
    def has_uncounted(self) -> bool:
        """Whether any rejected client or self-probe is connected."""
        return bool(self._rejected or self._others)

    def check(self, host: str | None, connections: int, limits: Limits) -> RejectReason | None:
        """Return why one more client from `host` exceeds a limit, or None; call it once for each client."""
        if connections >= limits.connections:
            return RejectReason.LIMIT
        if host and 0 < limits.connections_per_address <= self._per_host[_address(host)]:
            return RejectReason.ADDRESS
        if host and limits.connection_rate and not self._rate.admits(host, limits.connection_rate, time.monotonic()):
            return RejectReason.RATE
        return None

    def check_handshake(self, host: str | None, connections: int, limits: Limits) -> RejectReason | None:
        """Return why one more TLS handshake with `host` exceeds a limit, or None.

        The limits are laxer than for connections, because a client can read its error line only after its handshake.
        """
        if connections >= limits.connections + MIN_LINGERING:
            return RejectReason.LIMIT
        if host and 0 < limits.connections_per_address <= self._handshakes[_address(host)]:
            return RejectReason.ADDRESS
        return None

    def begin_handshake(self, host: str | None) -> None:
        """Count a TLS handshake with this address."""
        self._handshakes[_address(host)] += 1

    def end_handshake(self, host: str | None) -> None:
        """Undo `begin_handshake`."""
        _decrement(self._handshakes, _address(host))

    def admit(self, host: str | None) -> None:
        """Count a served client of this address."""
        self._per_host[_address(host)] += 1

    def release(self, host: str | None) -> None:
        """Undo `admit` for a served client that has closed."""
        _decrement(self._per_host, _address(host))

    def reject(self, connection: Connection, reason: RejectReason, limits: Limits, *, can_be_told: bool = True) -> None:
        """Send a client its error line, if it can be told, and let it linger; call `forget` when it is closed."""
        self._stats.rejected[reason.value] += 1
        # The client being rejected has its descriptor already.
        unused = self._open_files - RESERVED_FILES // 2 - self.listeners - limits.connections
        if len(self._rejected) >= min(max(unused, MIN_LINGERING), MAX_LINGERING) - 1:
            next(iter(self._rejected)).close_early()
        self._rejected[connection] = None
        connection.finish(reason, ERRORS[reason] if can_be_told else "")
        log.debug("connection rejected", peer=connection.peer, reason=reason.value)

    def forget_idle(self) -> None:
        """Forget the connection rates of addresses that have no recent connection; call it periodically."""
        self._rate.forget_idle(time.monotonic())

    def keep(self, connection: Connection) -> None:
        """Keep a connection that is not counted: a self-probe, or a client that the predecessor rejected."""
        self._others.add(connection)

    def forget(self, connection: Connection) -> None:
        """Remove a closed connection that was rejected or kept."""
        self._rejected.pop(connection, None)
        self._others.discard(connection)

    def log_rejected(self, connections: int) -> None:
        """Log how many clients were rejected since the last such line, at most once per `LOG_INTERVAL_S`."""
        now = time.monotonic()
        if self._stats.rejected != self._logged and now - self._logged_at >= LOG_INTERVAL_S:
            counts = {reason: count - self._logged[reason] for reason, count in self._stats.rejected.items()}
            self._logged, self._logged_at = dict(self._stats.rejected), now
            log.warning("connections rejected", connections=connections, **counts)

    def log_starved(self, error: OSError) -> None:
        """Log that accepting is paused for lack of descriptors or memory; clients wait in the backlog."""
        advice = "raise the limit of open files, or lower limits.connections"
        log.warning("accepting paused", error=error.strerror, advice=advice)


def _address(host: str | None) -> str | None:
    """Normalize an address for counting: an IPv4 client of a dual-stack listener counts under its IPv4 address."""
    return host.removeprefix(_MAPPED) if host and host.startswith(_MAPPED) and "." in host else host


def _decrement(counter: Counter[str | None], key: str | None) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
