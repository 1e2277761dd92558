"""What a run comes to: medians of the rounds, ratios within a round, goals, and a document whose prose stays."""

import pytest

from tests.bench import report
from tests.bench.__main__ import turned
from tests.bench.dialects import MEMCACHED, REDIS, UPPER
from tests.bench.goals import judged
from tests.bench.harness import Figures, Idle
from tests.bench.peers import COMPILED, PYTHON, Peer, bare, echod, echod_python
from tests.bench.results import Results, Spread
from tests.bench.workloads import RATES, WORKLOADS, Workload

OTHER = Peer(name="other", about="something else", command=("other",), dialect=MEMCACHED)


def _figures(cpu_us: float) -> Figures:
    return Figures(cpu_us=cpu_us, lines_per_s=1e6 / cpu_us, p50_us=10, p99_us=20, p999_us=30, server_share=0.8)


def _row(results: Results, peers: list[Peer], about: str) -> str:
    return next(line for line in report.tables(results, peers).splitlines() if about in line)


def test_a_ratio_is_taken_within_each_round() -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    results = Results()
    for slow in (1, 2, 1):
        results.figures["50", COMPILED].append(_figures(7.0 * slow))
        results.figures["50", "C"].append(_figures(5.0 * slow))
        results.first_reply_s[COMPILED].append(0.3 * slow)
        results.first_reply_s["bare"].append(0.2 * slow)
    assert results.ratio("50", COMPILED, "C") == pytest.approx(1.4)
    assert results.ratio("50", COMPILED, "Go") is None
    assert results.start_ratio(COMPILED, "bare") == pytest.approx(1.5)
    assert results.spread("50", COMPILED, lambda each: each.cpu_us) == Spread(7.0, 7.0, 14.0)


def test_each_round_begins_with_another_server() -> None:
    """Each round begins with another server, so that no server always follows the same one."""
    assert [turned("abc", number) for number in range(4)] == [[*"abc"], [*"bca"], [*"cab"], [*"abc"]]


def test_a_peer_that_took_no_part_is_a_dash() -> None:
    """The limit has no figure for UTF-8; the row exists without it."""
    results = Results()
    results.figures["utf-8", COMPILED].append(_figures(0.512))
    row = _row(results, [echod(), bare()], "UTF-8")
    assert row == "| 50 connections, 16 lines of mixed UTF-8 at a time | 0.512 (0.512–0.512) | – |"


def test_other_work_is_marked() -> None:
    """A daemon that doesn't upper-case bears a mark, and a note says what it does."""
    results = Results()
    results.figures["50", "other"].append(_figures(5.0))
    told = report.tables(results, [OTHER])
    assert "| workload | other ¹ |" in told
    assert "¹ Other work than echod's, for orientation. other: something else." in told
    assert "¹" not in report.tables(results, [echod()])


def test_a_fixed_rate_tells_cpu_and_latency() -> None:
    """One cell holds the CPU share and three quantiles, each the median of the rounds."""
    results = Results()
    for _ in range(3):
        results.figures["rate-10k", COMPILED].append(_figures(9.0))
    assert _row(results, [echod()], "10 / 20 / 30") == "| echod | 80 %, 10 / 20 / 30 | – |"


def test_a_goal_is_met_up_to_its_bound() -> None:
    """Both paths have goals of their own, and one that was not measured is neither met nor missed."""
    results = Results()
    results.figures["8x64x1K", "C"].append(_figures(1.0))
    results.figures["8x64x1K", COMPILED].append(_figures(1.5))
    results.figures["8x64x1K", "Go"].append(_figures(2.0))
    results.figures["8x64x1K", PYTHON].append(_figures(2.1))
    row = _row(results, [echod(), echod_python()], "≤ 1.5 × C")
    assert row.endswith("| ≤ 1.5 × C: 1.5, met | ≤ 1 × Go: 1.05, **not met** |")
    results.figures["churn", "C"].append(_figures(1.0))
    results.figures["churn", COMPILED].append(_figures(2.0))
    row = _row(results, [echod()], "≤ 2 × C")
    assert row.endswith("| ≤ 2 × C: 2, met; ≤ 0.75 × Go: not measured | – |")
    assert "≤ 0.85 × Go" not in report.tables(results, [echod()]), "a row without a figure is left out"


def test_an_idle_server_has_goals_for_memory_and_cpu() -> None:
    """Megabytes and percents of a core."""
    results = Results()
    results.idle[COMPILED] = Idle(42_000_000, 0.011)
    (found,) = (goals for about, goals in judged(results) if "idle" in about)
    assert [(str(each.goal), each.is_met) for each in found] == [
        ("≤ 42 MB", True),
        ("≤ 1 % CPU", False),
        ("≤ 42 MB", None),
        ("≤ 1 % CPU", None),
    ]


def test_the_document_keeps_what_isn_t_measured() -> None:
    """Only what stands between the marks is renewed, again and again."""
    document = f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"
    once = report.replaced(document, "new")
    assert once == f"before\n\n{report.BEGIN}\n\nnew\n\n{report.END}\n\nafter\n"
    assert report.replaced(once, "new") == once
    with pytest.raises(ValueError, match="no place"):
        report.replaced("nothing", "new")


@pytest.mark.parametrize("workload", [*WORKLOADS, *RATES], ids=lambda workload: workload.name)
def test_every_line_has_its_length(workload: Workload) -> None:
    """The lines have the length that the workload says, and nothing to strip, because the limit strips nothing."""
    requests = [UPPER.ask(line)[0] for line in workload.lines]
    assert [len(request) for request in requests] == [workload.line_bytes] * workload.depth
    assert all(line.strip() == line for line in workload.lines)


def test_other_daemons_are_asked_in_their_language() -> None:
    """A request of memcached is as long as the line that it stands for, and Redis echoes a line of the same length."""
    (line,) = WORKLOADS[0].lines
    request, reply = MEMCACHED.ask(line)
    assert (len(request), request[:3], request[-2:], reply) == (64, b"mg ", b"\r\n", b"EN\r\n")
    request, reply = REDIS.ask(line)
    assert reply == f"$63\r\n{line}\r\n".encode()
    assert request == b"*2\r\n$4\r\nECHO\r\n" + reply


def test_every_peer_takes_what_means_something_for_it() -> None:
    """Other work stays with the plain ASCII workloads."""
    taken = [workload.name for workload in (*WORKLOADS, *RATES) if OTHER.takes(workload)]
    assert taken == ["50", "500", "50x16", "rate-10k", "rate-50k"]
    assert all(echod().takes(workload) for workload in (*WORKLOADS, *RATES))
