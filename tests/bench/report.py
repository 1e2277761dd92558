"""The results as people read them: tables in Markdown."""

from collections.abc import Iterable, Sequence

from tests.bench.peers import Peer
from tests.bench.results import Results, Spread
from tests.bench.workloads import IDLE, WORKLOADS, Workload

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

_MB = 1e6
_BUSY = 0.9


def tables(results: Results, peers: Sequence[Peer]) -> str:
    """Everything that was measured."""
    names = [peer.name for peer in peers]
    return "\n\n".join(
        part
        for part in (
            "### CPU time of the server for one line, in µs\n\n"
            + _table(["workload", *names], (_cpu_row(results, workload, names) for workload in WORKLOADS)),
            "### Lines a second, in thousands\n\n"
            + _table(["workload", *names], (_rate_row(results, workload, names) for workload in WORKLOADS)),
            "### Round trips, median and 99th percentile, in µs\n\n"
            + _table(["workload", *names], (_latency_row(results, workload, names) for workload in WORKLOADS)),
            "### How busy the server was, in % of its core\n\n"
            + _table(["workload", *names], (_share_row(results, workload, names) for workload in WORKLOADS)),
            "### Memory and start\n\n" + _table(["", *names], _other_rows(results, names)),
            "### Held against the limit and the peers: CPU time, echod's as a multiple\n\n"
            + _table(
                ["workload", *(f"of {name}" for name in names if name != "echod"), "goal"], _ratios(results, names)
            ),
            _warning(results, names),
        )
        if part
    )


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


def _cpu_row(results: Results, workload: Workload, names: Sequence[str]) -> list[str]:
    return [workload.about, *(_told(results.spread(workload.name, name, lambda each: each.cpu_us)) for name in names)]


def _rate_row(results: Results, workload: Workload, names: Sequence[str]) -> list[str]:
    spreads = [results.spread(workload.name, name, lambda each: each.lines_per_s / 1e3) for name in names]
    return [workload.about, *("–" if spread is None else _figure(spread.median) for spread in spreads)]


def _share_row(results: Results, workload: Workload, names: Sequence[str]) -> list[str]:
    spreads = [results.spread(workload.name, name, lambda each: each.server_share * 100) for name in names]
    return [workload.about, *("–" if spread is None else f"{spread.median:.0f}" for spread in spreads)]


def _latency_row(results: Results, workload: Workload, names: Sequence[str]) -> list[str]:
    row = [workload.about]
    for name in names:
        half = results.spread(workload.name, name, lambda each: each.p50_us)
        most = results.spread(workload.name, name, lambda each: each.p99_us)
        row.append(f"{half.median:.0f} / {most.median:.0f}" if half and most else "–")
    return row


def _other_rows(results: Results, names: Sequence[str]) -> Iterable[list[str]]:
    def megabytes(found: int | None) -> str:
        return "–" if found is None else f"{found / _MB:.1f}"

    yield ["resident memory with nobody, MB", *(megabytes(results.empty.get(name)) for name in names)]
    yield [f"with {IDLE.about}, MB", *(megabytes(results.idle.get(name)) for name in names)]
    starts = [results.first_reply_s.get(name) for name in names]
    yield [
        "start to first reply, ms",
        *(_told(Spread.of([1e3 * each for each in found])) if found else "–" for found in starts),
    ]


def _ratios(results: Results, names: Sequence[str]) -> Iterable[list[str]]:
    for workload in WORKLOADS:
        ratios = [results.ratio(workload.name, "echod", name) for name in names if name != "echod"]
        goal = f"≤ {workload.limit_goal:g} × C" if workload.limit_goal else ""
        yield [workload.about, *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios), goal]


def _warning(results: Results, names: Sequence[str]) -> str:
    """Where the load was as busy as a core allows, lines a second are its own figure, and CPU time isn't."""
    busy = [
        f"{workload.about} ({name})"
        for workload in WORKLOADS
        for name in names
        if (share := results.spread(workload.name, name, lambda each: each.load_share)) and share.median > _BUSY
    ]
    return f"The load was the busier side, so the lines a second are its own, in: {'; '.join(busy)}." if busy else ""


def _told(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{_figure(spread.median)} ({_figure(spread.least)}–{_figure(spread.most)})"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
