"""The memory that all clients together make us hold: partial lines, lines that wait their turn, and pending replies.

Owns the sum and the set of clients that are not read from because of it. While the sum is over its limit, a client is
read from only if it holds next to nothing itself, or if its partial line has ended and the sum is not far over. So
those who hold much wait, and nobody else. They are let go on when the sum has fallen, or end by their own timeouts.
"""

from collections.abc import Callable
from typing import Protocol

RESUME_SHARE = 0.9
"""Clients that wait are read from again when the sum has fallen below this share of the limit."""

OVERDRAFT_SHARE = 1.1
"""Up to this share of the limit partial lines may still be read to their ends, because only that gives memory back."""

SPARE_BYTES = 1024
"""While the limit is exceeded, nothing but the end of its line is read from a client that holds more than this, and no
more than this at once from any other."""

UNREAD_BYTES = 4096
"""Nor is one from whose kernel more than this is unacknowledged: it may not be reading its replies."""


class Waiting(Protocol):
    """A client that is not read from for the sake of memory."""

    def on_memory(self) -> None:
        """See whether to read again."""


class Memory:
    """Counts the bytes that clients hold against a limit; `on_full` is called when the limit is exceeded."""

    def __init__(self, on_full: Callable[[], None]) -> None:
        self.held_bytes = 0
        self.limit_bytes = 0
        self.is_full = False
        self._waiting: set[Waiting] = set()
        self._on_full = on_full

    @property
    def waiting(self) -> int:
        """How many clients are not read from at present."""
        return len(self._waiting)

    @property
    def is_overdrawn(self) -> bool:
        """Whether the limit is exceeded by so much that partial lines are not even read to their ends."""
        return self.held_bytes > self.limit_bytes * OVERDRAFT_SHARE

    def set_limit(self, limit_bytes: int) -> None:
        """Change the limit; it holds from now on."""
        self.limit_bytes = limit_bytes
        self.change(0)

    def change(self, more_bytes: int) -> None:
        """Count that a client holds so much more than before, or less if negative."""
        self.held_bytes += more_bytes
        if not self.is_full and self.held_bytes > self.limit_bytes:
            self.is_full = True
            self._on_full()
        elif self.is_full and self.held_bytes <= self.limit_bytes * RESUME_SHARE:
            self.is_full = False
            self.retry()

    def wait(self, client: Waiting) -> None:
        """Call `on_memory` of the client when there may be room again."""
        self._waiting.add(client)

    def forget(self, client: Waiting) -> None:
        """Call it no more: the client is gone."""
        self._waiting.discard(client)

    def retry(self) -> None:
        """Let every client that waits see whether it may be read from; to be called now and then."""
        waiting, self._waiting = self._waiting, set()
        for client in waiting:
            client.on_memory()
