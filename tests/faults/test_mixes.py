"""Several kinds of attackers at once, chosen by a seed."""

from collections.abc import Callable

import pytest

from tests.faults.measurements import Figures
from tests.faults.mixes import drawn, play

ROUNDS = 2
SECONDS = 5.0


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", range(1, 1 + ROUNDS))
def test_clients_are_served_in_time_during_mixed_attacks(
    number: int, seed: str, report: Callable[[Figures], None], request: pytest.FixtureRequest
) -> None:
    """Clients, health checks, signals, the watchdog and a stop stay prompt, and memory stays bounded."""
    it = play(drawn(seed, number, 10.0 if request.config.getoption("--full") else SECONDS))
    report({"mix": str(it), **it.figures})
    assert not it.counted, f"{it}\n{it.outcome}"
