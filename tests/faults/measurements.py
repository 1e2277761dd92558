"""Measurements of a daemon under attack: its resources and the round trips of a bystander, before and during it."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.faults.bystander import RoundTrips, bystanding
from tests.support.daemon import DEADLINE_S, Daemon, Event, ask, connect, settled

BEFORE_S = 1.5
"""Time for which the bystander is measured for comparison, in seconds."""

SAMPLE_S = 0.05

STARVED = 0.1
"""Above this share of time waiting for a CPU, slowness is attributed to the machine."""

Figures = dict[str, object]


@dataclass(frozen=True, slots=True)
class Usage:
    """The resources that a process uses."""

    cpu_s: float
    starved_s: float
    """Time that the main thread waited for a CPU, in seconds (sched-stats.rst)."""
    rss_bytes: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(") ")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        rss_bytes = int(fields[21]) * os.sysconf("SC_PAGESIZE")
        with open(f"/proc/{pid}/schedstat") as schedstat:
            starved_s = int(schedstat.read().split()[1]) / 1e9
        return cls(ticks / os.sysconf("SC_CLK_TCK"), starved_s, rss_bytes, len(os.listdir(f"/proc/{pid}/fd")))


@dataclass(slots=True)
class Scene:
    """The figures of an attack, complete after the `with`."""

    name: str
    before: RoundTrips
    usage_before: Usage
    during: RoundTrips | None = None
    duration_s: float = 0.0
    cpu_share: float = 0.0
    """The share of one core that the daemon used."""
    starved_share: float = 0.0
    """The share of time in which the daemon waited for a CPU."""
    peak_rss_bytes: int = 0
    peak_descriptors: int = 0
    notes: Figures = field(default_factory=dict)
    """Further columns of the report."""

    @property
    def grown_bytes(self) -> int:
        """Growth of the resident memory up to its peak, in bytes."""
        return self.peak_rss_bytes - self.usage_before.rss_bytes

    def assert_bystander_unaffected(self, *, slack_ms: float = 25.0) -> None:
        """Assert that the median round trip is as before, and the 99th percentile at most `slack_ms` longer.

        As before allows for a time slice or two of a neighbour, 4 ms each. If the machine hardly let the daemon run,
        nothing is asserted.
        """
        assert self.during
        if self.starved_share > STARVED:
            return
        assert self.during.p50_ms <= 5 * self.before.p50_ms + max(8, slack_ms / 25), (self.before, self.during)
        assert self.during.p99_ms <= 5 * self.before.p99_ms + slack_ms, (self.before, self.during)

    def row(self) -> Figures:
        """Return the figures as a row of the report."""
        assert self.during
        return {
            "fault": self.name,
            "p99 before ms": self.before.p99_ms,
            "p99 during ms": self.during.p99_ms,
            "max during ms": self.during.max_ms,
            "memory MB": f"{self.usage_before.rss_bytes / 1e6:.1f} -> {self.peak_rss_bytes / 1e6:.1f}",
            "descriptors": f"{self.usage_before.descriptors} -> {self.peak_descriptors}",
            "CPU %": round(100 * self.cpu_share, 1),
            "starved %": round(100 * self.starved_share, 1),
            "seconds": round(self.duration_s, 1),
            **self.notes,
        }


@contextlib.contextmanager
def scene(name: str, echod: Daemon) -> Iterator[Scene]:
    """Measure a daemon and a bystander at rest, then during the body of the `with`."""
    with bystanding(echod.port) as bystander:
        time.sleep(BEFORE_S)  # the measured period
        it = Scene(name, bystander.figures(), Usage.of(echod.pid))
        is_over = threading.Event()
        sampler = threading.Thread(target=_sample, args=(it, echod.pid, is_over))
        sampler.start()
        began = time.monotonic()
        try:
            yield it
        finally:
            is_over.set()
            sampler.join()
        it.during = bystander.figures()
        it.duration_s = time.monotonic() - began
        usage = Usage.of(echod.pid)
        it.cpu_share = (usage.cpu_s - it.usage_before.cpu_s) / it.duration_s
        it.starved_share = (usage.starved_s - it.usage_before.starved_s) / it.duration_s


def acquainted(echod: Daemon) -> Event:
    """Return the statistics after a first client, for which the loop opens a descriptor that it keeps."""
    with connect(echod.port) as client:
        assert ask(client, b"hello\n") == b"HELLO\n"
    return settled(echod, 0)


def closed_since(before: Event, after: Event) -> dict[str, int]:
    """Return the number of clients closed in between, by reason."""
    old, new = before["connections"]["closed"], after["connections"]["closed"]
    return {reason: count - old[reason] for reason, count in new.items() if count > old[reason]}


def left_alone(echod: Daemon, before: Event) -> Event:
    """Return the statistics once no client is connected; assert that no descriptor has leaked and all are counted."""
    end = time.monotonic() + DEADLINE_S
    while (stats := echod.stats())["connections"]["open"] or stats["open_files"] > before["open_files"]:
        assert time.monotonic() < end, f"{stats}, and before {before}"
    assert stats["open_files"] == before["open_files"]
    assert stats["held_bytes"] == 0
    for each in echod.events_named("stats"):
        assert_adds_up(each)
    return stats


def assert_adds_up(stats: Event) -> None:
    """Assert that every accepted client is either open or closed for one reason."""
    connections = stats["connections"]
    assert connections["accepted"] == connections["open"] + sum(connections["closed"].values()), stats


def _sample(it: Scene, pid: int, is_over: threading.Event) -> None:
    while True:
        usage = Usage.of(pid)
        it.peak_rss_bytes = max(it.peak_rss_bytes, usage.rss_bytes)
        it.peak_descriptors = max(it.peak_descriptors, usage.descriptors)
        if is_over.wait(SAMPLE_S):
            return
