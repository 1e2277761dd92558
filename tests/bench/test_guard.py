"""Bounds on the cost of a line on each of echod's paths, as ratios to other servers in the same run."""

import shutil
import statistics
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bench import interpreter
from tests.bench.harness import Harness
from tests.bench.peers import COMPILED, PYTHON, bare, echod, echod_python, limit
from tests.bench.workloads import WORKLOADS
from tests.support.report import Report

AT_MOST = {
    COMPILED: {
        "50": (1.4, "C"),
        "50x16": (1.5, "C"),
        "8x64x1K": (1.8, "C"),
        "utf-8": (1.5, "bare"),
        "churn": (2.8, "C"),
    },
    PYTHON: {
        "50": (1.35, "bare"),
        "50x16": (1.4, "bare"),
        "8x64x1K": (1.1, "bare"),
        "utf-8": (1.5, "bare"),
        "churn": (2.3, "bare"),
    },
}
"""Multiples of the other server's CPU time, a quarter or more above the measured ones, because machines are noisy."""

ROUNDS = 7
SECONDS = 0.25


@pytest.mark.timeout(180)
def test_the_cost_of_a_line_is_bounded(harness: Harness, report: Report, tmp_path: Path) -> None:
    """Every feature on, a line costs little more CPU time than with a loop that does nothing else."""
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        peers = (limit(tmp_path), bare(), echod(), echod_python())
        servers = {peer.name: stack.enter_context(harness.serving(peer)) for peer in peers}
        if not servers[COMPILED].has_fastpath:
            del servers[COMPILED]  # the next test tells whether that is right
        bounds = {(name, on): bound for name in AT_MOST if name in servers for on, bound in AT_MOST[name].items()}
        for _ in range(ROUNDS):
            for workload in WORKLOADS:
                others = {name: other for (name, on), (_, other) in bounds.items() if on == workload.name}
                costs = {
                    name: harness.measure(servers[name], workload, SECONDS).cpu_us
                    for name in sorted({*others, *others.values()})
                }
                for name, other in others.items():
                    ratios[name, workload.name].append(costs[name] / costs[other])
    medians = {key: statistics.median(found) for key, found in ratios.items()}
    for (name, on), found in medians.items():
        at_most, other = bounds[name, on]
        report(f"CPU time for a line, {name}, {on}", ratio=f"{found:.2f} × {other}", at_most=at_most)
    assert {key: found for key, found in medians.items() if found > bounds[key][0]} == {}


def test_the_fast_path_is_in_use_where_it_can_be_built(harness: Harness) -> None:
    """With a C compiler and Python's headers the fast path is in use, so its bounds are tested."""
    if not (shutil.which("cc") and interpreter.described().has_headers):
        pytest.skip("the compiled fast path can't be built here: apt-get install gcc libc6-dev python3-dev")
    with harness.serving(echod()) as server:
        assert server.has_fastpath
    with harness.serving(echod_python()) as server:
        assert not server.has_fastpath
