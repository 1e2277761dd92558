"""A client's activity: since when it has been quiet, in the middle of a line, or accepting none of its replies.

The state is sampled periodically, and spans are measured between samples, so a span is never reported too long. This
module gets the time and all figures as arguments; it knows neither connections nor the configuration.
"""

from collections.abc import Mapping


class Activity:
    """What the last sample of one client saw, and since when; times are in seconds of the owner's clock."""

    __slots__ = ("_accepted_bytes", "_bytes_in", "_lines", "accepted_at", "line_since", "owed_bytes", "quiet_since")

    def __init__(self, now: float) -> None:
        self.quiet_since = now
        """Since when there has been no input, no partial line and no reply that is owed."""
        self.accepted_at = now
        """When the client last accepted bytes of its replies, or was owed none."""
        self.line_since: float | None = None
        """Since when the partial line has been incomplete; None if there is none."""
        self.owed_bytes = 0
        self._bytes_in = self._lines = self._accepted_bytes = 0

    def save(self) -> dict[str, float | None]:
        """Return the state for `restore` in another process with the same clock."""
        return {name.removeprefix("_"): getattr(self, name) for name in self.__slots__}

    def restore(self, saved: Mapping[str, float | None]) -> None:
        """Continue from what `save` returned; keys that are missing keep their initial values."""
        for name in self.__slots__:
            setattr(self, name, saved.get(name.removeprefix("_"), getattr(self, name)))

    def has_new_replies(self, bytes_out: int) -> bool:
        """Whether replies were written that the last sample did not see accepted."""
        return bytes_out != self._accepted_bytes

    def measure(self, now: float, *, accepted_bytes: int, owed_bytes: int) -> None:
        """Record how many bytes of replies the client has accepted in total, and how many it is still owed."""
        if accepted_bytes != self._accepted_bytes or not self.owed_bytes:
            self._accepted_bytes = accepted_bytes
            self.accepted_at = now
        self.owed_bytes = owed_bytes

    def sample(self, now: float, bytes_in: int, lines: int, *, is_in_line: bool, is_read_paused: bool) -> None:
        """Record what has arrived; call it after `measure`.

        While reading is paused, a partial line does not age: its rest may have arrived, and we do not read it.
        """
        if not is_in_line:
            self.line_since = None
        elif self.line_since is None or lines != self._lines or is_read_paused:
            self.line_since = now
        if is_in_line or self.owed_bytes or bytes_in != self._bytes_in:
            self.quiet_since = now
        self._bytes_in = bytes_in
        self._lines = lines
