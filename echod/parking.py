"""Silent connections, ordered by when their idle timeout ends, so that nobody has to look at each of them meanwhile."""

import heapq
import math
from typing import Generic, Protocol, TypeVar

SLOT_S = 0.05
"""Connections whose timeouts end within the same slot are kept together."""

_NEVER = -1


class Parkable(Protocol):
    """A connection, as far as it concerns this module."""

    parked_until: float | None

    def park(self, until: float) -> None:
        """Be looked at no more until then, in seconds of the owner's clock."""


Parked = TypeVar("Parked", bound=Parkable)


class Parking(Generic[Parked]):
    """Sets of connections by slot of time: an operation costs the same however many connections there are."""

    def __init__(self) -> None:
        self._slots: dict[int, set[Parked]] = {}
        self._order: list[int] = []  # a heap of the slots that have a set

    def add(self, connection: Parked, due: float) -> None:
        """Keep the connection until `due`, in seconds of the owner's clock; math.inf is never."""
        connection.park(due)
        slot = _slot(due)
        if slot not in self._slots:
            self._slots[slot] = set()
            if slot != _NEVER:
                heapq.heappush(self._order, slot)
        self._slots[slot].add(connection)

    def discard(self, connection: Parked) -> None:
        """Keep it no more."""
        if connection.parked_until is not None and (slot := self._slots.get(_slot(connection.parked_until))):
            slot.discard(connection)

    def take_due(self, now: float) -> list[Parked]:
        """Those whose time is over; they are not kept any more."""
        due: list[Parked] = []
        while self._order and self._order[0] < _slot(now):
            due += self._slots.pop(heapq.heappop(self._order))
        return due

    def take_all(self) -> list[Parked]:
        """Everyone; nobody is kept any more."""
        everyone = [connection for slot in self._slots.values() for connection in slot]
        self._slots.clear()
        self._order.clear()
        return everyone


def _slot(moment: float) -> int:
    return _NEVER if moment == math.inf else int(moment / SLOT_S)
