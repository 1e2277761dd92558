"""The program that may take this one's place: how it is started, what it is left, and the moment of the change.

In that moment nothing else happens: no turn of the event loop, no signal taken from the kernel, no log line unwritten
if its reader reads. So there is nothing to undo but a flag of some descriptors if the change fails.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from msgspec import Struct
from msgspec.structs import replace

from echod.process.signals import Delivery, SignalEvent, SignalQueue
from echod.server.state import ConnectionState
from echod.telemetry.log_writer import LogWriter
from echod.upgrade import preflight, state_file
from echod.upgrade.state_file import Process, Service, State

FLUSH_S = 0.2
"""How long clients may wait for a log reader that is behind; what it hasn't taken then is lost, and counted."""


def command_line(
    original: Sequence[str], arguments: Sequence[str], interpreter: str, directory: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How to start what is installed now as this program was started: the command, and its `arguments`.

    `original` is sys.orig_argv. A script is run by itself, for its first line names the interpreter that it is
    installed for. A module is looked for without regard to the current directory, which could hold anything.
    """
    head = original[: len(original) - len(arguments)]
    script = os.path.join(directory, head[-1])
    if head[-2:-1] == ["-m"] or not os.path.isfile(script):
        flags = [flag for flag in head[1:-2] if flag != "-P"]  # of the upgrade before
        return (interpreter, *flags, "-P", "-m", "echod"), tuple(arguments)
    is_by_itself = len(head) == 2 and os.access(script, os.X_OK)
    return ((script,) if is_by_itself else (interpreter, *head[1:-1], script)), tuple(arguments)


class Moment(Struct, frozen=True):
    """What has to stand still in the moment of the change."""

    delivery: Delivery
    signal_queue: SignalQueue
    sink: LogWriter


class Replacement(Struct, frozen=True):
    """Proves itself in a child, and then takes this program's place."""

    command: tuple[str, ...]
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    belongings: Process
    """What the process has, whichever program runs in it."""
    moment: Moment
    execute: Callable[[str, Sequence[str], Mapping[str, str]], object]
    """os.execve."""

    async def prove(self, service: Service) -> str:
        """What it says of itself once it has done everything but serve; raises PreflightError."""
        state = state_file.save(State(self.belongings, service))
        try:
            command = (*self.command, "preflight", *self.arguments)
            # No listener and no lock: should we be killed, a child that hangs would keep them.
            return await preflight.prove(command, self._told(state), [state])
        finally:
            os.close(state)

    def replace(
        self,
        service: Service,
        clients: Iterable[ConnectionState],
        descriptors: Collection[int],
        more: Sequence[SignalEvent] = (),
    ) -> None:
        """Give it the clients, on these descriptors, the orders that wait, and `more`; doesn't return.

        Raises OSError if it can't be executed, and nothing has changed then.
        """
        left_at = time.monotonic()
        with self.moment.delivery.paused():
            orders = self.moment.signal_queue.take()
            try:
                lost = self.moment.sink.flush(FLUSH_S) + self.moment.sink.dropped
                left = replace(
                    self.belongings,
                    left_at=left_at,
                    orders=[(order.signal, order.sender_pid) for order in (*orders, *more)],
                    log_dropped=self.belongings.log_dropped + lost,
                )
                self._execute(State(left, service), clients, descriptors)
            finally:
                for order in orders:
                    self.moment.signal_queue.put(order)

    def _execute(self, state: State, clients: Iterable[ConnectionState], descriptors: Collection[int]) -> None:
        saved = state_file.save(state, clients)
        try:
            with _inherited({saved, *descriptors, *_listening(state.service), *_held(state.process)}):
                self.execute(self.command[0], (*self.command, *self.arguments), self._told(saved))
        finally:
            os.close(saved)

    def _told(self, state: int) -> dict[str, str]:
        return {**self.environment, state_file.VARIABLE: str(state)}


def _listening(service: Service) -> list[int]:
    return [each.descriptor for each in (*service.listeners, *service.admin)]


def _held(process: Process) -> list[int]:
    return [descriptor for _, descriptor in (*process.inherited, *([process.pidfile] if process.pidfile else []))]


@contextmanager
def _inherited(descriptors: Collection[int]) -> Iterator[None]:
    try:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        yield
    finally:
        for descriptor in descriptors:
            with suppress(OSError):
                os.set_inheritable(descriptor, False)
