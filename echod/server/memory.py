"""The limit of the memory held for all clients together: partial lines, unanswered lines, and pending replies.

Owns the sum, and the set of clients whose reading is paused because of it. While the sum exceeds its limit, echod reads
from a client only if that client holds very little, or if the rest of its partial line has arrived and the excess is
small. So only clients that hold much have to wait. They continue when the sum has fallen, or end by their timeouts.
"""

from collections.abc import Callable
from typing import Protocol

RESUME_SHARE = 0.9
"""Paused clients continue when the sum has fallen to this share of the limit."""

OVERDRAFT_SHARE = 1.1
"""Up to this share of the limit, partial lines may still be completed: answering them is what releases their memory."""

SPARE_BYTES = 1024
"""While the limit is exceeded, a client that holds more than this may only complete its partial line, and one read from
any other client brings at most this much."""

UNREAD_BYTES = 4096
"""While the limit is exceeded, nothing is read from a client with more unacknowledged bytes than this: it may not be
reading its replies."""


class Waiting(Protocol):
    """A client whose reading is paused because the memory limit is exceeded."""

    def retry_read(self) -> None:
        """Try to read again."""


class MemoryLimit:
    """Counts the bytes held for clients against a limit; calls `on_exceeded` when they exceed it."""

    def __init__(self, on_exceeded: Callable[[], None]) -> None:
        self.held_bytes = 0
        self.limit_bytes = 0
        self.is_exceeded = False
        """Whether the limit was exceeded and the sum has not fallen to `RESUME_SHARE` of it since."""
        self._waiting: set[Waiting] = set()
        self._on_exceeded = on_exceeded

    @property
    def waiting(self) -> int:
        """How many clients are paused at present."""
        return len(self._waiting)

    @property
    def is_overdrawn(self) -> bool:
        """Whether the limit is exceeded by so much that not even partial lines may be completed."""
        return self.held_bytes > self.limit_bytes * OVERDRAFT_SHARE

    def set_limit(self, limit_bytes: int) -> None:
        """Change the limit; it applies immediately."""
        self.limit_bytes = limit_bytes
        self.add(0)

    def add(self, more_bytes: int) -> None:
        """Add to the bytes held, or subtract if `more_bytes` is negative."""
        self.held_bytes += more_bytes
        if not self.is_exceeded and self.held_bytes > self.limit_bytes:
            self.is_exceeded = True
            self._on_exceeded()
        elif self.is_exceeded and self.held_bytes <= self.limit_bytes * RESUME_SHARE:
            self.is_exceeded = False
            self.retry()

    def wait(self, client: Waiting) -> None:
        """Call the client's `retry_read` once, when memory may be available again."""
        self._waiting.add(client)

    def forget(self, client: Waiting) -> None:
        """Remove a closed client from those that wait."""
        self._waiting.discard(client)

    def retry(self) -> None:
        """Let every paused client try to read again; the owner calls this periodically."""
        waiting, self._waiting = self._waiting, set()
        for client in waiting:
            client.retry_read()
