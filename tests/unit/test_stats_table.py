"""The table of the statistics, and the rates."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echod.cli.stats_rates import Seen
from echod.cli.stats_table import (
    Cell,
    Line,
    Meaning,
    bar,
    count,
    duration,
    lag_share,
    milliseconds,
    rendered,
    size,
    table,
)
from echod.telemetry.stats import Stats

STATS = {
    "pid": 4711,
    "version": "0.1.0",
    "state": "serving",
    "uptime_s": 93784.1,
    "fast_path": True,
    "connections": {
        "open": 12,
        "accepted": 1234,
        "rejected": {"limit": 3, "address": 0},
        "closed": {"client": 1200, "reset": 3, "line timeout": 19},
    },
    "loop_lag_ms": 120.04,
    "rss_bytes": None,
    "reloads": {"applied": 1, "refused": 1, "last_error": "a.toml: \x1b[2J"},
    "later": {"invention": 5},
}


def text(lines: list[Line], width: int | None = None) -> list[str]:
    return [rendered(line, width, in_colour=False) for line in lines]


def test_a_table() -> None:
    """A table has a title and a line for each statistic; an unknown one is last, a missing one is left out."""
    assert text(table(STATS)) == [
        "echod 0.1.0   pid 4711   serving   up 1 d 2 h   fast path",
        "",
        "connections",
        "  open                       12",
        "  accepted                1,234",
        "  closed                  1,222   client 1,200, reset 3, line timeout 19",
        "  rejected                    3   limit 3",
        "",
        "process",
        "  loop lag             120.0 ms",
        "  memory                unknown",
        "  reloads                     2   applied 1, refused 1",
        "  last reload: 'a.toml: \\x1b[2J'",
        "",
        "more",
        "  later.invention             5",
    ]


def test_every_figure_has_its_place() -> None:
    """Every statistic has its row, and the table fits a terminal of 80 by 24 with a line to spare."""
    gauges = {"log_dropped": lambda: 0, "rss_bytes": lambda: 0, "open_files": lambda: 0}
    lines = text(table(Stats(gauges).snapshot("serving", [])))
    assert "more" not in lines
    assert len(lines) < 24
    assert max(map(len, lines)) < 80


def test_tls_has_its_rows_where_a_listener_speaks_it() -> None:
    """The row of the certificates tells when the first one ends."""
    gauges = {"log_dropped": lambda: 0, "rss_bytes": lambda: 0, "open_files": lambda: 0}
    stats = Stats(gauges)
    stats.count_handshake("TLSv1.3")
    stats.count_handshake("")
    day = 86_400
    ends = {"127.0.0.1:2": time.time() + 100 * day, "127.0.0.1:1": time.time() + 13 * day - 1}
    lines = table(stats.snapshot("serving", [], ends))
    assert "  TLS handshakes              2   TLSv1.3 1, failed 1" in text(lines)
    assert "  TLS certificate  in 12 d 23 h   127.0.0.1:1" in text(lines)
    assert "more" not in text(lines)
    assert len(lines) <= 24
    meanings = {line[0].text.strip(): line[1].meaning for line in lines if len(line) > 1}
    assert meanings["TLS certificate"] == Meaning.WARNING
    ended = {line[0].text.strip(): line for line in table(stats.snapshot("serving", [], {"a:1": 1.0})) if line}
    assert ended["TLS certificate"][1] == Cell("   has ended", Meaning.BAD)


def test_what_stands_out() -> None:
    """Values above a threshold and zeros are highlighted, only if colours are wanted."""
    meanings = {line[0].text.strip(): line[1].meaning for line in table(STATS) if len(line) > 1}
    assert meanings["rejected"] == meanings["loop lag"] == meanings["memory"] == Meaning.WARNING
    assert meanings["open"] is None
    assert rendered((Cell("a", Meaning.BAD), Cell("b")), None, in_colour=True) == "\x1b[31ma\x1b[0mb"
    stuck = {
        line[0].text.strip(): line[1].meaning for line in table({"loop_lag_ms": 1000, "lines": 0}) if len(line) > 1
    }
    assert stuck["loop lag"] == Meaning.BAD
    assert stuck["lines"] == Meaning.NOTHING


@given(st.integers(0, 60), st.lists(st.text(max_size=20)))
def test_a_width(width: int, texts: list[str]) -> None:
    """A line is cut at the width of the terminal; colours take no room."""
    line = tuple(Cell(text, Meaning.BAR) for text in texts)
    plain = rendered(line, width, in_colour=False)
    assert plain == "".join(texts)[:width].rstrip()
    coloured = rendered(line, width, in_colour=True)
    assert coloured.replace("\x1b[36m", "").replace("\x1b[0m", "").rstrip() == plain


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
NAMES = st.sampled_from(["connections", "lines", "uptime_s", "loop_lag_ms", "reloads", "pid", "open", "closed", "\x1b"])


@given(st.lists(st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3))
def test_whatever_somebody_answers(answers: list[dict[str, object]]) -> None:
    """Any answer makes a printable table, never a traceback."""
    seen = Seen()
    for answer in answers:
        for line in text(table(answer, seen.next(answer))):
            assert line.isprintable()


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (count(1234567), "1,234,567"),
        (size(0), "0 B"),
        (size(1023), "1023 B"),
        (size(1024), "1.0 KiB"),
        (size(29360128), "28.0 MiB"),
        (size(5 * 1024**5), "5,120.0 TiB"),
        (milliseconds(0.44), "0.4 ms"),
        (duration(59.9), "59 s"),
        (duration(60), "1 min 0 s"),
        (duration(3 * 3600 + 725), "3 h 12 min"),
        (duration(86400 * 400), "400 d 0 h"),
        (bar(0, 4), "░░░░"),
        (bar(0.5, 4), "██░░"),
        (bar(7, 4), "████"),
        (lag_share(0), 0),
        (lag_share(0.1), 0),
        (lag_share(10), 0.5),
        (lag_share(1000), 1),
    ],
)
def test_figures(shown: object, expected: object) -> None:
    """Values are formatted in a fitting unit."""
    assert shown == expected


# -- rates -------------------------------------------------------------------------------------------------------------


def test_rates() -> None:
    """The rate of a counter is per second of the daemon's own clock; gauges have no rate."""
    seen = Seen()
    first = seen.next({"pid": 1, "uptime_s": 10, "lines": 5, "connections": {"open": 3, "closed": {"client": 1}}})
    assert (first.per_second, first.peak_open, first.restarts) == ({}, 3, 0)
    second = seen.next({"pid": 1, "uptime_s": 12, "lines": 10, "connections": {"open": 2, "closed": {"client": 2}}})
    assert second.per_second == {"lines": 2.5, "connections.closed.client": 0.5}
    assert (second.peak_open, second.restarts) == (3, 0)
    shown = text(table({"lines": 10, "connections": {"closed": {"client": 2}, "open": 2}}, second))
    assert "  lines                      10         2.5/s" in shown
    assert "  closed                      2         0.5/s   client 2" in shown
    assert f"  open                        2                 {bar(2 / 3)} peak 3" in shown


@pytest.mark.parametrize("answer", [{"pid": 2, "uptime_s": 20, "lines": 1}, {"pid": 1, "uptime_s": 1, "lines": 1}])
def test_a_restart(answer: dict[str, int]) -> None:
    """A restarted daemon has no rates and no peak yet."""
    seen = Seen()
    seen.next({"pid": 1, "uptime_s": 10, "lines": 5, "connections": {"open": 3}})
    rates = seen.next(answer)
    assert (rates.per_second, rates.peak_open, rates.restarts) == ({}, 0, 1)
