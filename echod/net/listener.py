"""One listening socket in the event loop: accepts by hand, and stops without losing a client.

By hand, because the loop's own server resets what waits in the backlog when it closes, and libuv closes the whole
backlog without a word when descriptors run out. What becomes of an accepted socket is the owner's business.
"""

import asyncio
import errno
import socket
from collections.abc import Callable

from echod.net import sockets
from echod.net.sockets import BoundSocket, ListenerSettings, RawAddress

ACCEPT_BATCH = 64
"""Accepts in a row, before established connections get their turn."""

QUIET_S = 0.05
"""A closing listener that has had no new client for this long, and no handshake is under way, has none left."""

CLOSE_S = 0.5
"""A closing listener ends here: a handshake takes a round trip, but may never end, or a new one come each moment."""

STARVED_S = 0.2
"""Pause after an accept for which descriptors or memory were missing; the clients wait in the backlog."""

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
    """Hands the descriptor of each accepted client, and its address, to `on_accept`, which must not raise.

    Listens from the beginning on; making one raises ListenError if that can't be.
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
        self._loop.add_reader(self._socket, self._accept_some)

    @property
    def address(self) -> str:
        """The address really bound: with the port that the kernel chose for port 0."""
        return sockets.peer_name(self._socket.family, self._socket.getsockname())

    @property
    def listening_socket(self) -> socket.socket:
        """The socket that listens."""
        return self._socket

    @property
    def is_accepting(self) -> bool:
        """Whether it accepts clients now."""
        return self._is_open and not self._pauses

    @property
    def is_shared(self) -> bool:
        """Whether other processes may listen on the same port."""
        return self._socket.family != socket.AF_UNIX and bool(
            self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        )

    def pause(self, reason: str) -> None:
        """Leave new clients in the backlog, until `resume` for this reason and every other one."""
        self._pauses.add(reason)
        if self._is_open:
            self._loop.remove_reader(self._socket)

    def resume(self, reason: str) -> None:
        """Accept again, unless there is another reason not to."""
        self._pauses.discard(reason)
        if self._is_open and not self._pauses:
            self._loop.add_reader(self._socket, self._accept_some)

    async def close(self) -> None:
        """Accept every client whose handshake was complete or under way, then close; later ones are refused.

        One that a service manager holds too is left to it: later clients wait there for the next process.
        Takes CLOSE_S at most, not counting the time in which it is paused: what waits meanwhile would be reset.
        """
        self._is_closing = True
        if self.bound.is_inherited:
            self._leave()  # it is the service manager's too: none of its options is ours to change
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
        while self._is_open and (self._accept_some() or self._pauses):
            if self._pauses:
                await asyncio.sleep(QUIET_S)
        self.close_now()

    def _leave(self) -> None:
        """Accept who waits now, then close."""
        for _ in range(sockets.BACKLOG // ACCEPT_BATCH):  # no longer, for a storm of clients may never end
            if not (self._is_open and self._accept_some()):
                break
        self.close_now()

    def close_now(self) -> None:
        """Close; who is still in the backlog is reset."""
        if self._is_open:
            if self._retry:
                self._retry.cancel()
            self._loop.remove_reader(self._socket)
            self.bound.close()

    @property
    def _is_open(self) -> bool:
        return self._socket.fileno() >= 0

    def _accept_some(self) -> bool:
        """Accept at most a batch; return whether more may be waiting."""
        for _ in range(ACCEPT_BATCH):
            if self._pauses:
                return False
            try:
                accepted = self._accept()
            except OSError as error:
                return self._accept_failed(error)
            if accepted is None:
                return False
            if self._sets_no_delay:
                sockets.set_no_delay(accepted[0])
            if self._is_closing:
                self._last_client_at = self._loop.time()
                sockets.welcome(accepted[0], self._socket.family)
            self._on_accept(*accepted, self.bound.settings)
        return True

    def _accept_failed(self, error: OSError) -> bool:
        if error.errno in _STARVED:
            self.pause("starved")
            self._retry = self._loop.call_later(STARVED_S, self.resume, "starved")
            self._on_starved(error)
            return False
        if error.errno == errno.EINVAL:
            # A Unix listener that was shut down for reading: its queue is empty, and it would stay readable for ever.
            self.close_now()
            return False
        # What accept(2) calls network errors of the new connection: that client is gone, the next may not be.
        return True
