"""A live upgrade behind HAProxy, under load."""

import signal
from pathlib import Path

from tests.support.report import Report
from tests.system.balancer.fleet import NAMES, balanced
from tests.system.balancer.load import coming


def test_an_upgrade_goes_unnoticed_by_the_balancer(tmp_path: Path, report: Report) -> None:
    """No client and no health check fails during an upgrade."""
    gaps_ms = []
    with balanced(tmp_path) as (fleet, haproxy), coming(fleet.port) as load:
        for name in NAMES:
            fleet[name].send(signal.SIGUSR2)
            gaps_ms.append(round(fleet[name].wait_for("upgrade done")["gap_ms"]))
        servers = haproxy.servers()
    report(
        "live upgrade of all three",
        served=load.served,
        failed=load.failures(),
        slowest_from_line_to_reply=f"{load.slowest_ms} ms",
        gaps=f"{gaps_ms} ms",
    )
    assert load.failures() == 0, load.failed
    assert load.served > 0
    assert [servers[name]["chkdown"] for name in NAMES] == ["0", "0", "0"]
