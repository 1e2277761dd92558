"""Detects from a thread that the event loop is stuck, and logs where.

What happens to a stuck process is decided elsewhere: by the watchdog, or by a forced exit during a stop.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import format_stack

import structlog

BEAT_S = 0.25
"""How often the loop has to call `beat`."""

STUCK_S = 1.0
"""A loop that has not called `beat` for this long is stuck."""

log = structlog.get_logger()


class StallDetector:
    """Watches one event loop; made in the loop's own thread."""

    def __init__(self) -> None:
        self._beat_at = time.monotonic()
        self._loop_thread = threading.get_ident()
        self._ended = threading.Event()

    def beat(self) -> None:
        """Show that the loop runs; to be called from the loop, every BEAT_S."""
        self._beat_at = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the loop while the context is open."""
        thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(BEAT_S)

    def _watch(self) -> None:
        stuck_since: float | None = None
        slept_at = time.monotonic()
        while not self._ended.wait(BEAT_S):
            now = time.monotonic()
            # If this thread overslept, the whole process was stopped or had no processor, which proves nothing.
            is_on_time = now - slept_at < 2 * BEAT_S
            slept_at = now
            silent_s = now - self._beat_at
            if stuck_since is None and is_on_time and silent_s > STUCK_S:
                stuck_since = self._beat_at
                log.error("loop stuck", seconds=round(silent_s, 1), stack=self._stack())
            elif stuck_since is not None and silent_s < STUCK_S:
                log.warning("loop turns again", seconds=round(self._beat_at - stuck_since, 1))
                stuck_since = None

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 (documented, "for specialized purposes")
        return "".join(format_stack(frame)) if frame else "unknown"
