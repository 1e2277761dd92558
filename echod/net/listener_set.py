"""The listeners in force and those that are retiring, which are changed, paused and closed together."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec

from echod.net.listener import CLOSE_S, Acceptor, Listener, OnAccept, python_acceptor
from echod.net.sockets import BoundSocket, ListenerKey, ListenerSettings, Prepared
from echod.process.tasks import background_once

STARVED_INTERVAL_S = 10.0
"""The shortest time between two calls of `on_starved`; a pause for lack of descriptors or memory takes only 0.2 s."""


class ListenerSet:
    """Listens on a set of sockets and passes each accepted client to `on_accept`, which must not raise."""

    def __init__(
        self, on_accept: OnAccept, on_starved: Callable[[OSError], None], acceptor: Acceptor = python_acceptor
    ) -> None:
        self._on_accept = on_accept
        self._on_starved = on_starved
        self._acceptor = acceptor
        self._starved_at = float("-inf")
        self._in_force: dict[ListenerKey, Listener] = {}
        self._retiring: dict[Listener, asyncio.Task[object]] = {}

    def __iter__(self) -> Iterator[Listener]:
        """All listeners, including those that are retiring."""
        return iter((*self._in_force.values(), *self._retiring))

    @property
    def addresses(self) -> list[str]:
        """The actual addresses of the listeners in force."""
        return [listener.address for listener in self._in_force.values()]

    @property
    def bound(self) -> dict[ListenerKey, BoundSocket]:
        """The sockets of the listeners in force."""
        return {key: listener.bound for key, listener in self._in_force.items()}

    @property
    def open_socket(self) -> socket.socket | None:
        """The first socket that accepts clients now and that no other process may answer for; None if there is none."""
        listeners = (each for each in self._in_force.values() if each.is_accepting and not each.is_shared)
        return next((each.listening_socket for each in listeners), None)

    @property
    def are_retiring(self) -> bool:
        """Whether any removed listener is still accepting its backlog."""
        return bool(self._retiring)

    def apply(self, prepared: Prepared, deadline_s: float) -> None:
        """Listen on the prepared sockets, and change the settings of the listeners that exist already.

        Listeners that are not in `prepared` retire within `deadline_s` seconds; their settings stay as they are.
        Raises ListenError, and nothing has changed then.
        """
        with self.change(prepared, deadline_s):
            pass

    @contextmanager
    def change(self, prepared: Prepared, deadline_s: float) -> Iterator[None]:
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
            self._retire(self._in_force[key], deadline_s)
        for key, each in prepared.items():
            if isinstance(each, ListenerSettings):
                listeners[key].bound = msgspec.structs.replace(listeners[key].bound, settings=each)
        self._in_force = listeners

    def pause(self, reason: str) -> None:
        """Leave new clients in the backlogs until `resume` is called for this reason."""
        for listener in self:
            listener.pause(reason)

    def resume(self, reason: str) -> None:
        """Accept clients again."""
        for listener in self:
            listener.resume(reason)

    async def retired(self) -> None:
        """Return when every removed listener has accepted its backlog and is closed."""
        while self._retiring:
            await asyncio.wait(self._retiring.values())

    def close_now(self) -> None:
        """Close the retiring listeners now; clients that are still in a backlog are reset."""
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
        if now - self._starved_at >= STARVED_INTERVAL_S:
            self._starved_at = now
            self._on_starved(error)

    def _retire(self, listener: Listener, deadline_s: float) -> None:
        async def close() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(deadline_s, 2 * CLOSE_S)):
                    await listener.close()

        def forget(_: object) -> None:  # a callback: a task that is cancelled before it starts runs no `finally`
            listener.close_now()
            del self._retiring[listener]

        self._retiring[listener] = task = background_once(close, "close listener")
        task.add_done_callback(forget)
