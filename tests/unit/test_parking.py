"""Silent connections, by when their idle timeout ends."""

import math

from echod.server.parking import SLOT_S, Parking


class Silent:
    """All that a parking place needs of a connection."""

    parked_until: float | None = None

    def park(self, until: float) -> None:
        self.parked_until = until


def test_each_is_due_when_its_time_is_over_and_not_before() -> None:
    """In whatever order they came; at most a slot late."""
    parking = Parking[Silent]()
    by_due = {due: Silent() for due in (7.0, 3.0, 5.0, 3.01, math.inf)}
    for due, connection in by_due.items():
        parking.add(connection, due)
    assert parking.take_due(3.0) == []
    assert set(parking.take_due(3.01 + SLOT_S)) == {by_due[3.0], by_due[3.01]}
    assert parking.take_due(4.9) == []
    assert set(parking.take_due(100.0)) == {by_due[5.0], by_due[7.0]}
    assert parking.take_due(1e12) == []
    assert parking.take_all() == [by_due[math.inf]]


def test_one_that_is_discarded_is_never_due() -> None:
    """Neither one that was parked nor one that wasn't is missed."""
    parking = Parking[Silent]()
    gone, there = Silent(), Silent()
    for connection in (gone, there):
        parking.add(connection, 1.0)
    parking.discard(gone)
    parking.discard(Silent())
    assert parking.take_due(2.0) == [there]
    parking.discard(there)
    assert parking.take_all() == []
