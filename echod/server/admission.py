"""Admission control: enforces the connection limits, and ends the clients beyond them with an error line.

Owns the connections that are being rejected, the self-checks, and the number of clients per address. `Clients` owns the
connections that are served.
"""

import time
from collections import Counter

import structlog

from echod.config.schema import RESERVED_FILES, Limits
from echod.server.connection import Connection
from echod.telemetry.stats import Stats

LEAST_LINGERING = RESERVED_FILES // 2
MOST_LINGERING = 1024
"""Bounds for how many rejected clients may linger at once to read their error line. Between them, it is the number of
descriptors that the admitted connections leave. The oldest is closed for the next, so rejected clients delay nobody."""

TELL_S = 10.0
"""The shortest time between two log lines about rejected clients, so that a flood of clients does not flood the log."""

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
        self._told = dict(stats.rejected)
        self._told_at = float("-inf")

    @property
    def uncounted(self) -> list[Connection]:
        """The connections outside limits and statistics: rejected clients that linger, and self-checks."""
        return [*self._rejected, *self._others]

    @property
    def are_uncounted(self) -> bool:
        """Whether any rejected client or self-check is connected."""
        return bool(self._rejected or self._others)

    def refusal(self, host: str | None, connections: int, limits: Limits) -> tuple[str, str] | None:
        """Return the statistics' name and the error text if another client from `host` is one too many, else None."""
        if connections >= limits.connections:
            return "limit", "too many connections"
        if host and 0 < limits.connections_per_address <= self._per_host[_address(host)]:
            return "address", "too many connections from your address"
        return None

    def admit(self, host: str | None) -> None:
        """Count a served client of this address."""
        self._per_host[_address(host)] += 1

    def release(self, host: str | None) -> None:
        """Undo `admit` for a served client that has closed."""
        address = _address(host)
        self._per_host[address] -= 1
        if not self._per_host[address]:
            del self._per_host[address]

    def reject(self, connection: Connection, reason: str, words: str, limits: Limits) -> None:
        """Send a client its error line and let it linger; call `forget` when it is closed."""
        self._stats.rejected[reason] += 1
        if len(self._rejected) >= self._room(limits) - 1:  # this one has its descriptor already
            next(iter(self._rejected)).make_room()
        self._rejected[connection] = None
        connection.finish(reason, words)
        log.debug("connection rejected", peer=connection.peer, reason=reason)

    def keep(self, connection: Connection) -> None:
        """Keep a connection that is not counted: a self-check, or a client that the predecessor rejected."""
        self._others.add(connection)

    def forget(self, connection: Connection) -> None:
        """Remove a closed connection that was rejected or kept."""
        self._rejected.pop(connection, None)
        self._others.discard(connection)

    def _room(self, limits: Limits) -> int:
        left = self._open_files - RESERVED_FILES // 2 - self.listeners - limits.connections
        return min(max(left, LEAST_LINGERING), MOST_LINGERING)

    def tell(self, connections: int) -> None:
        """Log how many clients were rejected since the last such line, at most once per `TELL_S`."""
        now = time.monotonic()
        if self._stats.rejected != self._told and now - self._told_at >= TELL_S:
            counts = {reason: count - self._told[reason] for reason, count in self._stats.rejected.items()}
            self._told, self._told_at = dict(self._stats.rejected), now
            log.warning("connections rejected", connections=connections, **counts)

    def starved(self, error: OSError) -> None:
        """Log that accepting is paused for lack of descriptors or memory; clients wait in the backlog."""
        advice = "raise the limit of open files, or lower limits.connections"
        log.warning("accepting paused", error=error.strerror, advice=advice)


def _address(host: str | None) -> str | None:
    """Normalize an address for counting: an IPv4 client of a dual-stack listener counts under its IPv4 address."""
    return host.removeprefix(_MAPPED) if host and host.startswith(_MAPPED) and "." in host else host
