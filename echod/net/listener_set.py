"""The listeners in force and those that are retiring: changed as a whole, paused and closed together."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec

from echod.net.listener import CLOSE_S, Acceptor, Listener, OnAccept, python_acceptor
from echod.net.sockets import BoundSocket, ListenerKey, ListenerSettings, Prepared
from echod.process.tasks import background_once

TELL_STARVED_S = 10.0
"""At most this often the owner hears that clients wait for want of descriptors or memory: each pause is only 0.2 s."""


class ListenerSet:
    """Hands the descriptor and address of each client that any of them accepts to `on_accept`, which must not raise."""

    def __init__(
        self, on_accept: OnAccept, on_starved: Callable[[OSError], None], acceptor: Acceptor = python_acceptor
    ) -> None:
        self._on_accept = on_accept
        self._on_starved = on_starved
        self._acceptor = acceptor
        self._starved_told_at = float("-inf")
        self._in_force: dict[ListenerKey, Listener] = {}
        self._retiring: dict[Listener, asyncio.Task[object]] = {}

    def __iter__(self) -> Iterator[Listener]:
        """All of them, the retiring ones too."""
        return iter((*self._in_force.values(), *self._retiring))

    @property
    def addresses(self) -> list[str]:
        """The addresses really listened on."""
        return [listener.address for listener in self._in_force.values()]

    @property
    def bound(self) -> dict[ListenerKey, BoundSocket]:
        """The sockets of the listeners in force."""
        return {key: listener.bound for key, listener in self._in_force.items()}

    @property
    def open_socket(self) -> socket.socket | None:
        """One that clients are accepted from now, and by nobody else: who shares a port can't tell who will answer."""
        listeners = (each for each in self._in_force.values() if each.is_accepting and not each.is_shared)
        return next((each.listening_socket for each in listeners), None)

    @property
    def are_retiring(self) -> bool:
        """Whether any is still on its way to being closed."""
        return bool(self._retiring)

    def apply(self, prepared: Prepared, bound_s: float) -> None:
        """Listen on the prepared sockets, and change the settings of the listeners that exist already.

        Listeners that are not in `prepared` retire within `bound_s` seconds; their settings stay as they are.
        Raises ListenError, and nothing has changed then.
        """
        with self.change(prepared, bound_s):
            pass

    @contextmanager
    def change(self, prepared: Prepared, bound_s: float) -> Iterator[None]:
        """Do what can fail in `apply` when the context is entered, and the rest when it ends.

        If the context ends with an error, nothing has changed. It must not span an iteration of the event loop, because
        new listeners would accept clients. Raises ListenError.
        """
        listeners = self._with_new(prepared)
        try:
            yield
        except BaseException:
            for key, listener in listeners.items():
                if listener is not self._in_force.get(key):
                    listener.close_now()
            raise
        for key in self._in_force.keys() - prepared.keys():
            self._retire(self._in_force[key], bound_s)
        for key, each in prepared.items():
            if isinstance(each, ListenerSettings):
                listeners[key].bound = msgspec.structs.replace(listeners[key].bound, settings=each)
        self._in_force = listeners

    def pause(self, reason: str) -> None:
        """Leave new clients in the backlogs until `resume`."""
        for listener in self:
            listener.pause(reason)

    def resume(self, reason: str) -> None:
        """Accept again what waits."""
        for listener in self:
            listener.resume(reason)

    async def retired(self) -> None:
        """Return when each listener that went away has served its backlog and is closed."""
        while self._retiring:
            await asyncio.wait(self._retiring.values())

    def close_now(self) -> None:
        """Close all; who is still in a backlog is reset."""
        for listener, closing in [*self._retiring.items()]:
            closing.cancel()
            listener.close_now()

    def _with_new(self, prepared: Prepared) -> dict[ListenerKey, Listener]:
        listeners: dict[ListenerKey, Listener] = {}
        with ExitStack() as undo:
            for key, each in prepared.items():
                if isinstance(each, BoundSocket):
                    listeners[key] = Listener(each, self._on_accept, self._starved, self._acceptor)
                    undo.callback(listeners[key].close_now)
                else:
                    listeners[key] = self._in_force[key]
            undo.pop_all()
        return listeners

    def _starved(self, error: OSError) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._starved_told_at >= TELL_STARVED_S:
            self._starved_told_at = now
            self._on_starved(error)

    def _retire(self, listener: Listener, bound_s: float) -> None:
        async def close() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(bound_s, 2 * CLOSE_S)):
                    await listener.close()

        def forget(_: object) -> None:  # a callback, for a task that is cancelled before its first step runs no finally
            listener.close_now()
            del self._retiring[listener]

        self._retiring[listener] = task = background_once(close, "close listener")
        task.add_done_callback(forget)
