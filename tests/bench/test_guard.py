"""What all of echod's features cost a line, held against the bare protocol: a ratio of one run, not a time."""

import statistics
from contextlib import ExitStack

import pytest

from tests.bench.harness import Harness
from tests.bench.peers import bare, echod
from tests.bench.workloads import WORKLOADS
from tests.report import Report

AT_MOST = {
    "1": 1.3,
    "50": 1.3,
    "500": 1.3,
    "50x16": 1.5,
    "8x64x1K": 1.1,
    "utf-8": 1.35,
    "churn": 2.9,
    "churn-reset": 3.1,
}
"""Times the CPU time of the bare protocol: a quarter more than on a quiet machine, for those that aren't."""

ROUNDS = 9
SECONDS = 0.3


@pytest.mark.timeout(180)
def test_a_line_costs_little_more_than_with_the_bare_protocol(harness: Harness, report: Report) -> None:
    """Every feature on, a line costs hardly more CPU time than a loop that does nothing else with it."""
    ratios: dict[str, list[float]] = {workload.name: [] for workload in WORKLOADS}
    with ExitStack() as stack:
        servers = [stack.enter_context(harness.serving(peer)) for peer in (echod(), bare())]
        for _ in range(ROUNDS):
            for workload in WORKLOADS:
                ours, theirs = (harness.measure(server, workload, SECONDS).cpu_us for server in servers)
                ratios[workload.name].append(ours / theirs)
    medians = {name: statistics.median(found) for name, found in ratios.items()}
    report("CPU time, times the bare protocol", **{name: f"{found:.2f}" for name, found in medians.items()})
    assert {name: found for name, found in medians.items() if found > AT_MOST[name]} == {}
