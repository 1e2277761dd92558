"""Signals as data: one table from signal to command, one thread that waits for them, one mailbox they end in.

No handler is ever installed. The signals are blocked from the first statement of `__main__` on, so the kernel holds
them until the thread takes them with sigwaitinfo(2); nothing is lost while Python imports, while no loop runs yet or
while it is stuck. What a command means is not known here.
"""

import asyncio
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum

from msgspec import Struct


class Command(Enum):
    """What a signal asks for."""

    STOP = "stop"
    RELOAD = "reload"
    DUMP_STATS = "dump stats"
    UPGRADE = "upgrade"


TABLE = {
    signal.SIGTERM: Command.STOP,
    signal.SIGINT: Command.STOP,
    signal.SIGHUP: Command.RELOAD,
    signal.SIGUSR1: Command.DUMP_STATS,
    signal.SIGUSR2: Command.UPGRADE,
}

_WAKE = signal.SIGRTMIN
"""Private to the waiting thread: ends it without a poll."""


class Order(Struct, frozen=True):
    """A command, the signal that brought it and who sent it (pid 0: the kernel, as for Ctrl-C)."""

    command: Command
    signal: str
    sender_pid: int


def order(name: str, sender_pid: int) -> Order | None:
    """The order that a signal brings, by its name without SIG; None if it brings none."""
    number = getattr(signal, f"SIG{name}", None)
    return Order(TABLE[number], name, sender_pid) if number in TABLE else None


class Mailbox:
    """Carries orders from the signal thread to the event loop; they wait in it until the loop asks."""

    def __init__(self) -> None:
        self._orders: deque[Order] = deque()
        self._wake: Callable[[], object] | None = None

    def put(self, order: Order) -> None:
        """Add an order; from any thread."""
        self._orders.append(order)
        wake = self._wake
        if wake:
            with suppress(RuntimeError):  # the loop is closed: nobody reads orders any more
                wake()

    def take(self) -> list[Order]:
        """Every order that waits."""
        orders = [*self._orders]
        self._orders.clear()
        return orders

    async def get(self) -> Order:
        """The next order, in the order of arrival; for one reader at a time."""
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        try:
            while not self._orders:
                await arrived.wait()
                arrived.clear()
        finally:
            self._wake = None
        return self._orders.popleft()


class Delivery:
    """The thread that hands each signal of TABLE to `deliver`, with pauses in which the kernel keeps them."""

    def __init__(self, deliver: Callable[[Order], object], seconds_left: Callable[[], float | None]) -> None:
        self._deliver = deliver
        self._seconds_left = seconds_left
        self._resume()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take no signal as long as the context is open."""
        self.close()
        try:
            yield
        finally:
            self._resume()

    def _resume(self) -> None:
        self._closing = threading.Event()
        arguments = (self._deliver, self._seconds_left, self._closing)
        self._thread = threading.Thread(target=_wait, args=arguments, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no signal any more: what arrives is left pending."""
        assert self._thread.ident is not None
        self._closing.set()
        if self._thread.is_alive():
            signal.pthread_kill(self._thread.ident, _WAKE)
            self._thread.join()


@contextmanager
def delivered(deliver: Callable[[Order], object], seconds_left: Callable[[], float | None]) -> Iterator[Delivery]:
    """Hand each signal of TABLE to `deliver`, from a thread of its own, as long as the context is open.

    `seconds_left` is asked after each signal, and again when the seconds that it told are over; None is no limit. So
    it is called in that thread even when the rest of the process is stuck, and may end the process. The signals stay
    blocked afterwards: what arrives then is left pending, for whoever runs next in this process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {*TABLE, _WAKE})
    delivery = Delivery(deliver, seconds_left)
    try:
        yield delivery
    finally:
        delivery.close()


def stop_is_pending() -> bool:
    """Whether a signal to stop has arrived that the kernel still holds."""
    return any(TABLE.get(number) is Command.STOP for number in signal.sigpending())


def _wait(
    deliver: Callable[[Order], object], seconds_left: Callable[[], float | None], closing: threading.Event
) -> None:
    while True:
        received = _next_signal(seconds_left())
        if received is None:
            continue
        if received.si_signo != _WAKE:
            number = signal.Signals(received.si_signo)
            deliver(Order(TABLE[number], number.name.removeprefix("SIG"), received.si_pid))
        elif closing.is_set():  # else it is a stranger's signal, which must not make us deaf
            return


def _next_signal(timeout_s: float | None) -> signal.struct_siginfo | None:
    awaited = {*TABLE, _WAKE}
    return signal.sigwaitinfo(awaited) if timeout_s is None else signal.sigtimedwait(awaited, max(0.0, timeout_s))
