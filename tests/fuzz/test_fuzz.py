"""A short run of what `make fuzz` does for minutes."""

import pytest

from tests.fuzz.hunt import hunt
from tests.fuzz.targets import TARGETS

SECONDS = 2.0


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_pass(name: str) -> None:
    """The seeds of a long run pass."""
    for seed in TARGETS[name].seeds:
        TARGETS[name].check(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found_in_two_seconds(name: str) -> None:
    """Two seconds of random inputs find nothing."""
    assert hunt(name, SECONDS) > 100
