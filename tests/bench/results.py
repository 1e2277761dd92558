"""What a run has found: samples of each workload and server, round by round, and what they come to."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.bench.harness import Figures


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the least and the most of what it is the median of."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(slots=True)
class Results:
    """All of one run."""

    figures: dict[tuple[str, str], list[Figures]] = field(default_factory=lambda: defaultdict(list))
    """By workload and server, in the order of the rounds."""
    idle: dict[str, int] = field(default_factory=dict)
    """Bytes of resident memory with the idle connections, by server."""
    empty: dict[str, int] = field(default_factory=dict)
    """The same before they came."""
    first_reply_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By server."""

    def spread(self, workload: str, server: str, of: Callable[[Figures], float]) -> Spread | None:
        """Of one figure, over the rounds; None where the server didn't take part."""
        found = self.figures.get((workload, server))
        return Spread.of([of(each) for each in found]) if found else None

    def ratio(self, workload: str, server: str, other: str) -> float | None:
        """CPU time of one server a line to that of another: the median of the rounds, for machines drift."""
        pairs = zip(self.figures.get((workload, server), ()), self.figures.get((workload, other), ()), strict=False)
        ratios = [one.cpu_us / two.cpu_us for one, two in pairs]
        return statistics.median(ratios) if ratios else None
