"""Signals as data: one table from signal to command, one thread that waits for them, one mailbox they end in.

No handler is ever installed. The signals are blocked from the first statement of `__main__` on, so the kernel holds
them until the thread takes them with sigwaitinfo(2); nothing is lost while Python imports, while no loop runs yet or
while it is stuck. What a command means is not known here.
"""

import asyncio
import signal
import threading
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

_ALARM = signal.SIGALRM
"""Ends a wait when its time is over."""

_SHORTEST_S = 0.001
"""A timer of 0 s would never end."""


class Order(Struct, frozen=True):
    """A command, the signal that brought it and who sent it (pid 0: the kernel, as for Ctrl-C)."""

    command: Command
    signal: str
    sender_pid: int

    @property
    def origin(self) -> dict[str, str | int]:
        """Which signal it was, and whose, as fields of a log event: the kernel, as for Ctrl-C, has no pid."""
        return {"signal": self.signal} | ({"sender_pid": self.sender_pid} if self.sender_pid else {})


def order(name: str, sender_pid: int) -> Order | None:
    """The order that a signal brings, by its name without SIG; None if it brings none."""
    number = getattr(signal, f"SIG{name}", None)
    return Order(TABLE[number], name, sender_pid) if number in TABLE else None


class Mailbox:
    """Carries orders from the signal thread to the event loop; they wait in it until the loop asks.

    As in the kernel, a command that waits already is not added again, so that no sender can fill it. Only stops are
    counted, up to two: the second one means more than the first.
    """

    def __init__(self) -> None:
        self._orders: list[Order] = []
        self._resting: dict[Command, float] = {}
        self._lock = threading.Lock()
        self._wake: Callable[[], object] | None = None

    def put(self, order: Order) -> None:
        """Add an order, unless as many of its kind wait as have a meaning; from any thread."""
        most = 2 if order.command is Command.STOP else 1
        with self._lock:
            if sum(waiting.command is order.command for waiting in self._orders) >= most:
                return
            self._orders.append(order)
        wake = self._wake
        if wake:
            with suppress(RuntimeError):  # the loop is closed: nobody reads orders any more
                wake()

    def take(self) -> list[Order]:
        """Every order that waits."""
        with self._lock:
            orders, self._orders = self._orders, []
        return orders

    def rest(self, command: Command, seconds: float) -> None:
        """Return the next order with this command only after so many seconds; others overtake it. From the loop."""
        self._resting[command] = asyncio.get_running_loop().time() + seconds

    async def get(self) -> Order:
        """The next order, in the order of arrival; for one reader at a time.

        A full turn of the event loop comes first: whoever sends signals without pause must not starve the clients.
        """
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        try:
            for _ in range(2):  # after the first, what is readable by now is only found, not read
                await asyncio.sleep(0)
            while True:
                arrived.clear()
                order, rest_s = self._next(loop.time())
                if order:
                    return order
                with suppress(TimeoutError):
                    async with asyncio.timeout(rest_s):
                        await arrived.wait()
        finally:
            self._wake = None

    def _next(self, now: float) -> tuple[Order | None, float | None]:
        """Take the first order whose command does not rest; if there is none, after how many seconds there may be."""
        with self._lock:
            for index, order in enumerate(self._orders):
                if self._resting.get(order.command, 0.0) <= now:
                    return self._orders.pop(index), None
            ends = [self._resting[order.command] for order in self._orders]
        return None, min(ends) - now if ends else None


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
    signal.pthread_sigmask(signal.SIG_BLOCK, {*TABLE, _WAKE, _ALARM})
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
        left_s = seconds_left()
        # Not sigtimedwait: interrupted, and resumed only after its timeout, as by SIGSTOP and SIGCONT, CPython 3.13 and
        # earlier return what the stack held before, be it the signal of the last call.
        signal.setitimer(signal.ITIMER_REAL, 0.0 if left_s is None else max(left_s, _SHORTEST_S))
        received = signal.sigwaitinfo({*TABLE, _WAKE, _ALARM})
        number = signal.Signals(received.si_signo)
        if number in TABLE:
            deliver(Order(TABLE[number], number.name.removeprefix("SIG"), received.si_pid))
        elif number == _WAKE and closing.is_set():  # else it is a stranger's signal, which must not make us deaf
            signal.setitimer(signal.ITIMER_REAL, 0.0)  # execve(2) would keep it
            return
