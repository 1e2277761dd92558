"""The results as Markdown tables."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median

from tests.bench.goals import Judged, judged
from tests.bench.harness import Figures
from tests.bench.peers import COMPILED, PYTHON, Peer
from tests.bench.results import Results, Spread
from tests.bench.workloads import IDLE, RATES, TLS, WORKLOADS, Workload

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

NOT_MEASURED = "–"

OTHER_WORK = "¹"

_MB = 1e6


def tables(results: Results, peers: Sequence[Peer], *, is_brief: bool = False) -> str:
    """Return everything that was measured, or only what the goals are about."""
    special = [peer for peer in peers if peer.only]
    peers = [peer for peer in peers if not peer.only]
    first = (
        ("CPU time of the server for one line, in µs", _by_workload(results, peers, WORKLOADS, _cpu)),
        ("The same as a multiple of C's", _multiples(results, peers)),
        ("Over TLS, and with access checks: CPU time in µs", _special(results, peers, special)),
        ("The goals", _goals(results)),
        ("At a fixed rate: CPU in % of a core, latency p50 / p99 / p99.9 in µs", _rates(results, peers)),
        ("Memory and start", _memory_and_start(results, peers)),
    )
    rest = (
        ("Lines a second, in thousands", _by_workload(results, peers, WORKLOADS, _lines)),
        ("Round trips, p50 / p99 in µs", _by_workload(results, peers, WORKLOADS, _latency)),
        ("How busy the server was, in % of its core", _by_workload(results, peers, WORKLOADS, _share)),
    )
    titled = first if is_brief else (*first, *rest)
    parts = [f"### {title}\n\n{table}" for title, table in titled if table]
    return "\n\n".join([*parts, *_notes(peers)])


def replaced(document: str, measured: str) -> str:
    """Return the document with what stands between the marks renewed; raises ValueError if they aren't there."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError("the document has no place for what is measured")
    return f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, or nothing where no row has a figure."""
    body = [row for row in rows if any(cell != NOT_MEASURED for cell in row[1:])]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if body else ""


def _names(peers: Sequence[Peer]) -> list[str]:
    return [f"{peer.name} {OTHER_WORK}" if peer.does_other_work else peer.name for peer in peers]


def _by_workload(
    results: Results, peers: Sequence[Peer], workloads: Sequence[Workload], tell: Callable[[Sequence[Figures]], str]
) -> str:
    """Return what is told of the rounds, a row for each workload and a column for each server."""

    def cell(workload: Workload, peer: Peer) -> str:
        found = results.figures.get((workload.name, peer.name))
        return tell(found) if found else NOT_MEASURED

    rows = ([workload.about, *(cell(workload, peer) for peer in peers)] for workload in workloads)
    return _table(["workload", *_names(peers)], rows)


def _special(results: Results, peers: Sequence[Peer], special: Sequence[Peer]) -> str:
    """Return what the special servers cost for a line or a connection, with echod itself for the comparison."""
    if not special:
        return ""
    shown = [*(peer for peer in peers if peer.name == COMPILED), *special]
    workloads = [each for each in (*WORKLOADS, *TLS) if any(each.name in peer.only for peer in special)]
    return _by_workload(results, shown, workloads, _cpu)


def _cpu(found: Sequence[Figures]) -> str:
    return _told(Spread.of([each.cpu_us for each in found]))


def _lines(found: Sequence[Figures]) -> str:
    return _figure(median(each.lines_per_s / 1e3 for each in found))


def _latency(found: Sequence[Figures]) -> str:
    return f"{median(each.p50_us for each in found):.0f} / {median(each.p99_us for each in found):.0f}"


def _share(found: Sequence[Figures]) -> str:
    return f"{median(each.server_share * 100 for each in found):.0f}"


def _multiples(results: Results, peers: Sequence[Peer]) -> str:
    def rows() -> Iterator[list[str]]:
        for workload in WORKLOADS:
            ratios = (results.ratio(workload.name, peer.name, "C") for peer in peers)
            yield [workload.about, *(NOT_MEASURED if ratio is None else f"{ratio:.2f}" for ratio in ratios)]

    return _table(["workload", *_names(peers)], rows())


def _goals(results: Results) -> str:
    def told(each: Judged) -> str:
        if each.found is None:
            return f"{each.goal}: not measured"
        return f"{each.goal}: {each.found:.3g}, {'met' if each.is_met else '**not met**'}"

    def cell(goals: Sequence[Judged], subject: str) -> str:
        its = [each for each in goals if each.goal.subject == subject]
        return "; ".join(map(told, its)) if any(each.found is not None for each in its) else NOT_MEASURED

    subjects = (COMPILED, PYTHON)
    rows = ([about, *(cell(goals, subject) for subject in subjects)] for about, goals in judged(results))
    return _table(["", *subjects], rows)


def _rates(results: Results, peers: Sequence[Peer]) -> str:
    """Return a row for each server: a figure of one rate is read beside the same figure of another server."""

    def cell(workload: Workload, peer: Peer) -> str:
        found = results.figures.get((workload.name, peer.name))
        if not found:
            return NOT_MEASURED
        latencies = ([each.p50_us for each in found], [each.p99_us for each in found], [each.p999_us for each in found])
        return f"{_share(found)} %, {' / '.join(f'{median(each):.0f}' for each in latencies)}"

    rows = (
        [name, *(cell(workload, peer) for workload in RATES)] for name, peer in zip(_names(peers), peers, strict=True)
    )
    return _table(["", *(workload.about for workload in RATES)], rows)


def _memory_and_start(results: Results, peers: Sequence[Peer]) -> str:
    names = [peer.name for peer in peers]
    idle = results.idle
    rows = (
        (
            "resident memory with no client, MB",
            {name: f"{found / _MB:.1f}" for name, found in results.empty_bytes.items()},
        ),
        (f"with {IDLE.about}, MB", {name: f"{found.rss_bytes / _MB:.1f}" for name, found in idle.items()}),
        ("CPU for them, in % of a core", {name: f"{found.share * 100:.2f}" for name, found in idle.items()}),
        (
            "start to first reply, ms",
            {name: _told(Spread.of([1e3 * each for each in found])) for name, found in results.first_reply_s.items()},
        ),
    )
    return _table(
        ["", *_names(peers)], ([title, *(cells.get(name, NOT_MEASURED) for name in names)] for title, cells in rows)
    )


def _notes(peers: Sequence[Peer]) -> Iterator[str]:
    others = [f"{peer.name}: {peer.about}" for peer in peers if peer.does_other_work]
    if others:
        yield f"{OTHER_WORK} Other work than echod's, for orientation. {'; '.join(others)}."


def _told(spread: Spread) -> str:
    return f"{_figure(spread.median)} ({_figure(spread.least)}–{_figure(spread.most)})"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
