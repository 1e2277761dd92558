"""When HAProxy's health checks notice a drain."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon import ask, connect, settings
from tests.support.report import Report
from tests.system.balancer.fleet import NAMES, Fleet, balanced, check_lines
from tests.system.balancer.haproxy import PROGRAM, fenced, replaced

LAME_DUCK_S = 3
LAME_DUCK = settings(timeouts_lame_duck=LAME_DUCK_S)


def test_haproxy_accepts_the_documented_configuration(tmp_path: Path) -> None:
    """HAProxy accepts the configuration of the page without a warning."""
    file = tmp_path / "haproxy.cfg"
    file.write_text(fenced("/etc/haproxy/haproxy.cfg"))
    checked = subprocess.run([str(PROGRAM), "-c", "-dW", "-f", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def by_tcp_check(fleet: Fleet) -> str:
    """Return the page's alternative health check of the admin port."""
    configuration = fleet.configuration()
    return replaced(configuration, {check_lines(configuration): fenced("instead of httpchk")})


@pytest.mark.parametrize(
    ("kind", "configuration", "code"), [("httpchk", Fleet.configuration, "503"), ("tcp-check", by_tcp_check, "")]
)
def test_a_check_of_readyz_fails_before_the_port_closes(
    tmp_path: Path, report: Report, kind: str, configuration: Callable[[Fleet], str], code: str
) -> None:
    """A draining instance is marked down while it still accepts clients."""
    down_ms = []
    with balanced(tmp_path, *LAME_DUCK, configuration=configuration) as (fleet, haproxy):
        for name in NAMES:
            began = fleet.leave(name)
            down_ms.append(round(1000 * (haproxy.wait_for(name, "DOWN", code) - began)))
            with connect(fleet.ports[name]) as client:
                assert ask(client, b"still there\n") == b"STILL THERE\n"
            assert not fleet[name].events_named("drain started")
    report(f"/readyz by {kind}, every 100 ms, fall 2: marked down", after_TERM=f"{down_ms} ms", lame_duck=LAME_DUCK_S)


def test_a_check_of_the_data_port_fails_too_late(tmp_path: Path, report: Report) -> None:
    """A check of the data port fails only after the port has closed."""
    down_ms = []
    with balanced(tmp_path, *LAME_DUCK, configuration=Fleet.on_data_ports) as (fleet, haproxy):
        for name in NAMES:
            began = fleet.leave(name)
            down_ms.append(round(1000 * (haproxy.wait_for(name, "DOWN") - began)))
            fleet[name].wait_for("drain started")
            with pytest.raises(ConnectionRefusedError):
                connect(fleet.ports[name])
    report("data port, every 100 ms, fall 2: marked down", after_TERM=f"{down_ms} ms", lame_duck=LAME_DUCK_S)
    assert min(down_ms) > 1000 * LAME_DUCK_S
