"""A rolling restart behind HAProxy, under load."""

from pathlib import Path

from tests.support.daemon import settings
from tests.support.report import Report
from tests.system.balancer.fleet import NAMES, Fleet, balanced
from tests.system.balancer.haproxy import HAProxy
from tests.system.balancer.load import SILENT_S, WRONG, Load, coming

ROUNDS = 5
ROUNDS_WITHOUT = 3


def restart_all(fleet: Fleet, haproxy: HAProxy) -> None:
    """Restart one after the other, each once HAProxy sees the previous one up."""
    for name in NAMES:
        fleet.restart(name)
        haproxy.wait_for(name, "UP")


def figures(load: Load, rounds: int) -> dict[str, object]:
    return {
        "restarts": rounds * len(NAMES),
        "served": load.served,
        f"of_them_silent_for_{SILENT_S}_s": load.silent,
        "failed": load.failures(),
        "slowest_from_line_to_reply": f"{load.slowest_ms} ms",
    }


def test_a_rolling_restart_loses_no_client(tmp_path: Path, report: Report) -> None:
    """Every client is answered, although HAProxy retries nothing and every second client is silent at first."""
    with balanced(tmp_path) as (fleet, haproxy), coming(fleet.port) as load:
        for _ in range(ROUNDS):
            restart_all(fleet, haproxy)
    report("rolling restart, lame_duck of docs/scaling.md", **figures(load, ROUNDS))
    assert load.failures() == 0, load.failed
    assert min(load.served - load.silent, load.silent) > 100
    assert load.slowest_ms < 900  # no SYN was lost and retransmitted after a second


def test_without_a_lame_duck_some_clients_fail(tmp_path: Path, report: Report) -> None:
    """Without a lame duck some clients fail, but none gets a wrong reply."""
    with balanced(tmp_path, *settings(timeouts_lame_duck=0)) as (fleet, haproxy), coming(fleet.port) as load:
        for _ in range(ROUNDS_WITHOUT):
            restart_all(fleet, haproxy)
    report("rolling restart, lame_duck 0", **figures(load, ROUNDS_WITHOUT), how=dict(load.failed))
    assert load.served > 100
    assert not [failure for failure in load.failed if WRONG in failure]
