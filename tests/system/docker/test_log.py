"""A stuck reader of the log does not stop the echo."""

import json
import os
import signal
import statistics
import subprocess
import time
from http.client import HTTPConnection
from typing import Any

from tests.support.daemon import DEADLINE_S
from tests.support.report import Report
from tests.system.docker.engine import Container, Engine

ADMIN_PORT = 8889
ROUND_TRIPS = 2000
SLOW_S = 0.5


def stats(container: Container) -> dict[str, Any]:
    """Return the statistics from the admin endpoint, which needs no log."""
    connection = HTTPConnection(container.host, ADMIN_PORT, timeout=DEADLINE_S)
    connection.request("GET", "/stats")
    found: dict[str, Any] = json.load(connection.getresponse())
    connection.close()
    return found


def _fill_the_log(container: Container) -> int:
    """Make short connections until log events are lost; return the number of connections."""
    count = 0
    end = time.monotonic() + 3 * DEADLINE_S
    while not stats(container)["log_dropped"]:
        assert time.monotonic() < end, "the log never blocked"
        for _ in range(500):
            with container.connect() as client:
                client.sendall(b"x\n")
                assert client.recv(10) == b"X\n"
            count += 1
    return count


def _round_trips(container: Container) -> list[float]:
    """Return the durations of round trips over one connection, in seconds."""
    seconds = []
    with container.connect() as client:
        for _ in range(ROUND_TRIPS):
            began = time.monotonic()
            client.sendall(b"still there?\n")
            assert client.recv(100) == b"STILL THERE?\n"
            seconds.append(time.monotonic() - began)
    return sorted(seconds)


def test_a_log_reader_that_has_stopped_does_not_stop_the_echo(engine: Engine, image: str, report: Report) -> None:
    """With the client of an attached `docker run` stopped, the pipe of the log fills up, and echod serves on."""
    name = f"echod-log-{os.getpid()}"
    options = ("--name", name, "--label", engine.label, "--env", f"ECHOD_ADMIN_LISTEN=0.0.0.0:{ADMIN_PORT}")
    reader = subprocess.Popen(["docker", "run", *options, image], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    container = Container(engine, name)
    try:
        container.wait_until(lambda: engine.run("inspect", name).returncode == 0, "not started")
        container.wait_for("ready")
        before = _round_trips(container)
        reader.send_signal(signal.SIGSTOP)
        connections = _fill_the_log(container)
        during = _round_trips(container)
        dropped = stats(container)["log_dropped"]
    finally:
        reader.send_signal(signal.SIGCONT)  # first, because an engine can hang on it
    seconds = container.stop()
    assert reader.wait(DEADLINE_S) == 0
    engine("rm", name)
    assert during[-1] < SLOW_S
    report(
        "6 log reader stopped",
        connections_until_the_log_was_full=connections,
        lines_of_log_lost=dropped,
        median_us_before=round(1e6 * statistics.median(before)),
        median_us_during=round(1e6 * statistics.median(during)),
        slowest_ms_during=f"{1000 * during[-1]:.1f}",
        then_stopped_with_0_in_s=f"{seconds:.1f}",
    )
