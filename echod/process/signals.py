"""Signals as data: a table from signal to action, a thread that waits for signals, and the queue that it fills.

No handler is ever installed. The signals are blocked from the first statement of `__main__` on, so the kernel holds
them until the thread takes them with sigwaitinfo(2); nothing is lost while Python imports, while no loop runs yet or
while it is stuck. This module does not carry out any action.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum

from msgspec import Struct


class Action(Enum):
    """What a signal asks for."""

    STOP = "stop"
    RELOAD = "reload"
    DUMP_STATS = "dump stats"
    UPGRADE = "upgrade"


TABLE = {
    signal.SIGTERM: Action.STOP,
    signal.SIGINT: Action.STOP,
    signal.SIGHUP: Action.RELOAD,
    signal.SIGUSR1: Action.DUMP_STATS,
    signal.SIGUSR2: Action.UPGRADE,
}

_WAKE = signal.SIGRTMIN
"""Ends the waiting thread; private to it."""

_ALARM = signal.SIGALRM
"""Ends a wait that has a time limit."""

_SHORTEST_S = 0.001
"""A timer of 0 s would never expire."""


class SignalEvent(Struct, frozen=True):
    """What a signal asks for, its name without SIG, and who sent it (pid 0: the kernel, as for Ctrl-C)."""

    action: Action
    signal: str
    sender_pid: int

    @property
    def origin(self) -> dict[str, str | int]:
        """The signal and its sender's pid as fields of a log event; no pid if the kernel sent it, as for Ctrl-C."""
        return {"signal": self.signal} | ({"sender_pid": self.sender_pid} if self.sender_pid else {})


def event_of(name: str, sender_pid: int) -> SignalEvent | None:
    """Return the event of the signal with this name, without SIG; None if echod does not handle that signal."""
    number = getattr(signal, f"SIG{name}", None)
    return SignalEvent(TABLE[number], name, sender_pid) if number in TABLE else None


class SignalQueue:
    """A queue of events from the signal thread to the event loop.

    As in the kernel, an action that is already pending is not added again, so no sender can fill the queue. Only stops
    may be pending twice, because the second one means abort.
    """

    def __init__(self) -> None:
        self._events: list[SignalEvent] = []
        self._paused_until: dict[Action, float] = {}
        self._lock = threading.Lock()
        self._wake: Callable[[], object] | None = None

    def put(self, event: SignalEvent) -> None:
        """Add an event, unless the same action is already pending (two stops may be); callable from any thread."""
        most = 2 if event.action is Action.STOP else 1
        with self._lock:
            if sum(pending.action is event.action for pending in self._events) >= most:
                return
            self._events.append(event)
        wake = self._wake
        if wake:
            with suppress(RuntimeError):  # the loop is closed: nobody reads events any more
                wake()

    def take(self) -> list[SignalEvent]:
        """Remove and return all pending events."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def pause(self, action: Action, seconds: float) -> None:
        """Hold back events with this action for so many seconds; others overtake them. Call it in the event loop."""
        self._paused_until[action] = asyncio.get_running_loop().time() + seconds

    async def get(self) -> SignalEvent:
        """Wait for the next event, in order of arrival; only one reader at a time.

        First let the event loop run one full iteration, so that a flood of signals does not starve the clients.
        """
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        try:
            for _ in range(2):  # the first only finds readable sockets; the second lets them be read
                await asyncio.sleep(0)
            while True:
                arrived.clear()
                event, pause_s = self._next(loop.time())
                if event:
                    return event
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await arrived.wait()
        finally:
            self._wake = None

    def _next(self, now: float) -> tuple[SignalEvent | None, float | None]:
        """Take the first event that is not paused; if there is none, say after how many seconds there may be one."""
        with self._lock:
            for index, event in enumerate(self._events):
                if self._paused_until.get(event.action, 0.0) <= now:
                    return self._events.pop(index), None
            ends = [self._paused_until[event.action] for event in self._events]
        return None, min(ends) - now if ends else None


class Delivery:
    """The thread that hands each signal of TABLE to `deliver`; while it is paused, the kernel keeps the signals."""

    def __init__(self, deliver: Callable[[SignalEvent], object], seconds_left: Callable[[], float | None]) -> None:
        self._deliver = deliver
        self._seconds_left = seconds_left
        self._resume()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the signals to the kernel while the context is open."""
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
        """Stop accepting signals; later ones stay pending."""
        assert self._thread.ident is not None
        self._closing.set()
        if self._thread.is_alive():
            signal.pthread_kill(self._thread.ident, _WAKE)
            self._thread.join()


@contextmanager
def delivered(deliver: Callable[[SignalEvent], object], seconds_left: Callable[[], float | None]) -> Iterator[Delivery]:
    """Hand each signal of TABLE to `deliver`, from a thread of its own, as long as the context is open.

    The thread calls `seconds_left` after each signal, and again after the seconds that it returned (None: no limit). So
    it is called even if the rest of the process is stuck, and it may end the process. The signals stay blocked
    afterwards: later ones stay pending for the program that runs next in this process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {*TABLE, _WAKE, _ALARM})
    delivery = Delivery(deliver, seconds_left)
    try:
        yield delivery
    finally:
        delivery.close()


def stop_is_pending() -> bool:
    """Whether a signal to stop has arrived that the kernel still holds."""
    return any(TABLE.get(number) is Action.STOP for number in signal.sigpending())


def _wait(
    deliver: Callable[[SignalEvent], object], seconds_left: Callable[[], float | None], closing: threading.Event
) -> None:
    while True:
        left_s = seconds_left()
        # Not sigtimedwait: if it is interrupted and resumes only after its timeout, as with SIGSTOP and SIGCONT,
        # CPython 3.13 and earlier return uninitialized stack memory, which may hold the signal of the last call.
        signal.setitimer(signal.ITIMER_REAL, 0.0 if left_s is None else max(left_s, _SHORTEST_S))
        received = signal.sigwaitinfo({*TABLE, _WAKE, _ALARM})
        number = signal.Signals(received.si_signo)
        if number in TABLE:
            deliver(SignalEvent(TABLE[number], number.name.removeprefix("SIG"), received.si_pid))
        elif number == _WAKE and closing.is_set():  # otherwise another process sent it: keep waiting
            signal.setitimer(signal.ITIMER_REAL, 0.0)  # the timer would survive execve(2)
            return
