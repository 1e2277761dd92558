"""Who is admitted: the limits of open connections, and what becomes of the clients beyond them.

Owns the clients that are being rejected, our own probes, and the count of each address. Clients that are served belong
to the server.
"""

import time
from collections import Counter

import structlog

from echod.config import RESERVED_FILES, Limits
from echod.connection import Connection
from echod.stats import Stats

LEAST_LINGERING = RESERVED_FILES // 2
MOST_LINGERING = 1024
"""Rejected clients that may linger at once to read their error line: as many as descriptors are left beside the open
connections, within these bounds. The oldest one makes room for the next, so a rejected client delays nobody."""

TELL_S = 10.0
"""At most this often a line says how many clients were rejected: a flood is no flood of the log."""

_MAPPED = "::ffff:"

log = structlog.get_logger()


class Admission:
    """Decides about each client that comes, and sees the ones that are rejected to their end."""

    def __init__(self, stats: Stats, open_files: int) -> None:
        """`open_files` is how many descriptors the process may have."""
        self._rejected: dict[Connection, None] = {}  # a set that keeps its order: the oldest first
        self._probes: set[Connection] = set()
        self._stats = stats
        self._open_files = open_files
        self._per_host: Counter[str | None] = Counter()
        self._told = dict(stats.rejected)
        self._told_at = float("-inf")

    @property
    def uncounted(self) -> list[Connection]:
        """Those that are being rejected, and our own probes."""
        return [*self._rejected, *self._probes]

    @property
    def are_uncounted(self) -> bool:
        """Whether there are any."""
        return bool(self._rejected or self._probes)

    def refusal(self, host: str | None, connections: int, limits: Limits) -> tuple[str, str] | None:
        """Why one client more from there is too many: under which name it is counted, and what it is told."""
        if connections >= limits.connections:
            return "limit", "too many connections"
        if host and 0 < limits.connections_per_address <= self._per_host[_address(host)]:
            return "address", "too many connections from your address"
        return None

    def admit(self, host: str | None) -> None:
        """Count a client that is served."""
        self._per_host[_address(host)] += 1

    def release(self, host: str | None) -> None:
        """Count it no more."""
        address = _address(host)
        self._per_host[address] -= 1
        if not self._per_host[address]:
            del self._per_host[address]

    def reject(self, connection: Connection, reason: str, words: str, limits: Limits) -> None:
        """Tell a client that it is too many, and let it linger; its owner has to `forget` it when it is closed."""
        self._stats.rejected[reason] += 1
        if len(self._rejected) >= self._room(limits):
            next(iter(self._rejected)).close()
        self._rejected[connection] = None
        connection.finish(reason, words)
        log.debug("connection rejected", peer=connection.peer, reason=reason)

    def keep(self, connection: Connection) -> None:
        """Keep one that is in no count: our own probe, or one that the predecessor has rejected."""
        self._probes.add(connection)

    def forget(self, connection: Connection) -> None:
        """Forget one that is in no count: it is closed."""
        self._rejected.pop(connection, None)
        self._probes.discard(connection)

    def _room(self, limits: Limits) -> int:
        left = self._open_files - RESERVED_FILES // 2 - limits.connections
        return min(max(left, LEAST_LINGERING), MOST_LINGERING)

    def tell(self, connections: int) -> None:
        """Log one line for all clients rejected since the last one, if it is time."""
        now = time.monotonic()
        if self._stats.rejected != self._told and now - self._told_at >= TELL_S:
            counts = {reason: count - self._told[reason] for reason, count in self._stats.rejected.items()}
            self._told, self._told_at = dict(self._stats.rejected), now
            log.warning("connections rejected", connections=connections, **counts)

    def starved(self, error: OSError) -> None:
        """Log that clients wait in the backlog for want of descriptors or memory."""
        advice = "raise the limit of open files, or lower limits.connections"
        log.warning("accepting paused", error=error.strerror, advice=advice)


def _address(host: str | None) -> str | None:
    """The address that a client is counted under: an IPv4 client of a dual-stack listener by its IPv4 address."""
    return host.removeprefix(_MAPPED) if host and host.startswith(_MAPPED) and "." in host else host
