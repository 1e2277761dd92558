"""An endurance run: connections, reloads and upgrades all at once, and a check that nothing leaks.

Short connections at full speed, pipelining clients that stay, valid and invalid reloads, and upgrades in bursts,
between which a leak of memory would show. `python -m tests.faults.endurance --minutes 30` prints the figures and exits
with 1 if something has grown or was counted wrong.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.peers import compiled
from tests.bench.workloads import Workload
from tests.faults.measurements import Usage, assert_adds_up
from tests.faults.model import UnixConnection
from tests.support.daemon import DEADLINE_S, UNMEASURED, Daemon, Event, ask, connect, settled
from tests.support.report import row
from tests.support.streams import upgrade

LOAD = Path(__file__).parents[1] / "bench" / "load.c"
LOADS = (
    Workload("churn", "short connections", 8, mode="churn"),
    Workload("reset", "short connections that are reset", 4, mode="churn-reset"),
    Workload("pipelined", "clients that stay", 4, depth=16, is_mixed=True),
)
BURST = 10
"""Upgrades in a burst."""

SAMPLE_S = 0.5
BAD_EVERY = 5
"""Every fifth reload reads an invalid configuration."""

GROWTH_BYTES_PER_CONNECTION = 5.0
"""Less than a list entry or a reference, and more than the noise of the allocator over many connections."""

ENOUGH_CONNECTIONS = 200_000
"""Connections needed to judge the growth of memory."""

GROWTH_BYTES = 8_000_000
"""Memory that an idle daemon may keep: the allocator returns not all."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The resources that the daemon uses at one moment."""

    at: float
    window: int
    """The number of bursts of upgrades before the sample."""
    rss_bytes: int
    descriptors: int
    threads: int
    accepted: int


@dataclass(slots=True)
class Outcome:
    """The results of a run."""

    figures: dict[str, object] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def run(seconds: float, reloads: int, upgrades: int) -> Outcome:
    """Run everything for this long."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="echod-") as name, _started(Path(name)) as echod:
        operator = Operator(echod, Path(name))
        operator.warm_up()
        before, used = settled(echod, 0), Usage.of(echod.pid)
        threads = _threads(echod.pid)
        began_at = time.monotonic()
        loads = [_Load(workload, echod, Path(name), seconds) for workload in LOADS]
        operator.run(seconds, reloads, upgrades)
        for load in loads:
            outcome.findings += load.finish()
        outcome.findings += operator.findings
        lasted_s = time.monotonic() - began_at
        after = settled(echod, 0)
        operator.sample(after)
        left = Usage.of(echod.pid)
        outcome.findings += _compare(_expected(before, loads, operator), _counted(after))
        if (open_now := (left.descriptors, _threads(echod.pid))) != (used.descriptors, threads):
            outcome.findings.append(f"descriptors and threads: {used.descriptors}, {threads} before; {open_now} after")
        if left.rss_bytes - used.rss_bytes > GROWTH_BYTES:
            outcome.findings.append(f"memory grew by {(left.rss_bytes - used.rss_bytes) / 1e6:.1f} MB")
        slopes = [slope for window in operator.windows() if (slope := _slope(window)) is not None]
        if slopes and statistics.median(slopes) > GROWTH_BYTES_PER_CONNECTION:
            outcome.findings.append(f"memory grows by {statistics.median(slopes):.1f} bytes a connection")
        connections = sum(load.connections for load in loads)
        outcome.figures = {
            "seconds": round(lasted_s),
            "connections": connections,
            "a second": round(connections / lasted_s),
            "lines": after["lines"] - before["lines"],
            "reloads": f"{operator.applied} applied, {operator.refused} refused",
            "upgrades": operator.upgrades,
            "longest gap ms": max((event["gap_ms"] for event in echod.events_named("upgrade done")), default=0),
            "memory MB": f"{used.rss_bytes / 1e6:.1f} -> {left.rss_bytes / 1e6:.1f}",
            "memory at most MB": round(max(sample.rss_bytes for sample in operator.samples) / 1e6, 1),
            "bytes a connection": [round(slope, 2) for slope in slopes] or "too few to tell",
            "descriptors": f"{used.descriptors} -> {left.descriptors}",
            "threads": f"{threads} -> {open_now[1]}",
        }
        for event in echod.events_named("stats"):
            assert_adds_up(event)
        if (status := echod.stop()) != 0:
            outcome.findings.append(f"exit status {status}")
    return outcome


class Operator:
    """Requests reloads and upgrades, and samples the daemon's resources."""

    def __init__(self, echod: Daemon, directory: Path) -> None:
        self.findings: list[str] = []
        self.samples: list[Sample] = []
        self.applied = self.refused = self.upgrades = self.greetings = 0
        self._bursts = 0
        self._echod, self._directory = echod, directory

    def warm_up(self) -> None:
        """Do everything once: what the first operation opens or imports is no leak."""
        with connect(self._echod.port) as client:
            ask(client, b"hello\n")
        for number in range(BAD_EVERY):
            self._reload(number)
        self._upgrade()
        self.applied = self.refused = self.upgrades = 0

    def run(self, seconds: float, reloads: int, upgrades: int) -> None:
        """Spread the reloads evenly, and the upgrades in bursts."""
        began_at = time.monotonic()
        bursts = -(-upgrades // BURST)
        for number in range(reloads):
            self._wait_until(began_at + seconds * number / reloads)
            self._reload(number)
            if self._bursts < bursts * (number + 1) // reloads:
                for _ in range(min(BURST, upgrades - self.upgrades)):
                    self._upgrade()
                self._bursts += 1
        self._wait_until(began_at + seconds)

    def sample(self, stats: Event) -> None:
        usage = Usage.of(self._echod.pid)
        accepted = stats["connections"]["accepted"]
        threads = _threads(self._echod.pid)
        self.samples.append(
            Sample(time.monotonic(), self._bursts, usage.rss_bytes, usage.descriptors, threads, accepted)
        )

    def windows(self) -> Iterator[list[Sample]]:
        """Return the samples between bursts of upgrades, without the first quarter, in which memory still grows."""
        for window in range(self._bursts + 1):
            samples = [sample for sample in self.samples if sample.window == window]
            yield samples[len(samples) // 4 :]

    def _wait_until(self, moment: float) -> None:
        while (left_s := moment - time.monotonic()) > 0:
            self.sample(self._ask("GET", "/stats")[1])
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._echod.process.wait(min(left_s, SAMPLE_S))
                raise AssertionError("the daemon has ended")

    def _reload(self, number: int) -> None:
        is_bad = number % BAD_EVERY == BAD_EVERY - 1
        write_configuration(self._directory, number, is_bad=is_bad)
        status, answer = self._ask("POST", "/reload")
        if is_bad:
            write_configuration(self._directory, number, is_bad=False)
        if status != (409 if is_bad else 200):
            self.findings.append(f"reload {number}: {status} {answer}")
        self.refused += is_bad
        self.applied += not is_bad

    def _upgrade(self) -> None:
        try:
            upgrade(self._echod)
        except AssertionError:
            self.findings.append(f"no upgrade: {self._echod.events_named('upgrade refused')[-1:]}")
        else:
            self.upgrades += 1

    def _ask(self, method: str, page: str) -> tuple[int, Event]:
        with contextlib.closing(UnixConnection(str(self._directory / "admin"))) as connection:
            connection.request(method, page)
            response = connection.getresponse()
            answer: Event = json.loads(response.read())
            return response.status, answer


class _Load:
    """A load generator, and its final counts."""

    def __init__(self, workload: Workload, echod: Daemon, directory: Path, seconds: float) -> None:
        self._workload = workload
        self._request, self._reply = workload.write(directory)
        self._seconds = seconds
        self._blocks = 0
        arguments = [str(echod.port), str(echod.pid), workload.mode, str(workload.connections)]
        self._process = subprocess.Popen(
            [compiled(LOAD, directory), *arguments, self._request, self._reply, "0", str(seconds)],
            stdout=subprocess.PIPE,
        )

    def finish(self) -> list[str]:
        """Wait for the end, and return the complaints."""
        output = self._process.communicate(timeout=self._seconds + DEADLINE_S)[0]
        if self._process.returncode:
            return [f"{self._workload.about}: see what the load says"]
        self._blocks = json.loads(output)["blocks"] + self._workload.connections  # and the last one of each
        return []

    @property
    def connections(self) -> int:
        return self._workload.connections if self._workload.mode == "blocks" else self._blocks

    @property
    def resets(self) -> int:
        """The number of resets, without those at the end of the process."""
        return self.connections - self._workload.connections if self._workload.mode == "churn-reset" else 0

    @property
    def traffic(self) -> Event:
        return {
            "lines": self._blocks * self._workload.depth,
            "bytes_in": self._blocks * self._request.stat().st_size,
            "bytes_out": self._blocks * self._reply.stat().st_size,
        }


def write_configuration(directory: Path, number: int, *, is_bad: bool) -> None:
    """Write a configuration that differs from the previous one, also in its listeners."""
    lines = [
        "[[listen]]\naddress = '127.0.0.1:0'",
        f"[[listen]]\naddress = 'unix:{directory}/clients'" if number % 2 else "",
        f"[limits]\nline_bytes = {10_000 + number % 7}\nconnections = {1000 + number % 3}",
        "[timeouts]\nidle = -1" if is_bad else f"[timeouts]\nidle = {100 + number % 5}",
    ]
    fresh = directory / "echod.new"
    fresh.write_text("\n".join(lines))
    os.replace(fresh, directory / "echod.toml")


@contextlib.contextmanager
def _started(directory: Path) -> Iterator[Daemon]:
    """Start the daemon, with a log without the event of each connection."""
    write_configuration(directory, 0, is_bad=False)
    sieve = subprocess.Popen(
        ["grep", "--line-buffered", "--invert-match", '"event": *"connection closed"'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    environment = {"RUNTIME_DIRECTORY": str(directory)} | UNMEASURED
    with sieve, Daemon("-c", str(directory / "echod.toml"), environment=environment, through=sieve) as echod:
        echod.wait_for("ready")
        yield echod


def _expected(before: Event, loads: list[_Load], operator: Operator) -> Event:
    counted = _counted(before)
    for load in loads:
        counted["accepted"] += load.connections
        counted["reset"] += load.resets
        counted["client"] += load.connections - load.resets
        for name, count in load.traffic.items():
            counted[name] += count
    counted["applied"] += operator.applied
    counted["refused"] += operator.refused
    counted["upgrades"] += operator.upgrades
    counted["config_generation"] += operator.applied + operator.upgrades
    return counted


def _counted(stats: Event) -> Event:
    connections = stats["connections"]
    return {
        "accepted": connections["accepted"],
        "rejected": sum(connections["rejected"].values()),
        **connections["closed"],
        **{name: stats[name] for name in ("lines", "bytes_in", "bytes_out", "upgrades", "config_generation")},
        **{name: stats["reloads"][name] for name in ("applied", "refused")},
    }


def _compare(expected: Event, counted: Event) -> list[str]:
    return [
        f"{name}: {counted[name]} counted, {count} expected"
        for name, count in expected.items()
        if counted[name] != count
    ]


def _slope(samples: list[Sample]) -> float | None:
    """Return the growth of memory in bytes per connection; None if there were too few connections."""
    if len(samples) < 10 or samples[-1].accepted - samples[0].accepted < ENOUGH_CONNECTIONS:
        return None
    accepted, rss_bytes = [sample.accepted for sample in samples], [sample.rss_bytes for sample in samples]
    return statistics.linear_regression(accepted, rss_bytes).slope


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def main() -> int:
    """Run as the arguments say; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.endurance", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--reloads", type=int, default=2000)
    parser.add_argument("--upgrades", type=int, default=100)
    options = parser.parse_args()
    outcome = run(60 * options.minutes, options.reloads, options.upgrades)
    sys.stdout.write(f"{row(outcome.figures, ' ')}\n")
    for finding in outcome.findings:
        sys.stdout.write(f"FOUND {finding}\n")
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
