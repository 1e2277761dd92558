"""Measures echod and its peers, interleaved, and writes the report: see `make bench`."""

import argparse
import shlex
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
from tests.bench.peers import COMPILED, KEYS, MissingError, Peer, everyone
from tests.bench.results import Results
from tests.bench.workloads import IDLE, RATES, TLS, WORKLOADS
from tests.support.daemon import CONSOLE_SCRIPT

DOCUMENT = Path("docs/performance.md")
PLOT = DOCUMENT.with_suffix(".svg")

START = "start"
"""Stands among the workloads for the time from start to first reply."""

STARTS_A_ROUND = 2

_T = TypeVar("_T")


def main() -> int:
    """Measure, print and write."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as after Ctrl-C, no server is left behind
    is_partial = bool(options.peers or options.workloads or options.echod)
    is_written = options.write and not is_partial
    if is_written:
        report.replaced(DOCUMENT.read_text(), "")  # fails now rather than after the measurement
    with tempfile.TemporaryDirectory(prefix="echod-bench-") as directory:
        try:
            harness = Harness(Path(directory))
            command = shlex.split(options.echod) or (CONSOLE_SCRIPT,)
            peers, missing = everyone(Path(directory), command, options.peers)
        except MissingError as error:
            print(f"make bench: {error}", file=sys.stderr)
            return 1
        peers, missing = without_missing_fastpath(harness, peers, missing)
        described = machine.description(harness.cores, missing)
        print(described)
        if not peers:
            return 1
        results = measured(harness, peers, options.workloads, options.rounds, options.seconds)
    today = datetime.now(UTC).date().isoformat()
    rounds = f"{today}, {options.rounds} rounds of {options.seconds:g} s: median (least–most). {described}"
    found = f"{rounds}\n\n{report.tables(results, peers, is_brief=is_partial)}"
    print(f"\n{found}")
    if is_written:
        DOCUMENT.write_text(report.replaced(DOCUMENT.read_text(), found))
        plot.draw(results, [peer for peer in peers if not peer.only], PLOT)
        print(f"\nwritten: {DOCUMENT}, {PLOT}")
    return 0


def measured(harness: Harness, peers: Sequence[Peer], wanted: Sequence[str], rounds: int, seconds: float) -> Results:
    """Put each workload that is wanted (all if none is named) on each server in each round.

    Each round begins with another server, so that what drifts on the machine drifts for all of them.
    """
    results = Results()

    def is_wanted(name: str) -> bool:
        return not wanted or name.lower() in wanted

    if is_wanted(IDLE.name):
        _fill(harness, peers, results)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", flush=True)
        if is_wanted(START):
            _start(harness, peers, results)
        with ExitStack() as stack:
            running = [stack.enter_context(harness.serving(peer)) for peer in peers]
            for workload in filter(lambda each: is_wanted(each.name), (*WORKLOADS, *RATES, *TLS)):
                for server in turned(running, number):
                    if server.peer.takes(workload):
                        found = harness.measure(server, workload, seconds)
                        results.figures[workload.name, server.peer.name].append(found)
    return results


def turned(those: Sequence[_T], number: int) -> Sequence[_T]:
    """Return the same in the same order, beginning with another one for each number."""
    first = number % len(those)
    return [*those[first:], *those[:first]]


def without_missing_fastpath(
    harness: Harness, peers: Sequence[Peer], missing: dict[str, str]
) -> tuple[list[Peer], dict[str, str]]:
    """Leave out echod's compiled path where echod turns out to run without it."""
    for peer in peers:
        if peer.name == COMPILED:
            with harness.serving(peer) as server:
                if not server.has_fastpath:
                    reason = "echod runs without its compiled fast path: was there a C compiler when it was installed?"
                    return [each for each in peers if each is not peer], {**missing, COMPILED: reason}
    return [*peers], missing


def _start(harness: Harness, peers: Sequence[Peer], results: Results) -> None:
    for peer in [*peers] * STARTS_A_ROUND:
        if not (peer.does_other_work or peer.only):
            with harness.serving(peer) as server:
                results.first_reply_s[peer.name].append(server.first_reply_s)


def _fill(harness: Harness, peers: Sequence[Peer], results: Results) -> None:
    print(f"{IDLE.about} ...", flush=True)
    for peer in peers:
        if peer.takes(IDLE):
            with harness.serving(peer) as server:
                results.empty_bytes[peer.name] = server.rss_bytes
                results.idle[peer.name] = harness.idle(server)


def _options() -> argparse.Namespace:
    names = [*(workload.name.lower() for workload in (*WORKLOADS, *RATES, *TLS, IDLE)), START]
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for how long each time (%(default)s)")
    parser.add_argument("--no-write", dest="write", action="store_false", help=f"leave {DOCUMENT} alone")
    partial = parser.add_argument_group("part of it", f"with any of these, {DOCUMENT} is left alone")
    partial.add_argument("--peers", type=_listed, default=[], metavar="NAME,...", help=", ".join(KEYS))
    partial.add_argument("--workloads", type=_listed, default=[], metavar="NAME,...", help=", ".join(names))
    partial.add_argument("--echod", default="", metavar="COMMAND", help="another echod than the one installed here")
    options = parser.parse_args()
    for kind, given, known in (("peer", options.peers, KEYS), ("workload", options.workloads, names)):
        for name in given:
            if name not in known:
                parser.error(f"no {kind} {name!r}: there are {', '.join(known)}")
    return options


def _listed(names: str) -> list[str]:
    return [name.strip().lower() for name in names.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
