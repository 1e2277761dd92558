"""Clients behind a network with a delay."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.faults.delayed_network import CLIENTS
from tests.faults.measurements import Figures
from tests.support.daemon import DEADLINE_S, UNMEASURED, clean_environment

CAN_LAY_A_WIRE = os.geteuid() == 0 and os.path.exists("/dev/net/tun") and shutil.which("ip") and shutil.which("unshare")


@pytest.mark.skipif(not CAN_LAY_A_WIRE, reason="needs root, a TUN device, ip and unshare")
@pytest.mark.parametrize("round_trip_s", [0.02, 0.1, 0.3])
def test_a_stop_resets_no_client_behind_a_delay(round_trip_s: float, report: Callable[[Figures], None]) -> None:
    """A client whose handshake is in progress at the stop is served; later ones are refused; none is reset."""
    ended = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "tests.faults.delayed_network", str(round_trip_s / 2)],
        capture_output=True,
        timeout=2 * DEADLINE_S,
        env=clean_environment() | UNMEASURED,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    fares = json.loads(ended.stdout)
    report({"fault": f"a stop, clients {round_trip_s * 1000:.0f} ms away", **fares})
    assert fares.keys() == {"served", "refused"}
    assert sum(fares.values()) == CLIENTS
