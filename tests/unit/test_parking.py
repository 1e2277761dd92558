"""Parking: silent connections, ordered by the end of their idle timeout."""

import math

from echod.server.parking import SLOT_S, Parking


class Silent:
    """The part of a connection that `Parking` uses."""

    parked_until: float | None = None

    def park(self, until: float) -> None:
        self.parked_until = until


def test_connections_are_due_at_most_a_slot_late_and_never_early() -> None:
    """The order of their arrival does not matter."""
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


def test_a_discarded_connection_is_never_due() -> None:
    """Discarding one that is not parked does nothing."""
    parking = Parking[Silent]()
    gone, there = Silent(), Silent()
    for connection in (gone, there):
        parking.add(connection, 1.0)
    parking.discard(gone)
    parking.discard(Silent())
    assert parking.take_due(2.0) == [there]
    parking.discard(there)
    assert parking.take_all() == []
