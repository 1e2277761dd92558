"""Sees from outside whether the event loop turns, and says where it is stuck when it doesn't.

The loop beats, a thread listens. What a stuck process does about it is not decided here.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import format_stack

import structlog

BEAT_S = 0.25
"""How often the loop is to beat."""

STUCK_S = 1.0
"""A loop that has not beaten for so long is stuck."""

log = structlog.get_logger()


class StallDetector:
    """The heartbeat of one event loop and the thread that listens to it; made in the loop's own thread."""

    def __init__(self) -> None:
        self._beaten_at = time.monotonic()
        self._watched = threading.get_ident()
        self._ended = threading.Event()

    def beat(self) -> None:
        """Tell that the loop turns; from the loop, every BEAT_S."""
        self._beaten_at = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen as long as the context is open."""
        thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(BEAT_S)

    def _listen(self) -> None:
        stuck_since: float | None = None
        asleep_at = time.monotonic()
        while not self._ended.wait(BEAT_S):
            now = time.monotonic()
            # Who has overslept was stopped together with the loop, or had no processor: that proves nothing.
            is_judge = now - asleep_at < 2 * BEAT_S
            asleep_at = now
            silent_s = now - self._beaten_at
            if stuck_since is None and is_judge and silent_s > STUCK_S:
                stuck_since = self._beaten_at
                log.error("loop stuck", seconds=round(silent_s, 1), stack=self._stack())
            elif stuck_since is not None and silent_s < STUCK_S:
                log.warning("loop turns again", seconds=round(self._beaten_at - stuck_since, 1))
                stuck_since = None

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._watched)  # noqa: SLF001 (documented, "for specialized purposes")
        return "".join(format_stack(frame)) if frame else "unknown"
