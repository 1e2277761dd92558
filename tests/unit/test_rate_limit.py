"""The rate limit for new connections of one address."""

import sys

from hypothesis import given
from hypothesis import strategies as st

from echod.server.rate_limit import MOST_ADDRESSES, RateLimit


def test_a_burst_of_one_second_s_worth_is_admitted_and_then_the_rate() -> None:
    limit = RateLimit()
    assert [limit.admits("192.0.2.1", 5, 100.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert [limit.admits("192.0.2.1", 5, 100.2), limit.admits("192.0.2.1", 5, 100.2)] == [True, False]
    assert [limit.admits("192.0.2.1", 5, 102.0) for _ in range(6)] == [True] * 5 + [False]


def test_addresses_are_counted_apart_and_ipv6_by_its_network() -> None:
    limit = RateLimit()
    assert limit.admits("192.0.2.1", 1, 0.0)
    assert limit.admits("192.0.2.2", 1, 0.0)
    assert not limit.admits("::ffff:192.0.2.1", 1, 0.0)
    assert limit.admits("2001:db8::1", 1, 0.0)
    assert not limit.admits("2001:db8::2", 1, 0.0)
    assert limit.admits("2001:db8:0:1::1", 1, 0.0)


@given(st.lists(st.floats(0, 0.5)), st.integers(1, 20))
def test_never_more_than_two_seconds_worth_in_one_second(pauses: list[float], rate: int) -> None:
    """In any second an address gets at most the burst and what the rate adds within it."""
    limit, now, admitted = RateLimit(), 1000.0, []
    for pause in pauses * 3:
        now += pause
        if limit.admits("192.0.2.1", rate, now):
            admitted.append(now)
    for start in admitted:
        assert sum(start <= moment < start + 1 for moment in admitted) <= 2 * rate


def test_a_million_addresses_take_no_more_memory_than_documented(full: bool) -> None:
    limit = RateLimit()
    for number in range(1_000_000 if full else 100_000):
        limit.admits(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 5, 0.0)
    assert MOST_ADDRESSES // 2 <= len(limit) <= MOST_ADDRESSES
    assert (
        sys.getsizeof(limit._recent)
        + sys.getsizeof(limit._older)
        + len(limit) * (sys.getsizeof(b"1234") + sys.getsizeof(1.0))
        < 3_000_000
    )


def test_idle_addresses_are_forgotten() -> None:
    limit = RateLimit()
    for number in range(10):
        limit.admits(f"192.0.2.{number}", 10, 0.0)
    limit.forget_idle(0.5)
    assert limit.admits("192.0.2.99", 1, 0.9)
    limit.forget_idle(1.1)
    assert not limit.admits("192.0.2.99", 1, 1.2)
    limit.forget_idle(2.2)
    limit.forget_idle(3.3)
    assert len(limit) == 0
