"""The clients of a balancer from the accept until their PROXY header is there, which says who they are.

Reads by hand, and takes of what has arrived exactly the header: the rest belongs to the connection. Owns the sockets
meanwhile; who is let in, and what becomes of one that isn't, is decided elsewhere.
"""

import asyncio
import socket
from collections.abc import Callable, Iterator

from echod.net.sockets import RawAddress
from echod.protocol import proxy_header
from echod.protocol.proxy_header import ProxyError

HEADER_S = 5.0
"""How long a header may take; a balancer sends it at once."""


class ProxyHandshake:
    """One client whose PROXY header is not complete yet.

    `end` is called once: with the client's address, None if the header names none, or the error in the header.
    """

    __slots__ = ("_end", "_timer", "began_at", "header", "peer", "sock")

    def __init__(
        self,
        sock: socket.socket,
        peer: RawAddress,
        began_at: float,
        header: bytes,
        end: Callable[["ProxyHandshake", RawAddress | ProxyError | None], None],
    ) -> None:
        self.sock = sock
        self.peer = peer
        self.began_at = began_at
        self.header = header
        """What has been read of it."""
        self._end = end
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Read what is there, which is the whole header as a rule, and wait for what isn't."""
        if not self._read():
            loop = asyncio.get_running_loop()
            loop.add_reader(self.sock, self._read)
            self._timer = loop.call_at(self.began_at + HEADER_S, self._time_out)

    def fail(self, why: str) -> None:
        """Wait no longer."""
        self._finish(ProxyError(why))

    def _time_out(self) -> None:
        if not self._read():  # what waits for us, as after a pause of the whole process, is not the client's delay
            self.fail(f"not finished within {HEADER_S:g} s")

    def _read(self) -> bool:
        """Take what has arrived of the header; return whether that was the end of it."""
        try:
            source = self._source()
        except BlockingIOError:
            return False
        except OSError as error:
            self.fail((error.strerror or str(error)).lower())
        except ProxyError as error:
            self._finish(error)
        else:
            self._finish(source)
        return True

    def _source(self) -> RawAddress | None:
        """Where the client comes from, None if that isn't told; raises BlockingIOError until the header is whole."""
        arrived = self.sock.recv(proxy_header.MAX_BYTES - len(self.header), socket.MSG_PEEK)
        if not arrived:
            raise ProxyError("the client has left")
        found = proxy_header.read(self.header + arrived)
        if found is None:
            self.header += self.sock.recv(len(arrived))
            raise BlockingIOError
        self.sock.recv(found.length - len(self.header))
        return found.source

    def _finish(self, result: RawAddress | ProxyError | None) -> None:
        if self._timer:
            self._timer.cancel()
            asyncio.get_running_loop().remove_reader(self.sock)
        self._end(self, result)


class ProxyHandshakes:
    """All of them: hands each descriptor on when its header has come or has failed.

    `on_ready` gets it with the client's address and whether the header names none, `on_failed` with the peer's and why
    not; both are told whether it is a Unix socket's.
    """

    def __init__(
        self,
        on_ready: Callable[[int, RawAddress, bool, bool], None],
        on_failed: Callable[[int, RawAddress, bool, str], None],
    ) -> None:
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._under_way: set[ProxyHandshake] = set()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._under_way)

    def __iter__(self) -> Iterator[ProxyHandshake]:
        """Each of them."""
        return iter(self._under_way)

    def begin(self, descriptor: int, peer: RawAddress, began_at: float, header: bytes = b"") -> None:
        """Wait for the header of a client, the beginning of which may have been read before."""
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(False)
        prelude = ProxyHandshake(sock, peer, began_at, header, self._end)
        self._under_way.add(prelude)
        prelude.begin()

    def give_up(self) -> None:
        """Wait no longer for any."""
        for prelude in [*self._under_way]:
            prelude.fail("the end of the drain")

    def _end(self, prelude: ProxyHandshake, result: RawAddress | ProxyError | None) -> None:
        self._under_way.discard(prelude)
        is_unix = prelude.sock.family == socket.AF_UNIX
        descriptor = prelude.sock.detach()
        if isinstance(result, ProxyError):
            self._on_failed(descriptor, prelude.peer, is_unix, str(result))
        else:
            self._on_ready(descriptor, prelude.peer if result is None else result, is_unix, result is None)
