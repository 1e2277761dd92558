"""`echod stats --watch`: ask again each second and show it, through restarts of the daemon too."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from echod.cli.stats_rates import Seen
from echod.cli.stats_table import Cell, Line, Meaning, table
from echod.client.admin import UnansweredError

INTERVAL_S = 1.0


class Page(Protocol):
    """Where it is shown."""

    def draw(self, stats: Mapping[str, Any]) -> None:
        """Show the statistics."""

    def miss(self, why: str) -> None:
        """Show that nobody answers at present."""

    def wait_until(self, due: float) -> None:
        """Let time go by until then, by the monotonic clock."""


def follow(first: Mapping[str, Any], ask: Callable[[], Mapping[str, Any]], page: Page) -> None:
    """Show `first`, then ask and show until KeyboardInterrupt."""
    page.draw(first)
    due = time.monotonic()
    while True:
        due = max(due + INTERVAL_S, time.monotonic())
        page.wait_until(due)
        try:
            stats = ask()
        except UnansweredError as error:
            page.miss(f"asking again: {error}")
        else:
            page.draw(stats)


class Sheet(Protocol):
    """What lines are drawn on."""

    is_overwritten: bool

    def draw(self, lines: Sequence[Line]) -> None:
        """Show the lines."""

    def wait_until(self, due: float) -> None:
        """Let time go by until then, by the monotonic clock."""


class Tables:
    """A table each time, with what changed since the last one."""

    def __init__(self, sheet: Sheet) -> None:
        self.wait_until = sheet.wait_until
        self._sheet = sheet
        self._seen = Seen()
        self._lines: list[Line] = []

    def draw(self, stats: Mapping[str, Any]) -> None:
        """Show the statistics."""
        rates = self._seen.next(stats)
        self._lines = table(stats, rates)
        if rates.restarts:
            times = "once" if rates.restarts == 1 else f"{rates.restarts} times"
            self._lines.insert(1, (Cell(f"restarted {times} while you watch", Meaning.WARNING),))
        self._sheet.draw(self._lines)

    def miss(self, why: str) -> None:
        """Say so, above the last table if that would be overwritten."""
        self._sheet.draw([(Cell(why, Meaning.BAD),), *(self._lines if self._sheet.is_overwritten else ())])


class JsonLines:
    """The statistics as they come, a line each; what is wrong goes elsewhere, once for each time."""

    def __init__(self, write: Callable[[str], None], complain: Callable[[str], None]) -> None:
        self._write = write
        self._complain = complain
        self._is_missing = False

    def draw(self, stats: Mapping[str, Any]) -> None:
        """Write the statistics."""
        self._write(json.dumps(stats))
        self._is_missing = False

    def miss(self, why: str) -> None:
        """Complain that nobody answers."""
        if not self._is_missing:
            self._complain(why)
        self._is_missing = True

    def wait_until(self, due: float) -> None:
        """Let time go by until then, by the monotonic clock."""
        time.sleep(max(due - time.monotonic(), 0.0))
