"""Admission: the limits, and which clients count as one address."""

import pytest

from echod.config.schema import Limits
from echod.server.admission import Admission
from echod.telemetry.reasons import RejectReason
from echod.telemetry.stats import Stats


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.2", False),
        ("::1", "::ffff:0:1", False),
        ("::1", "::1", True),
        (None, None, False),
    ],
)
def test_an_ipv4_client_of_a_dual_stack_listener_counts_by_its_ipv4_address(
    first: str | None, second: str | None, is_same: bool
) -> None:
    """The listener does not matter; clients of Unix sockets have no address to limit."""
    admission = Admission(Stats({}), 1024)
    limits = Limits(connections_per_address=1)
    assert admission.check(first, 0, limits) is None
    admission.admit(first)
    reason = admission.check(second, 1, limits)
    assert bool(reason) is is_same
    admission.release(first)
    assert admission.check(second, 0, limits) is None


def test_the_global_limit_comes_first() -> None:
    """If both limits are reached, the error names the global one, which the client cannot avoid."""
    admission = Admission(Stats({}), 1024)
    admission.admit("192.0.2.1")
    assert admission.check("192.0.2.1", 1, Limits(connections=1, connections_per_address=1)) is RejectReason.LIMIT
