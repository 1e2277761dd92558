"""The results as people read them: tables in Markdown."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from tests.bench.harness import Figures
from tests.bench.peers import Peer
from tests.bench.results import Results, Spread
from tests.bench.workloads import IDLE, WORKLOADS, Workload

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

NOT_MEASURED = "–"

_MB = 1e6
_BUSY = 0.9


def tables(results: Results, peers: Sequence[Peer]) -> str:
    """Everything that was measured."""
    names = [peer.name for peer in peers]
    others = [name for name in names if name != "echod"]
    parts = (
        _titled("CPU time of the server for one line, in µs", _by_workload(results, names, _cpu)),
        _titled("Lines a second, in thousands", _by_workload(results, names, _rate)),
        _titled("Round trips, median and 99th percentile, in µs", _by_workload(results, names, _latency)),
        _titled("How busy the server was, in % of its core", _by_workload(results, names, _share)),
        _titled("Memory and start", _table(["", *names], _other_rows(results, names))),
        _titled(
            "Held against the limit and the peers: CPU time, echod's as a multiple",
            _table(["workload", *(f"of {name}" for name in others), "goal"], _ratios(results, others)),
        ),
        _warning(results, names),
    )
    return "\n\n".join(part for part in parts if part)


def replaced(document: str, measured: str) -> str:
    """The document with what stands between the marks renewed; raises ValueError if they aren't there."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError("the document has no place for what is measured")
    return f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _titled(title: str, table: str) -> str:
    return f"### {title}\n\n{table}"


def _by_workload(results: Results, names: Sequence[str], tell: Callable[[Sequence[Figures]], str]) -> str:
    """What is told of the rounds of each workload on each server."""

    def cell(workload: Workload, name: str) -> str:
        found = results.figures.get((workload.name, name))
        return tell(found) if found else NOT_MEASURED

    rows = ([workload.about, *(cell(workload, name) for name in names)] for workload in WORKLOADS)
    return _table(["workload", *names], rows)


def _cpu(found: Sequence[Figures]) -> str:
    return _told(Spread.of([each.cpu_us for each in found]))


def _rate(found: Sequence[Figures]) -> str:
    return _figure(median(each.lines_per_s / 1e3 for each in found))


def _latency(found: Sequence[Figures]) -> str:
    return f"{median(each.p50_us for each in found):.0f} / {median(each.p99_us for each in found):.0f}"


def _share(found: Sequence[Figures]) -> str:
    return f"{median(each.server_share * 100 for each in found):.0f}"


def _other_rows(results: Results, names: Sequence[str]) -> Iterable[list[str]]:
    def megabytes(found: int | None) -> str:
        return NOT_MEASURED if found is None else f"{found / _MB:.1f}"

    yield ["resident memory with nobody, MB", *(megabytes(results.empty.get(name)) for name in names)]
    yield [f"with {IDLE.about}, MB", *(megabytes(results.idle.get(name)) for name in names)]
    starts = [results.first_reply_s.get(name) for name in names]
    yield [
        "start to first reply, ms",
        *(_told(Spread.of([1e3 * each for each in found])) if found else NOT_MEASURED for found in starts),
    ]


def _ratios(results: Results, others: Sequence[str]) -> Iterable[list[str]]:
    for workload in WORKLOADS:
        ratios = [results.ratio(workload.name, "echod", name) for name in others]
        goal = f"≤ {workload.limit_goal:g} × C" if workload.limit_goal else ""
        yield [workload.about, *(NOT_MEASURED if ratio is None else f"{ratio:.2f}" for ratio in ratios), goal]


def _warning(results: Results, names: Sequence[str]) -> str:
    """Where the load was as busy as a core allows, lines a second are its own figure, and CPU time isn't."""
    busy = [
        f"{workload.about} ({name})"
        for workload in WORKLOADS
        for name in names
        if (share := results.spread(workload.name, name, lambda each: each.load_share)) and share.median > _BUSY
    ]
    return f"The load was the busier side, so the lines a second are its own, in: {'; '.join(busy)}." if busy else ""


def _told(spread: Spread) -> str:
    return f"{_figure(spread.median)} ({_figure(spread.least)}–{_figure(spread.most)})"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
