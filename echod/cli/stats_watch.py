"""`echod stats --watch`: request and show the statistics every second, also across restarts of the daemon."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from echod.cli.stats_rates import Seen
from echod.cli.stats_table import Cell, Line, Meaning, table
from echod.client.admin import UnansweredError

INTERVAL_S = 1.0


class Page(Protocol):
    """Shows successive statistics."""

    def draw(self, stats: Mapping[str, Any]) -> None:
        """Show the statistics."""

    def miss(self, why: str) -> None:
        """Show why there are no statistics at the moment."""

    def wait_until(self, due: float) -> None:
        """Wait until that time (time.monotonic)."""


def follow(first: Mapping[str, Any], ask: Callable[[], Mapping[str, Any]], page: Page) -> None:
    """Show `first`, then call `ask` and show the result every second, until KeyboardInterrupt."""
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
    """An output for tables: a terminal, or plain text."""

    is_overwritten: bool

    def draw(self, lines: Sequence[Line]) -> None:
        """Show the lines."""

    def wait_until(self, due: float) -> None:
        """Wait until that time (time.monotonic)."""


class Tables:
    """Draws a table for each snapshot, with rates since the one before."""

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
            self._lines.insert(1, (Cell(f"restarted {times} since the watch began", Meaning.WARNING),))
        self._sheet.draw(self._lines)

    def miss(self, why: str) -> None:
        """Show the reason; if the sheet is overwritten, above the last table."""
        self._sheet.draw([(Cell(why, Meaning.BAD),), *(self._lines if self._sheet.is_overwritten else ())])


class JsonLines:
    """Writes each snapshot as a line of JSON, and passes the first error of each outage to `complain`."""

    def __init__(self, write: Callable[[str], None], complain: Callable[[str], None]) -> None:
        self._write = write
        self._complain = complain
        self._is_missing = False

    def draw(self, stats: Mapping[str, Any]) -> None:
        """Write the statistics as a line of JSON."""
        self._write(json.dumps(stats))
        self._is_missing = False

    def miss(self, why: str) -> None:
        """Report the reason once per outage."""
        if not self._is_missing:
            self._complain(why)
        self._is_missing = True

    def wait_until(self, due: float) -> None:
        """Wait until that time (time.monotonic)."""
        time.sleep(max(due - time.monotonic(), 0.0))
