"""Run hypothesis on a target for some time: it knows the shape of inputs, and shrinks findings."""

import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import MOST_CUTS, TARGETS, pack
from tests.unit.test_echo import streams, texts

ROUND = settings(
    max_examples=200,  # between two looks at the clock
    deadline=None,
    derandomize=False,  # in CI too, or each round would try the same inputs
    database=None,
    suppress_health_check=[*HealthCheck],
)


def _inputs(name: str) -> st.SearchStrategy[bytes]:
    known = st.sampled_from([*TARGETS[name].words, *TARGETS[name].seeds])
    words = st.lists(known | st.binary(max_size=3), max_size=30).map(b"".join)
    if name != "protocol":
        return words
    lengths = st.lists(st.integers(0, 20) | st.integers(0, 255), max_size=MOST_CUTS - 1)
    one_line = texts.map(lambda text: f"{text}\n".encode())  # echod parses it itself
    return st.builds(pack, st.integers(1, 20) | st.integers(1, 256), lengths, streams | one_line | words)


def hunt(name: str, seconds: float) -> int:
    """Try inputs for this long, and return their number. Raises the error of the smallest failing input."""
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
