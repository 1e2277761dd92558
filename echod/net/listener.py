"""One listening socket in the event loop: accepts clients, and closes without losing one.

It calls accept(2) itself: the event loop's own server resets the clients in its backlog when it closes, and libuv
silently closes all of them when descriptors run out.
"""

import asyncio
import errno
import socket
from collections.abc import Callable

from echod.net import sockets
from echod.net.sockets import BoundSocket, ListenerSettings, RawAddress

ACCEPT_BATCH = 64
"""Clients accepted at once, before the event loop serves established connections."""

QUIET_S = 0.05
"""A closing listener is done if no client has arrived for this long and no handshake is under way."""

CLOSE_S = 0.5
"""The longest time that closing a listener takes: a handshake may never end, or new clients may keep arriving."""

STARVED_S = 0.2
"""The pause after an accept failed for lack of descriptors or memory; clients wait in the backlog."""

Accepted = tuple[int, RawAddress]
"""The non-blocking descriptor of an accepted client, which the caller has to close, and the client's address."""

OnAccept = Callable[[int, RawAddress, ListenerSettings], None]
"""Handles an accepted client: takes its descriptor, its address and the settings of its listener."""

Acceptor = Callable[[socket.socket], Callable[[], Accepted | None]]
"""Returns a function that accepts one client: None if the backlog is empty, OSError if accept(2) fails."""

_STARVED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def python_acceptor(listener: socket.socket) -> Callable[[], Accepted | None]:
    """Return a function that accepts one client: None if the backlog is empty, OSError if accept(2) fails."""

    def accept() -> Accepted | None:
        try:
            sock, peer = listener.accept()
        except (BlockingIOError, InterruptedError):
            return None
        sock.setblocking(False)
        return sock.detach(), peer

    return accept


class Listener:
    """Accepts clients and passes each to `on_accept`, which must not raise.

    Listens from its construction on, which raises ListenError.
    """

    def __init__(
        self,
        bound: BoundSocket,
        on_accept: OnAccept,
        on_starved: Callable[[OSError], None],
        acceptor: Acceptor = python_acceptor,
    ) -> None:
        self.bound = bound
        self._on_accept = on_accept
        self._socket = bound.socket
        self._on_starved = on_starved
        self._loop = asyncio.get_running_loop()
        self._pauses: set[str] = set()
        self._is_closing = False
        self._retry: asyncio.TimerHandle | None = None
        self._last_client_at = 0.0
        self._sets_no_delay = not sockets.pass_on_no_delay(bound)
        self._accept = acceptor(bound.socket)
        bound.listen()
        self._loop.add_reader(self._socket, self._accept_batch)

    @property
    def address(self) -> str:
        """The actual address, with the port that the kernel chose for port 0."""
        return sockets.peer_name(self._socket.family, self._socket.getsockname())

    @property
    def listening_socket(self) -> socket.socket:
        """The listening socket."""
        return self._socket

    @property
    def is_accepting(self) -> bool:
        """Whether it is open and not paused."""
        return self._is_open and not self._pauses

    @property
    def is_shared(self) -> bool:
        """Whether other processes may listen on the same port."""
        return sockets.is_port_shared(self._socket)

    def pause(self, reason: str) -> None:
        """Leave new clients in the backlog until `resume` is called for each reason."""
        self._pauses.add(reason)
        if self._is_open:
            self._loop.remove_reader(self._socket)

    def resume(self, reason: str) -> None:
        """Accept again, unless it is paused for another reason."""
        self._pauses.discard(reason)
        if self._is_open and not self._pauses:
            self._loop.add_reader(self._socket, self._accept_batch)

    async def close(self) -> None:
        """Accept every client whose handshake was complete or under way, then close; later ones are refused.

        Takes at most CLOSE_S, not counting pauses: closing during a pause would reset the clients in the backlog.
        An inherited socket is emptied once; later clients wait in it for the next process.
        """
        self._is_closing = True
        if self.bound.is_inherited:
            # The service manager uses the socket too, so its options are left alone. The number of batches is bounded,
            # because a flood of clients may never end.
            for _ in range(sockets.BACKLOG // ACCEPT_BATCH):
                if not (self._is_open and self._accept_batch()):
                    break
            self.close_now()
            return
        sockets.refuse_new_handshakes(self._socket)
        self._last_client_at = self._loop.time()
        left_s = CLOSE_S
        while self._is_open and left_s > 0:
            wait_s = QUIET_S if self._pauses else self._last_client_at + QUIET_S - self._loop.time()
            if wait_s <= 0:
                if not sockets.has_handshakes_under_way(self._socket):
                    break
                wait_s = QUIET_S
            await asyncio.sleep(min(wait_s, left_s))
            if self._pauses:
                self._last_client_at = self._loop.time()
            else:
                left_s -= wait_s
        while self._is_open and (self._accept_batch() or self._pauses):
            if self._pauses:
                await asyncio.sleep(QUIET_S)
        self.close_now()

    def close_now(self) -> None:
        """Close now; clients that are still in the backlog are reset."""
        if self._is_open:
            if self._retry:
                self._retry.cancel()
            self._loop.remove_reader(self._socket)
            self.bound.close()

    @property
    def _is_open(self) -> bool:
        return self._socket.fileno() >= 0

    def _accept_batch(self) -> bool:
        """Accept at most a batch; return whether more may be waiting."""
        for _ in range(ACCEPT_BATCH):
            if self._pauses:
                return False
            try:
                accepted = self._accept()
            except OSError as error:
                return self._on_accept_error(error)
            if accepted is None:
                return False
            if self._sets_no_delay:
                sockets.set_no_delay(accepted[0])
            if self._is_closing:
                self._last_client_at = self._loop.time()
                sockets.reset_inherited_options(accepted[0], self._socket.family)
            self._on_accept(*accepted, self.bound.settings)
        return True

    def _on_accept_error(self, error: OSError) -> bool:
        if error.errno in _STARVED:
            self.pause("starved")
            self._retry = self._loop.call_later(STARVED_S, self.resume, "starved")
            self._on_starved(error)
            return False
        if error.errno == errno.EINVAL:
            # A Unix listener that was shut down for reading: its backlog is empty, and it would stay readable forever.
            self.close_now()
            return False
        # A network error of the new connection (accept(2)): that client is gone, but others may be waiting.
        return True
