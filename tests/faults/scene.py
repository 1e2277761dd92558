"""A daemon under a fault: what it uses of the machine, and what a bystander sees, before and during."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.faults.bystander import RoundTrips, bystanding
from tests.support.daemon import DEADLINE_S, Daemon, Event, ask, connect, settled

BEFORE_S = 1.5
"""How long the bystander is watched for comparison."""

SAMPLE_S = 0.05

STARVED = 0.1
"""The share of time waiting for a CPU from which on a daemon's slowness isn't its own."""

Figures = dict[str, object]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process uses of the machine."""

    cpu_s: float
    starved_s: float
    """How long its main thread wanted a CPU and got none (sched-stats.rst)."""
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
    """The figures of a fault: filled while it lasts, complete after the `with`."""

    name: str
    before: RoundTrips
    usage_before: Usage
    during: RoundTrips | None = None
    duration_s: float = 0.0
    cpu_share: float = 0.0
    """Of one core, while it lasted."""
    starved_share: float = 0.0
    """Of that time, in which others had the CPU that the daemon wanted."""
    peak_rss_bytes: int = 0
    peak_descriptors: int = 0
    notes: Figures = field(default_factory=dict)
    """What else the table should show: what was counted, what clients saw."""

    @property
    def grown_bytes(self) -> int:
        """Resident memory at the peak, less what it was before."""
        return self.peak_rss_bytes - self.usage_before.rss_bytes

    def assert_bystander_unaffected(self, *, slack_ms: float = 25.0) -> None:
        """Half of the round trips as before, 99 of 100 within `slack_ms` more: two cores are shared with the attack.

        As before is give or take a time slice or two of a busy neighbour, 4 ms each. On a machine that hardly let the
        daemon run, round trips say nothing about it.
        """
        assert self.during
        if self.starved_share > STARVED:
            return
        assert self.during.p50_ms <= 5 * self.before.p50_ms + max(8, slack_ms / 25), (self.before, self.during)
        assert self.during.p99_ms <= 5 * self.before.p99_ms + slack_ms, (self.before, self.during)

    def row(self) -> Figures:
        """The figures as a row of the report."""
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
    """Watch a daemon and a bystander for a while, then while the body of the `with` does its worst."""
    with bystanding(echod.port) as bystander:
        time.sleep(BEFORE_S)  # the span that is measured
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
    """The statistics after a first client, for which the loop opens a descriptor of its own and keeps it."""
    with connect(echod.port) as client:
        assert ask(client, b"hello\n") == b"HELLO\n"
    return settled(echod, 0)


def closed_since(before: Event, after: Event) -> dict[str, int]:
    """How many clients were closed in between, for each reason that there was."""
    old, new = before["connections"]["closed"], after["connections"]["closed"]
    return {reason: count - old[reason] for reason, count in new.items() if count > old[reason]}


def left_alone(echod: Daemon, before: Event) -> Event:
    """The statistics once nobody is connected: the descriptors are those of `before`, every client is counted."""
    end = time.monotonic() + DEADLINE_S
    while (stats := echod.stats())["connections"]["open"] or stats["open_files"] > before["open_files"]:
        assert time.monotonic() < end, f"{stats}, and before {before}"
    assert stats["open_files"] == before["open_files"]
    assert stats["held_bytes"] == 0
    for each in echod.events_named("stats"):
        assert_adds_up(each)
    return stats


def assert_adds_up(stats: Event) -> None:
    """A client that was accepted is connected, or closed for one reason."""
    connections = stats["connections"]
    assert connections["accepted"] == connections["open"] + sum(connections["closed"].values()), stats


def _sample(it: Scene, pid: int, is_over: threading.Event) -> None:
    while True:
        usage = Usage.of(pid)
        it.peak_rss_bytes = max(it.peak_rss_bytes, usage.rss_bytes)
        it.peak_descriptors = max(it.peak_descriptors, usage.descriptors)
        if is_over.wait(SAMPLE_S):
            return
