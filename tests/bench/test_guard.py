"""What all of echod's features cost a line, held against the bare protocol: a ratio of one run, not a time."""

import statistics
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.bench.harness import Harness
from tests.bench.peers import bare, echod
from tests.bench.workloads import WORKLOADS

AT_MOST = {
    "1": 1.4,
    "50": 1.4,
    "500": 1.4,
    "50x16": 1.4,
    "8x64x1K": 1.4,
    "utf-8": 1.4,
    "churn": 3.2,
    "churn-reset": 3.2,
}
"""Times the CPU time of the bare protocol; a third more than on a quiet machine, for those that aren't."""

ROUNDS = 5
SECONDS = 0.3


@pytest.mark.timeout(180)
def test_a_line_costs_little_more_than_with_the_bare_protocol(harness: Harness, report: Callable[[str], None]) -> None:
    """Every feature on, a line costs hardly more CPU time than a loop that does nothing else with it."""
    ratios: dict[str, list[float]] = {workload.name: [] for workload in WORKLOADS}
    with ExitStack() as stack:
        servers = [stack.enter_context(harness.serving(peer)) for peer in (echod(), bare())]
        for _ in range(ROUNDS):
            for workload in WORKLOADS:
                ours, theirs = (harness.measure(server, workload, SECONDS).cpu_us for server in servers)
                ratios[workload.name].append(ours / theirs)
    medians = {name: statistics.median(found) for name, found in ratios.items()}
    report(
        "CPU time, echod to the bare protocol: " + ", ".join(f"{name} {found:.2f}" for name, found in medians.items())
    )
    assert {name: found for name, found in medians.items() if found > AT_MOST[name]} == {}
