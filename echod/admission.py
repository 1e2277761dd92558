"""Who is let in: the limits of open connections, and what becomes of the clients beyond them.

Owns the clients that are being turned away, or are ourselves, and the count of each address. Those that are served
belong to the server.
"""

import time
from collections import Counter

import structlog

from echod.config import RESERVED_FILES, Limits
from echod.connection import Connection
from echod.stats import Stats

AT_ONCE = range(RESERVED_FILES // 2, 1024)
"""Clients that may be in the act of being told there are too many; the next ones wait for that in the backlog. As many
as the descriptors allow that are left beside the open connections."""

TELL_S = 10.0
"""At most this often a line says how many clients were turned away: a flood is no flood of the log."""

log = structlog.get_logger()


class Admission:
    """Decides about each client that comes, and sees the ones that are turned away to their end."""

    def __init__(self, stats: Stats, open_files: int) -> None:
        """`open_files` is how many descriptors the process may have."""
        self.uncounted: set[Connection] = set()
        """Those that are being turned away, and our own."""
        self._stats = stats
        self._open_files = open_files
        self._per_host: Counter[str | None] = Counter()
        self._told = dict(stats.rejected)
        self._told_at = float("-inf")

    def refusal(self, host: str | None, connections: int, limits: Limits) -> tuple[str, str] | None:
        """Why one client more from there is too many: under which name it is counted, and what it is told."""
        if connections >= limits.connections:
            return "limit", "too many connections"
        if host and 0 < limits.connections_per_address <= self._per_host[host]:
            return "address", "too many connections from your address"
        return None

    def let_in(self, host: str | None) -> None:
        """Count a client that is served."""
        self._per_host[host] += 1

    def let_out(self, host: str | None) -> None:
        """Count it no more."""
        self._per_host[host] -= 1
        if not self._per_host[host]:
            del self._per_host[host]

    def turn_away(self, connection: Connection, reason: str, words: str) -> None:
        """Tell a client that it is too many; its `on_closed` has to `forget` it."""
        self._stats.rejected[reason] += 1
        self.uncounted.add(connection)
        connection.finish(reason, words)
        log.debug("connection rejected", peer=connection.peer, reason=reason)

    def forget(self, connection: Connection) -> None:
        """One that isn't counted is gone."""
        self.uncounted.discard(connection)

    def is_full(self, limits: Limits, listeners: int) -> bool:
        """Whether the next client can't even be told, for want of a descriptor."""
        left = self._open_files - RESERVED_FILES // 2 - listeners - limits.connections
        return len(self.uncounted) >= min(max(left, AT_ONCE.start), AT_ONCE.stop)

    def tell(self, connections: int) -> None:
        """Log one line for all clients turned away since the last one, if it is time."""
        now = time.monotonic()
        if self._stats.rejected != self._told and now - self._told_at >= TELL_S:
            counts = {reason: count - self._told[reason] for reason, count in self._stats.rejected.items()}
            self._told, self._told_at = dict(self._stats.rejected), now
            log.warning("connections rejected", connections=connections, **counts)

    def starved(self, error: OSError) -> None:
        """Log that clients wait in the backlog for want of descriptors or memory."""
        advice = "raise the limit of open files, or lower limits.connections"
        log.warning("accepting paused", error=error.strerror, advice=advice)
