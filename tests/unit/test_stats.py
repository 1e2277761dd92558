"""The statistics: their names, their sums, and the metadata that monitoring and the documentation derive from."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echod import __version__
from echod.cli.stats_rates import flat
from echod.process import limits
from echod.telemetry.reasons import CloseReason, EndReason, RejectReason, end_reason
from echod.telemetry.stats import REJECT_REASONS, Stats, figures

NAMES = {
    "pid",
    "version",
    "fast_path",
    "state",
    "uptime_s",
    "upgrades",
    "config_generation",
    "connections",
    "lines",
    "bytes_in",
    "bytes_out",
    "held_bytes",
    "reloads",
    "tls",
    "log_dropped",
    "loop_lag_ms",
    "rss_bytes",
    "open_files",
}
REASONS = {
    "client",
    "reset",
    "idle",
    "line timeout",
    "write timeout",
    "line too long",
    "invalid utf-8",
    "drained",
    "cut",
}


@dataclass
class Carried:
    """The counters of a connection."""

    lines: int
    bytes_in: int
    bytes_out: int
    held_bytes: int = 0


counts = st.integers(0, 2**70)
carried = st.builds(Carried, lines=counts, bytes_in=counts, bytes_out=counts, held_bytes=counts)
closings = st.lists(st.tuples(st.sampled_from(CloseReason), carried), max_size=20)


def new_stats(**gauges: Callable[[], int]) -> Stats:
    return Stats({**dict.fromkeys(("log_dropped", "rss_bytes", "open_files"), lambda: 0), **gauges})


def snapshot(stats: Stats, *live: Carried) -> dict[str, Any]:
    return stats.snapshot("serving", live)


def test_names() -> None:
    """A snapshot has exactly the documented names."""
    shown = snapshot(new_stats())
    assert shown.keys() == NAMES
    assert shown["connections"].keys() == {"open", "accepted", "rejected", "closed"}
    assert shown["connections"]["closed"].keys() == REASONS
    assert shown["reloads"].keys() == {"applied", "refused", "last_error"}
    assert shown["tls"] == {"handshakes": {"TLSv1.2": 0, "TLSv1.3": 0, "failed": 0}, "certificate_ends": {}}


@pytest.mark.parametrize(
    "reason",
    ["limit", "address", "proxy", "denied", "rate", "tls"],
)
def test_names_of_rejections(reason: str) -> None:
    """Each documented reason of a rejection is present from the start."""
    assert snapshot(new_stats())["connections"]["rejected"][reason] == 0


def test_every_statistic_has_a_help_text() -> None:
    """Each value, or the mapping that it is in, has metadata, from which the metrics and the documentation derive."""
    for name in flat(snapshot(new_stats())):
        figure = figures().get(name) or next(each for key, each in figures().items() if name.startswith(f"{key}."))
        assert figure.help.endswith("."), name


def test_all_starts_at_nothing() -> None:
    """All counters of a new process are 0, and its configuration is the first."""
    shown = snapshot(new_stats())
    assert shown["connections"] == {
        "open": 0,
        "accepted": 0,
        "rejected": dict.fromkeys(REJECT_REASONS, 0),
        "closed": dict.fromkeys(REASONS, 0),
    }
    assert [shown[name] for name in ("lines", "bytes_in", "bytes_out", "upgrades", "log_dropped")] == [0] * 5
    assert shown["reloads"] == {"applied": 0, "refused": 0, "last_error": ""}
    assert shown["config_generation"] == 1


@given(closings, st.lists(carried, max_size=20))
def test_sums(closed: list[tuple[CloseReason, Carried]], live: list[Carried]) -> None:
    """Lines and bytes are the sums over closed and open connections."""
    stats = new_stats()
    for reason, traffic in closed:
        stats.close(reason, traffic)
    everyone = [*[traffic for _, traffic in closed], *live]
    shown = snapshot(stats, *live)
    assert shown["lines"] == sum(each.lines for each in everyone)
    assert shown["bytes_in"] == sum(each.bytes_in for each in everyone)
    assert shown["bytes_out"] == sum(each.bytes_out for each in everyone)
    assert shown["connections"]["closed"] == {
        reason.value: [other for other, _ in closed].count(reason) for reason in CloseReason
    }


@given(closings, st.lists(carried, max_size=20), st.integers(0, 9))
def test_accepted_is_open_and_closed(
    closed: list[tuple[CloseReason, Carried]], live: list[Carried], rejected: int
) -> None:
    """Accepted = open + closed; a rejected client is in neither."""
    stats = new_stats()
    stats.accepted = len(closed) + len(live)
    stats.rejected["limit"] += rejected
    for reason, traffic in closed:
        stats.close(reason, traffic)
    connections = snapshot(stats, *live)["connections"]
    assert connections["open"] == len(live)
    assert connections["accepted"] == connections["open"] + sum(connections["closed"].values())
    assert connections["rejected"]["limit"] == rejected


def test_a_snapshot_does_not_change_and_changes_nothing() -> None:
    """A snapshot does not change afterwards, and taking one changes no counter."""
    stats = new_stats()
    before = snapshot(stats, Carried(1, 2, 3))
    assert before["lines"] == snapshot(stats, Carried(1, 2, 3))["lines"] == 1
    as_text = json.dumps(before)
    stats.accepted += 1
    stats.rejected["limit"] += 1
    stats.close(CloseReason.CLIENT, Carried(1, 2, 3))
    assert json.dumps(before) == as_text


@pytest.mark.parametrize("reason", [*CloseReason, *RejectReason])
def test_a_reason_is_restored_from_its_value(reason: EndReason) -> None:
    """A live upgrade passes the value on; one that this version does not know counts as drained."""
    assert end_reason(reason.value) is reason
    assert end_reason("unknown") is CloseReason.DRAINED


def test_what_others_count_is_passed_on() -> None:
    """A snapshot has the current gauges, reloads, generation and loop lag."""
    dropped = iter([7, 8])
    stats = new_stats(log_dropped=lambda: next(dropped))
    stats.reloads_applied, stats.reloads_refused, stats.reload_error = 2, 1, "no"
    stats.config_generation, stats.loop_lag_s = 3, 0.0123456
    shown = stats.snapshot("draining", [])
    assert shown["state"] == "draining"
    assert shown["reloads"] == {"applied": 2, "refused": 1, "last_error": "no"}
    assert (shown["log_dropped"], shown["config_generation"], shown["loop_lag_ms"]) == (7, 3, 12.346)
    assert snapshot(stats)["log_dropped"] == 8


def test_the_process() -> None:
    """The pid, version, uptime, memory and open files are real."""
    stats = new_stats(rss_bytes=limits.rss_bytes, open_files=limits.open_files)
    shown = snapshot(stats)
    assert (shown["pid"], shown["version"], shown["state"]) == (os.getpid(), __version__, "serving")
    assert 0 <= shown["uptime_s"] <= snapshot(stats)["uptime_s"]
    assert shown["rss_bytes"] > 1_000_000
    with open(os.devnull, "rb"), open(os.devnull, "rb"):
        assert snapshot(stats)["open_files"] == shown["open_files"] + 2
    assert snapshot(stats)["open_files"] == shown["open_files"]


def test_json() -> None:
    """A snapshot survives a round trip through JSON."""
    shown = snapshot(new_stats(), Carried(1, 2, 3))
    assert json.loads(json.dumps(shown)) == shown
