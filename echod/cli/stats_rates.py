"""How fast the statistics grow: rates from two snapshots, and what `--watch` remembers of all earlier ones."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from echod.telemetry.stats import figures

LARGEST = 1e18
"""Numbers from this on are not shown as numbers: no statistic of echod comes near it."""


class Rates(NamedTuple):
    """What two successive snapshots show."""

    per_second: Mapping[str, float]
    peak_open: float
    restarts: int


class Seen:
    """Compares the successive snapshots of one daemon."""

    def __init__(self) -> None:
        self._last: Mapping[str, Any] = {}
        self._peak_open = 0.0
        self._restarts = 0

    def next(self, stats: Mapping[str, Any]) -> Rates:
        """Compare a snapshot with the one before; a daemon that was restarted in between has no rates yet."""
        values = flat(stats)
        last, self._last = self._last, values
        seconds = _grown(last, values, "uptime_s")
        is_same = last.get("pid") == values.get("pid") and seconds > 0
        if last and not is_same:
            self._restarts += 1
            self._peak_open = 0.0
        self._peak_open = max(self._peak_open, number(values.get("connections.open")) or 0.0)
        names = filter(_is_counter, values) if is_same else ()
        per_second = {name: max(_grown(last, values, name), 0.0) / seconds for name in names}
        return Rates(per_second, self._peak_open, self._restarts)


def flat(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Return each value by its flat name, such as `connections.closed.idle`."""
    return dict(_flat(stats, ""))


def _flat(stats: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in stats.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def number(value: Any) -> float | None:
    """Return the value if it is a number below `LARGEST`, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < LARGEST else None


def _is_counter(name: str) -> bool:
    """Whether the statistic of this flat name only grows; the metadata of a mapping is that of each of its keys."""
    figure = figures().get(name) or figures().get(name.rpartition(".")[0])
    return figure is not None and figure.kind == "counter"


def _grown(last: Mapping[str, Any], values: Mapping[str, Any], name: str) -> float:
    before, now = number(last.get(name)), number(values.get(name))
    return now - before if before is not None and now is not None else 0.0
