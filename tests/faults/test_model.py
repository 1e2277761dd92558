"""A running daemon compared with its model in any order of steps, see model.py."""

from collections.abc import Callable

import hypothesis
import pytest

from tests.faults.measurements import Figures
from tests.faults.model import STEPS, explore

SECONDS = 40.0
FULL_S = 60.0


@pytest.mark.timeout(300)
def test_a_daemon_agrees_with_its_model_in_any_order_of_steps(
    seed: str, report: Callable[[Figures], None], request: pytest.FixtureRequest
) -> None:
    """After every step every reply and every count agrees with the model."""
    seconds = FULL_S if request.config.getoption("--full") else SECONDS
    examples = explore(seconds, seed, [hypothesis.Phase.generate])  # `python -m tests.faults.model` shortens the steps
    report({"model": f"{examples} orders of {STEPS} steps"})
