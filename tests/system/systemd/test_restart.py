"""`systemctl restart` under a stream of short connections, with and without the socket unit."""

import statistics
import time

import pytest

from tests.support.report import Report
from tests.system.systemd.machine import ADDRESS, Machine

ROUNDS = 20
CLIENTS = 8
PATIENCE_MS = 1000


@pytest.mark.parametrize("with_socket", [True, False], ids=["with the socket unit", "without"])
def test_20_restarts_under_a_stream_of_short_connections(machine: Machine, report: Report, with_socket: bool) -> None:
    """No client is reset; with the socket unit none is refused or delayed by a second either."""
    if with_socket:
        machine("systemctl", "start", "echod.socket")
    machine("systemctl", "start", "echod")
    took = []
    with machine.load("stream", ADDRESS, CLIENTS) as stream:
        assert stream.next() == "streaming"
        for _ in range(ROUNDS):
            began = time.monotonic()
            machine("systemctl", "restart", "echod")
            took.append(time.monotonic() - began)
        result = stream.finish()
    windows = result.pop("windows_ms")
    figures = {name: result[name] for name in ("served", "refused", "reset", "slowest_ms")}
    figures |= {"restart_ms": round(1000 * statistics.median(took)), "longest_restart_ms": round(1000 * max(took))}
    if windows:
        figures |= {"refusing_ms": statistics.median(windows), "refusing_at_most_ms": max(windows)}
    report(f"4 {ROUNDS} restarts {'with' if with_socket else 'without'} the socket unit", **figures)
    assert (result["reset"], result["complaints"]) == (0, [])
    assert result["served"] > 10 * ROUNDS
    if with_socket:
        assert result["refused"] == 0
        # On a machine so busy that a restart takes that long, the first client waits for all of it.
        assert result["slowest_ms"] < max(PATIENCE_MS, 1100 * max(took) + 300)
    else:
        assert result["refused"] > 0, "what the socket unit is for wasn't seen"
