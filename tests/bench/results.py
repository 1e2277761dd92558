"""The results of a run: samples of each workload and server by round, and their summary."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.bench.harness import Figures, Idle


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, minimum and maximum of samples."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(slots=True)
class Results:
    """All samples of a run, by the names of servers and workloads."""

    figures: dict[tuple[str, str], list[Figures]] = field(default_factory=lambda: defaultdict(list))
    """By workload and server, in the order of the rounds."""
    idle: dict[str, Idle] = field(default_factory=dict)
    """Figures with idle connections, by server."""
    empty_bytes: dict[str, int] = field(default_factory=dict)
    """Resident memory before any client came, by server."""
    first_reply_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By server, in the order of the rounds."""

    def spread(self, workload: str, server: str, of: Callable[[Figures], float]) -> Spread | None:
        """Return the spread of one figure over the rounds, None where the server didn't take part."""
        found = self.figures.get((workload, server))
        return Spread.of([of(each) for each in found]) if found else None

    def ratio(self, workload: str, server: str, other: str) -> float | None:
        """Return how many times another server's CPU time for a line this one needs.

        It is the median of the ratios within each round, because a shared machine drifts from round to round.
        """
        of_one = [each.cpu_us for each in self.figures.get((workload, server), ())]
        of_other = [each.cpu_us for each in self.figures.get((workload, other), ())]
        return _ratio(of_one, of_other)

    def start_ratio(self, server: str, other: str) -> float | None:
        """Return how many times another server's time to its first reply this one needs, as `ratio` does."""
        return _ratio(self.first_reply_s.get(server, ()), self.first_reply_s.get(other, ()))


def _ratio(of_one: Sequence[float], of_other: Sequence[float]) -> float | None:
    ratios = [one / other for one, other in zip(of_one, of_other, strict=False)]
    return statistics.median(ratios) if ratios else None
