"""What a run comes to: medians of the rounds, ratios within a round, and a document whose prose stays."""

import pytest

from tests.bench import report
from tests.bench.__main__ import turned
from tests.bench.harness import Figures
from tests.bench.peers import bare, echod
from tests.bench.results import Results, Spread
from tests.bench.workloads import WORKLOADS, Workload


def _figures(cpu_us: float, *, load_share: float = 0.5) -> Figures:
    return Figures(
        cpu_us=cpu_us, lines_per_s=1e6 / cpu_us, p50_us=10, p99_us=20, server_share=0.8, load_share=load_share
    )


def test_a_ratio_is_taken_within_each_round() -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    results = Results()
    for slow in (1, 2, 1):
        results.figures["50", "echod"].append(_figures(7.0 * slow))
        results.figures["50", "C"].append(_figures(5.0 * slow))
    assert results.ratio("50", "echod", "C") == pytest.approx(1.4)
    assert results.ratio("50", "echod", "Go") is None
    assert results.spread("50", "echod", lambda each: each.cpu_us) == Spread(7.0, 7.0, 14.0)


def test_each_round_begins_with_another_server() -> None:
    """Who is measured behind whom changes, so that what one leaves to the next isn't always the same one's."""
    assert [turned("abc", number) for number in range(4)] == [[*"abc"], [*"bca"], [*"cab"], [*"abc"]]


def test_a_peer_that_took_no_part_is_a_dash() -> None:
    """The limit knows no UTF-8; the row is there without it."""
    results = Results()
    results.figures["utf-8", "echod"].append(_figures(0.512))
    row = next(line for line in report.tables(results, [echod(), bare()]).splitlines() if "UTF-8" in line)
    assert row == "| 50 connections, 16 lines of mixed UTF-8 at a time | 0.512 (0.512–0.512) | – |"


def test_a_busy_load_is_told() -> None:
    """Where the load was as busy as a core allows, the report says so."""
    results = Results()
    results.figures["1", "echod"].append(_figures(9.0, load_share=0.97))
    assert "The load was the busier side" in report.tables(results, [echod()])
    results.figures["1", "echod"][:] = [_figures(9.0)]
    assert "The load was the busier side" not in report.tables(results, [echod()])


def test_the_document_keeps_what_isn_t_measured() -> None:
    """Only what stands between the marks is renewed, again and again."""
    document = f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"
    once = report.replaced(document, "new")
    assert once == f"before\n\n{report.BEGIN}\n\nnew\n\n{report.END}\n\nafter\n"
    assert report.replaced(once, "new") == once
    with pytest.raises(ValueError, match="no place"):
        report.replaced("nothing", "new")


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_line_has_its_length(workload: Workload) -> None:
    """So many bytes a line, LF included, and the answer is what echod's protocol says it is."""
    lines = workload.request.encode().splitlines(keepends=True)
    assert [len(line) for line in lines] == [workload.line_bytes] * workload.depth
    assert all(line.decode().strip() + "\n" == line.decode() for line in lines), "nothing to strip: C knows no lines"
