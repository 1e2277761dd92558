"""Clients of a balancer, from the accept until their PROXY header has named their address.

Reads exactly the header and leaves everything after it in the kernel, for the connection. Owns the sockets meanwhile;
whether a client is admitted is decided elsewhere.
"""

import asyncio
import socket
from collections.abc import Callable, Iterator

from echod.net.sockets import RawAddress
from echod.protocol import proxy_header
from echod.protocol.proxy_header import ProxyError
from echod.server.arrival import Arrival

HEADER_S = 5.0
"""The time within which the header must be complete; a balancer sends it at once."""


class ProxyHandshake:
    """One client whose PROXY header is not complete yet.

    `on_end` is called once: with the client's address, None if the header names none, or the error in the header.
    """

    __slots__ = ("_on_end", "_timer", "arrival", "began_at", "header", "sock")

    def __init__(
        self,
        arrival: Arrival,
        began_at: float,
        header: bytes,
        on_end: Callable[["ProxyHandshake", RawAddress | ProxyError | None], None],
    ) -> None:
        self.arrival = arrival
        self.sock = socket.socket(fileno=arrival.descriptor)
        self.sock.setblocking(False)
        self.began_at = began_at
        self.header = header
        """The part of the header that has been read."""
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Read what has arrived, usually the whole header, and wait for the rest."""
        if not self._read():
            loop = asyncio.get_running_loop()
            loop.add_reader(self.sock, self._read)
            self._timer = loop.call_at(self.began_at + HEADER_S, self._time_out)

    def pause(self) -> None:
        """Read nothing until `resume` is called."""
        self._stop_waiting()

    def resume(self) -> None:
        """Go on after a pause, if there was one."""
        if not self._timer:
            self.begin()

    def fail(self, why: str) -> None:
        """Stop waiting for the header."""
        self._end(ProxyError(why))

    def _time_out(self) -> None:
        if not self._read():  # unread input, as after a pause of the whole process, is not the client's delay
            self.fail(f"not finished within {HEADER_S:g} s")

    def _read(self) -> bool:
        """Read what has arrived of the header; return whether the handshake has ended."""
        try:
            source = self._source()
        except BlockingIOError:
            return False
        except OSError as error:
            self.fail((error.strerror or str(error)).lower())
        except ProxyError as error:
            self._end(error)
        else:
            self._end(source)
        return True

    def _source(self) -> RawAddress | None:
        """Return the client's address, None if the header names none; raises BlockingIOError until it is complete."""
        arrived = self.sock.recv(proxy_header.MAX_BYTES - len(self.header), socket.MSG_PEEK)
        if not arrived:
            raise ProxyError("the client has closed the connection")
        found = proxy_header.read(self.header + arrived)
        if found is None:
            self.header += self.sock.recv(len(arrived))
            raise BlockingIOError
        self.sock.recv(found.length - len(self.header))
        return found.source

    def _end(self, result: RawAddress | ProxyError | None) -> None:
        self._stop_waiting()
        self._on_end(self, result)

    def _stop_waiting(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
            asyncio.get_running_loop().remove_reader(self.sock)


class ProxyHandshakes:
    """All handshakes under way; passes each descriptor on when its header is complete or has failed.

    Calls `on_complete` with the client's address, or None if the header names none, and `on_failed` with the reason.
    """

    def __init__(
        self,
        on_complete: Callable[[Arrival, RawAddress | None], None],
        on_failed: Callable[[Arrival, str], None],
    ) -> None:
        self._on_complete = on_complete
        self._on_failed = on_failed
        self._under_way: set[ProxyHandshake] = set()

    def __len__(self) -> int:
        """How many handshakes are under way."""
        return len(self._under_way)

    def __iter__(self) -> Iterator[ProxyHandshake]:
        """Each handshake under way."""
        return iter(self._under_way)

    def begin(self, arrival: Arrival, began_at: float, header: bytes = b"") -> None:
        """Wait for a client's header; `header` is the part that the predecessor has read at a live upgrade."""
        handshake = ProxyHandshake(arrival, began_at, header, self._on_end)
        self._under_way.add(handshake)
        handshake.begin()

    def fail_all(self, why: str) -> None:
        """Stop waiting for any header."""
        for handshake in [*self._under_way]:
            handshake.fail(why)

    def _on_end(self, handshake: ProxyHandshake, result: RawAddress | ProxyError | None) -> None:
        self._under_way.discard(handshake)
        handshake.sock.detach()
        if isinstance(result, ProxyError):
            self._on_failed(handshake.arrival, str(result))
        else:
            self._on_complete(handshake.arrival, result)
