"""Hypothesis aimed at a target for some time: it knows what inputs look like, and shrinks what it finds."""

import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import MOST_CUTS, TARGETS, pack
from tests.unit.test_echo import streams, texts

ROUND = settings(
    max_examples=200,  # then the clock is looked at
    deadline=None,
    derandomize=False,  # in CI too, or each round would try the same
    database=None,
    suppress_health_check=[*HealthCheck],
)


def _inputs(name: str) -> st.SearchStrategy[bytes]:
    known = st.sampled_from([*TARGETS[name].words, *TARGETS[name].seeds])
    words = st.lists(known | st.binary(max_size=3), max_size=30).map(b"".join)
    if name != "protocol":
        return words
    lengths = st.lists(st.integers(0, 20) | st.integers(0, 255), max_size=MOST_CUTS - 1)
    one_line = texts.map(lambda text: f"{text}\n".encode())  # echod has a way of its own for it
    return st.builds(pack, st.integers(1, 20) | st.integers(1, 256), lengths, streams | one_line | words)


def hunt(name: str, seconds: float) -> int:
    """Try inputs for that long; how many. Raises what the target raised for the smallest input that makes it."""
    tried = 0

    @ROUND
    @given(_inputs(name))
    def aim(data: bytes) -> None:
        nonlocal tried
        tried += 1
        TARGETS[name].check(data)

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        aim()
    return tried
