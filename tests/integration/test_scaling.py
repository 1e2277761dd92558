"""The settings that docs/scaling.md gives are sound, and fit each other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from echod.config.schema import Timeouts
from tests.support.daemon import clean_environment
from tests.system.balancer.haproxy import fenced
from tests.system.balancer.load import SILENT_S

GRACE = {"deployment.yaml": r"terminationGracePeriodSeconds: (\d+)", "compose.yaml": r"stop_grace_period: (\d+)s"}

SPARE_S = 0.3
"""A check may come late on a busy machine."""


@pytest.mark.parametrize("name", GRACE)
def test_lame_duck_and_drain_and_the_last_second_fit_the_grace(name: str) -> None:
    """Whoever stops it kills it only afterwards."""
    block = fenced(name)
    (lame_duck,) = re.findall(r'ECHOD_TIMEOUTS_LAME_DUCK\W+(?:value: ")?([\d.]+)"', block)
    (grace,) = re.findall(GRACE[name], block)
    assert float(lame_duck) + Timeouts().drain + 1 < float(grace)


def test_the_lame_duck_outlasts_the_checks() -> None:
    """An interval for each failure, a client as silent as those of the balancer suite, and some time to spare."""
    ((inter_ms, fall),) = re.findall(r"inter (\d+)ms fall (\d+)", fenced("/etc/haproxy/haproxy.cfg"))
    (lame_duck,) = re.findall(r"lame_duck = ([\d.]+)", fenced("/etc/echod/echod.toml"))
    assert float(lame_duck) > int(inter_ms) / 1000 * int(fall) + SILENT_S + SPARE_S


def test_the_configuration_of_the_page_is_sound(tmp_path: Path) -> None:
    """`echod check` takes it, with the addresses of an instance."""
    file = tmp_path / "echod.toml"
    file.write_text(fenced("/etc/echod/echod.toml"))
    drop_in = fenced("/etc/systemd/system/echod@.service.d/override.conf")
    (addresses,) = re.findall(r"^Environment=(.*)", drop_in, re.MULTILINE)
    environment = dict(setting.split("=") for setting in addresses.replace("%i", "2").split())
    command = [sys.executable, "-m", "echod", "check", "-c", str(file)]
    checked = subprocess.run(command, env=clean_environment() | environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert {'address = "127.0.0.1:8882"', 'listen = "127.0.0.1:8892"'} <= {
        line.partition(" #")[0].strip() for line in checked.stdout.splitlines()
    }
