"""Round trips without I/O: the texts, the check of replies, and the statistics."""

import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echod.client.probe import LETTERS, Tally, mismatch, text
from tests.support.reference import reference

SEQUENCES = st.integers(1, 10**12)
LONGEST = 1000
SIZES = st.integers(0, 300)


def reply(said: str) -> bytes:
    """The reply that the protocol promises, from the tests' own model."""
    return reference(said.encode() + b"\n", LONGEST, is_ended=False)


@given(SEQUENCES, SIZES)
def test_a_text_has_the_size_that_was_asked_for(sequence: int, size: int) -> None:
    """A text has the requested size, one line and nothing to strip, and its reply differs from it."""
    said = text(sequence, size)
    assert len(said.encode()) == size
    assert said == said.strip()
    assert "\n" not in said
    assert mismatch(said, reply(said)) is None
    assert size < 2 or mismatch(said, said.encode() + b"\n")


@pytest.mark.parametrize("record", ["15030100020246", "160303003a02000036"])
def test_a_tls_record_is_told_from_a_reply(record: str) -> None:
    """Both kinds that a TLS server sends first: an alert and a handshake message."""
    assert mismatch("a", bytes.fromhex(record)) == "the server speaks TLS: use --tls"


@given(SEQUENCES, st.integers(1, 300))
def test_no_two_texts_nearby_are_the_same(sequence: int, size: int) -> None:
    """The reply of a nearby round trip is detected as wrong, whatever the size is."""
    said = [text(sequence + ahead, size) for ahead in range(len(LETTERS) if size > 1 else 2)]
    assert len({line.upper() for line in said}) == len(said)
    assert all(mismatch(one, reply(other)) for one, other in pairwise(said))


def test_letters() -> None:
    """Texts contain letters of two bytes and one that becomes two letters; no two of them are adjacent."""
    assert LETTERS.upper() != LETTERS
    assert len("ß".upper()) == 2
    assert all(one.isascii() or other.isascii() for one, other in pairwise(LETTERS + LETTERS[0]))
    assert {len(letter.encode()) for letter in LETTERS} == {1, 2}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"HALLO WELT\n", None),
        (b"hallo welt\n", "wrong reply: 'hallo welt' instead of 'HALLO WELT'"),
        (b"HALLO\n", "wrong reply: 'HALLO' instead of 'HALLO WELT'"),
        (b"HALLO WELT\r\n", r"wrong reply: 'HALLO WELT\r' instead of 'HALLO WELT'"),
        (b"HALLO WELT\nHALLO WELT\n", "unexpected data after the reply: 'HALLO WELT'"),
        (b"ERROR too many connections\n", "error line: 'ERROR too many connections'"),
        (b"ERROR\n", "wrong reply: 'ERROR' instead of 'HALLO WELT'"),
        (b"\xff\x1b[2J\n", r"wrong reply: '\\xff\x1b[2J' instead of 'HALLO WELT'"),
        (b"x" * 10_000, f"wrong reply: '{'x' * 60}...' instead of 'HALLO WELT'"),
    ],
)
def test_errors(said: bytes, words: str | None) -> None:
    """A wrong reply is shown, shortened and printable."""
    assert mismatch("Hallo Welt", said) == words


def test_an_error_far_behind() -> None:
    """A long wrong reply is shown from near the first difference."""
    said = mismatch("a" * 1000, b"A" * 500 + b"b" + b"A" * 499 + b"\n")
    assert said == f"wrong reply: '{'A' * 15}b{'A' * 44}...' instead of '{'A' * 60}...', from byte 486 on"


@given(st.lists(st.none() | st.integers(0, 10**10), max_size=200))
def test_a_tally(times_ns: list[int | None]) -> None:
    """Counts and average are exact; percentiles are exact to four digits."""
    tally = Tally()
    for time_ns in times_ns:
        tally.add(time_ns)
    right = sorted(time_ns for time_ns in times_ns if time_ns is not None)
    assert (tally.total, tally.right) == (len(times_ns), len(right))
    assert tally.is_all_right == (0 < len(right) == len(times_ns))
    assert tally.loss_percent == pytest.approx(100 * times_ns.count(None) / len(times_ns) if times_ns else 0)
    found = tally.times_ms()
    if not right:
        assert found == {}
        return
    exact = {
        "min": right[0],
        "avg": statistics.fmean(right),
        "max": right[-1],
        "p50": right[-(-len(right) * 50 // 100) - 1],
        "p99": right[-(-len(right) * 99 // 100) - 1],
    }
    assert list(found) == list(exact)
    assert found == pytest.approx({name: time_ns / 1e6 for name, time_ns in exact.items()}, rel=0.0005, abs=0.0006)
    assert len(right) >= 100 or found["p99"] == found["max"]
    assert found["min"] <= found["p50"] <= found["p99"] <= found["max"]


def test_what_is_kept_has_a_bound() -> None:
    """The memory of a tally is bounded."""
    tally = Tally()
    for time_ns in range(1_000_000, 2_000_000, 3):
        tally.add(time_ns)
    assert tally.right > 100_000
    assert len(tally._times) <= 1001


def test_the_summary() -> None:
    """The summary is that of ping(8); without a correct reply there are no times."""
    tally = Tally()
    tally.add(None)
    expected = "\n--- a:1 echod ping statistics ---\n1 round trip, 0 answered correctly, 100% loss, time 12 ms"
    assert tally.as_text("a:1", 0.012) == expected
    assert tally.as_fields("a:1", 0.012)["time_ms"] is None
    for _ in range(2):
        tally.add(1_500_000)
    assert tally.as_text("a:1", 2).splitlines()[2:] == [
        "3 round trips, 2 answered correctly, 33.3333% loss, time 2000 ms",
        "round trip min/avg/max/p50/p99 = 1.500/1.500/1.500/1.500/1.500 ms",
    ]
