"""How a client gets on: since when it has been quiet, in the middle of a line, or taking none of its replies.

Owns what the last look saw. Its rule: looks are compared, not events timed, so a span it tells is never too long. It
is told the time and the figures; connections, sockets and the configuration are not known here.
"""

from collections.abc import Mapping


class Activity:
    """What one client's last look saw, and since when it has been so; times in seconds of the owner's clock."""

    __slots__ = ("_bytes_in", "_lines", "_taken", "line_since", "owed", "quiet_since", "taken_since")

    def __init__(self, now: float) -> None:
        self.quiet_since = self.taken_since = now
        self.line_since: float | None = None
        self.owed = 0
        self._bytes_in = self._lines = self._taken = 0

    def past(self) -> dict[str, float | None]:
        """What it has seen, for one that goes on with the same client by the same clock: see `resume`."""
        return {name.removeprefix("_"): getattr(self, name) for name in self.__slots__}

    def resume(self, past: Mapping[str, float | None]) -> None:
        """Go on from what another has seen."""
        for name in self.__slots__:
            setattr(self, name, past.get(name.removeprefix("_"), getattr(self, name)))

    def is_untaken(self, bytes_out: int) -> bool:
        """Whether replies were written of which the last look didn't see that they were taken."""
        return bytes_out != self._taken

    def measure(self, now: float, taken: int, owed: int) -> None:
        """See how many bytes of replies the client has taken in all, and how many it is owed still."""
        if taken != self._taken or not self.owed:
            self._taken = taken
            self.taken_since = now
        self.owed = owed

    def look(self, now: float, bytes_in: int, lines: int, *, is_in_line: bool, is_unread: bool) -> None:
        """See what has come; to be called after `measure`. `is_unread`: we don't read from the client at present."""
        if not is_in_line:
            self.line_since = None
        elif self.line_since is None or lines != self._lines or is_unread:
            self.line_since = now
        if is_in_line or self.owed or bytes_in != self._bytes_in:
            self.quiet_since = now
        self._bytes_in = bytes_in
        self._lines = lines
