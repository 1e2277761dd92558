"""Measures everyone, interleaved, and writes the report: see `make bench`."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from tests.bench import machine, plot, report
from tests.bench.harness import Harness
from tests.bench.peers import MissingError, Peer, everyone
from tests.bench.results import Results
from tests.bench.workloads import WORKLOADS

DOCUMENT = Path("docs/performance.md")
PLOT = DOCUMENT.with_suffix(".svg")

STARTS_A_ROUND = 2

_T = TypeVar("_T")


def main() -> int:
    """Measure, print and write."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a Ctrl-C: no server is left behind
    if options.write:
        report.replaced(DOCUMENT.read_text(), "")  # or it would fail when all is measured
    with tempfile.TemporaryDirectory(prefix="echod-bench-") as folder:
        try:
            harness = Harness(Path(folder))
            peers, missing = everyone(Path(folder))
        except MissingError as error:
            print(f"make bench: {error}", file=sys.stderr)
            return 1
        described = machine.description(harness.cores, missing)
        print(described)
        results = measured(harness, peers, options.rounds, options.seconds)
    today = datetime.now(UTC).date().isoformat()
    rounds = f"{today}, {options.rounds} rounds of {options.seconds:g} s: median (least–most). {described}"
    found = f"{rounds}\n\n{report.tables(results, peers)}"
    print(f"\n{found}")
    if options.write:
        DOCUMENT.write_text(report.replaced(DOCUMENT.read_text(), found))
        plot.draw(results, peers, PLOT)
        print(f"\nwritten: {DOCUMENT}, {PLOT}")
    return 0


def measured(harness: Harness, peers: Sequence[Peer], rounds: int, seconds: float) -> Results:
    """Each server with each workload in each round, another one first: what drifts drifts for all of them."""
    results = Results()
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", flush=True)
        _start_and_fill(harness, peers, results, is_first=number == 0)
        with ExitStack() as stack:
            running = [(peer, stack.enter_context(harness.serving(peer))) for peer in peers]
            for workload in WORKLOADS:
                for peer, server in turned(running, number):
                    if peer.knows_utf8 or not workload.is_mixed:
                        results.figures[workload.name, peer.name].append(harness.measure(server, workload, seconds))
    return results


def turned(those: Sequence[_T], number: int) -> Sequence[_T]:
    """The same, from another one on for each number."""
    first = number % len(those)
    return [*those[first:], *those[:first]]


def _start_and_fill(harness: Harness, peers: Sequence[Peer], results: Results, *, is_first: bool) -> None:
    """Start each, and the first time open the idle connections to it."""
    for peer in [*peers] * STARTS_A_ROUND:
        with harness.serving(peer) as server:
            results.first_reply_s[peer.name].append(server.first_reply_s)
            if is_first and peer.name not in results.idle:
                results.empty[peer.name] = server.rss_bytes
                results.idle[peer.name] = harness.idle_bytes(server)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for how long each time (%(default)s)")
    parser.add_argument("--no-write", dest="write", action="store_false", help=f"leave {DOCUMENT} alone")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
