"""How fast the statistics grow: two snapshots, and what is remembered of all that were seen."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

COUNTERS = ("connections.accepted", "connections.closed.", "connections.rejected.", "lines", "bytes_in", "bytes_out")
"""What is told as so many a second; with a dot at its end all that is below."""

LARGEST = 1e18


class Rates(NamedTuple):
    """What the last seconds came to."""

    per_second: Mapping[str, float]
    peak_open: float
    restarts: int


class Seen:
    """The snapshots of one daemon, as they come."""

    def __init__(self) -> None:
        self._last: Mapping[str, Any] = {}
        self._peak_open = 0.0
        self._restarts = 0

    def next(self, stats: Mapping[str, Any]) -> Rates:
        """See one more; a daemon that was started meanwhile has no rates yet."""
        figures = flat(stats)
        last, self._last = self._last, figures
        seconds = _grown(last, figures, "uptime_s")
        is_same = last.get("pid") == figures.get("pid") and seconds > 0
        if last and not is_same:
            self._restarts += 1
            self._peak_open = 0.0
        self._peak_open = max(self._peak_open, number(figures.get("connections.open")) or 0.0)
        names = [name for name in figures if name.startswith(COUNTERS)] if is_same else []
        per_second = {name: max(_grown(last, figures, name), 0.0) / seconds for name in names}
        return Rates(per_second, self._peak_open, self._restarts)


def flat(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Each value by its name; a name inside another one is joined to it by a dot."""
    return dict(_flat(stats, ""))


def _flat(stats: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in stats.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def number(value: Any) -> float | None:
    """The value if it is a number that can be one of ours."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < LARGEST else None


def _grown(last: Mapping[str, Any], figures: Mapping[str, Any], name: str) -> float:
    before, now = number(last.get(name)), number(figures.get(name))
    return now - before if before is not None and now is not None else 0.0
