"""Silent connections, ordered by the end of their idle timeout, so that the sweep need not visit each of them."""

import heapq
import math
from typing import Generic, Protocol, TypeVar

SLOT_S = 0.05
"""Width of a time slot: connections whose timeouts end in the same slot share one set."""

_NEVER = -1


class Parkable(Protocol):
    """The part of a connection that this module uses."""

    parked_until: float | None

    def park(self, until: float) -> None:
        """Suspend regular sampling until then, in seconds of the owner's clock."""


Parked = TypeVar("Parked", bound=Parkable)


class Parking(Generic[Parked]):
    """Sets of connections by time slot; adding and discarding take the same time however many there are."""

    def __init__(self) -> None:
        self._slots: dict[int, set[Parked]] = {}
        self._order: list[int] = []  # a heap of the slots that have a set

    def add(self, connection: Parked, due: float) -> None:
        """Park the connection until `due`, in seconds of the owner's clock; math.inf means without a timeout."""
        connection.park(due)
        slot = _slot(due)
        if slot not in self._slots:
            self._slots[slot] = set()
            if slot != _NEVER:
                heapq.heappush(self._order, slot)
        self._slots[slot].add(connection)

    def discard(self, connection: Parked) -> None:
        """Remove the connection, if it is parked here."""
        if connection.parked_until is not None and (slot := self._slots.get(_slot(connection.parked_until))):
            slot.discard(connection)

    def take_due(self, now: float) -> list[Parked]:
        """Remove and return the connections whose idle timeout has ended."""
        due: list[Parked] = []
        while self._order and self._order[0] < _slot(now):
            due += self._slots.pop(heapq.heappop(self._order))
        return due

    def take_all(self) -> list[Parked]:
        """Remove and return all connections."""
        everyone = [connection for slot in self._slots.values() for connection in slot]
        self._slots.clear()
        self._order.clear()
        return everyone


def _slot(moment: float) -> int:
    return _NEVER if moment == math.inf else int(moment / SLOT_S)
