"""Goals for echod's cost relative to other servers in the same run."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.peers import COMPILED, PYTHON
from tests.bench.results import Results
from tests.bench.workloads import IDLE, RATES, WORKLOADS

_MB = 1e6


@dataclass(frozen=True, slots=True)
class Goal:
    """An upper bound on a cost, as a multiple of another server's cost if one is named."""

    subject: str
    at_most: float
    other: str = ""
    unit: str = ""

    def __str__(self) -> str:
        return f"≤ {self.at_most:g} × {self.other}" if self.other else f"≤ {self.at_most:g} {self.unit}"


@dataclass(frozen=True, slots=True)
class Judged:
    """A goal and the measured value; None if a server was not measured."""

    goal: Goal
    found: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None if it was not measured."""
        return None if self.found is None else self.found <= self.goal.at_most


_PING_PONG = ((1.15, "C"), (0.85, "Go"), (1.0, "memcached"))

OF_COMPILED: dict[str, tuple[tuple[float, str], ...]] = {
    "50": _PING_PONG,
    "500": _PING_PONG,
    "50x16": ((1.3, "C"), (1.0, "memcached")),
    "8x64x1K": ((1.5, "C"),),
    "churn": ((2.0, "C"), (0.75, "Go")),
}
"""CPU time for a line with the compiled fast path, by workload."""

OF_PYTHON: dict[str, tuple[tuple[float, str], ...]] = {
    "50": ((1.1, "Go"),),
    "500": ((1.1, "Go"),),
    "50x16": ((1.1, "Go"),),
    "8x64x1K": ((1.0, "Go"),),
    "churn": ((1.0, "Go"),),
}
"""CPU time for a line in pure Python, by workload."""

IDLE_MB, IDLE_PERCENT, START = 42.0, 1.0, 1.35
"""For both paths: memory and CPU time with idle connections, and start as a multiple of the bare protocol's."""


def judged(results: Results) -> Iterator[tuple[str, list[Judged]]]:
    """Yield each group of goals with the measured values."""
    about = {workload.name: workload.about for workload in (*WORKLOADS, *RATES)}
    for name in OF_COMPILED:
        yield (
            about[name],
            [
                Judged(Goal(subject, at_most, other), results.ratio(name, subject, other))
                for subject, goals in ((COMPILED, OF_COMPILED), (PYTHON, OF_PYTHON))
                for at_most, other in goals[name]
            ],
        )
    idle = []
    for subject in (COMPILED, PYTHON):
        found = results.idle.get(subject)
        idle.append(Judged(Goal(subject, IDLE_MB, unit="MB"), None if found is None else found.rss_bytes / _MB))
        idle.append(Judged(Goal(subject, IDLE_PERCENT, unit="% CPU"), None if found is None else found.share * 100))
    yield IDLE.about, idle
    yield (
        "start to first reply",
        [Judged(Goal(subject, START, "bare"), results.start_ratio(subject, "bare")) for subject in (COMPILED, PYTHON)],
    )
