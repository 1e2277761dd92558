"""The health check is a round trip of a client."""

import time

from tests.support.report import Report
from tests.system.docker.conftest import Start

HEALTHY_S = 2
TRIES = 6
"""Attempts, because the machine may be busy; at the default interval none would be in time."""


def seconds_until_healthy(start: Start) -> float:
    """Return the time from `docker run` on."""
    began = time.monotonic()
    container = start(is_ready=False)
    container.wait_until(lambda: container.health == "healthy", "not healthy")
    return time.monotonic() - began


def test_it_is_healthy_within_two_seconds(start: Start, report: Report) -> None:
    """With the intervals of the image, it is healthy two seconds after `docker run`."""
    seconds = [seconds_until_healthy(start)]
    while seconds[-1] > HEALTHY_S and len(seconds) < TRIES:
        seconds.append(seconds_until_healthy(start))
    assert seconds[-1] <= HEALTHY_S, seconds
    report("5 health", healthy_s_after_docker_run=" ".join(f"{each:.2f}" for each in seconds))


def test_it_is_unhealthy_when_the_loop_is_stuck(start: Start, report: Report) -> None:
    """With process 1 stopped, the health check fails and reports the missing reply."""
    container = start("--health-interval", "1s")
    container.wait_until(lambda: container.health == "healthy", "not healthy")
    container.kill("STOP")
    began = time.monotonic()
    container.wait_until(lambda: container.health == "unhealthy", "still healthy")
    unhealthy_s = time.monotonic() - began
    said = container.state["Health"]["Log"][-1]
    assert said["ExitCode"] == 1
    assert "0 answered correctly" in said["Output"]
    container.kill("CONT")
    container.wait_until(lambda: container.health == "healthy", "not healthy again")
    container.stop()
    assert container.state["ExitCode"] == 0
    report(
        "5 health, loop stuck",
        unhealthy_after_s=f"{unhealthy_s:.1f} (asked every second, 3 in a row)",
        it_said=said["Output"].splitlines()[1],
        healthy_again="yes",
    )


def test_the_health_check_can_use_another_address(start: Start) -> None:
    """The health check can use another address, as docs/docker.md says."""
    there = ("--env", "ECHOD_LISTEN=0.0.0.0:7777", "--health-cmd", "echod ping -c 1 -W 1 127.0.0.1:7777")
    container = start(*there)
    container.wait_until(lambda: container.health == "healthy", "not healthy")
