"""Everyone who is connected: lets clients in or turns them away, and counts them as they come and go.

Owns their sets, from the accept to the close; every change of them happens here. Listeners, and what a configuration or
a drain does to clients, are not known.
"""

import asyncio
import socket
from collections.abc import Callable, Iterator

import structlog

from echod.admission import Admission
from echod.config import Limits
from echod.connection import Connection
from echod.handover import Past
from echod.opening import Openings
from echod.prelude import Preludes
from echod.selfcheck import SelfCheck
from echod.sockets import SockAddr, peer_name
from echod.stats import Stats

log = structlog.get_logger()


class Clients:
    """Takes accepted sockets; `on_crowd` is called whenever there may be more or fewer to be turned away."""

    def __init__(self, limits: Limits, stats: Stats, open_files: int, on_crowd: Callable[[], None]) -> None:
        """`open_files` is how many descriptors the process may have."""
        self.limits = limits
        self.served: set[Connection] = set()
        """Those that count."""
        self.admission = Admission(stats, open_files)
        self.preludes = Preludes(self._let_in, self._on_bad_header)
        """Those whose PROXY header isn't there yet: they are in no count."""
        self.openings = Openings()
        self.selfcheck = SelfCheck()
        self.emptied = asyncio.Event()
        """Set when the last one has left."""
        self.unacknowledged = 0
        """How many have left without their kernel having confirmed every byte."""
        self.is_draining = False
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self._on_crowd = on_crowd
        self._forget_served = self._on_closed  # one bound method for all, not one a connection
        self._forget_uncounted = self._on_uncounted_closed

    # -- what others ask -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many places are taken, be it by one that may have to be turned away yet."""
        return len(self.served) + len(self.preludes)

    @property
    def are_any(self) -> bool:
        """Whether anyone is there, ourselves and those that are turned away too."""
        return bool(len(self) or self.admission.uncounted)

    @property
    def connections(self) -> list[Connection]:
        """Each connection, those that don't count too."""
        return [*self.served, *self.admission.uncounted]

    def each(self) -> Iterator[tuple[Connection, bool]]:
        """Each connection, and whether it counts in the statistics."""
        yield from ((connection, True) for connection in self.served)
        yield from ((connection, False) for connection in self.admission.uncounted)

    # -- they come -------------------------------------------------------------------------------------------------

    def come(self, sock: socket.socket, peer: SockAddr) -> None:
        """Serve one that was accepted, or turn it away."""
        if not self._is_ours(sock, peer):
            self._let_in(sock, peer)

    def come_proxied(self, sock: socket.socket, peer: SockAddr) -> None:
        """Do so once its PROXY header says who it is."""
        if self._is_ours(sock, peer):
            return
        if refusal := self.admission.refusal(None, len(self), self.limits):
            self._turn_away(sock, peer, *refusal)
        else:
            self.preludes.begin(sock, peer, self._loop.time())

    def look(self) -> None:
        """See how each gets on, so that whoever goes on from here knows it up to this moment."""
        now = self._loop.time()
        for connection in self.served:
            connection.look(now)

    def adopt(self, sock: socket.socket, peer: SockAddr, past: Past) -> None:
        """Go on with a client of the program before us, whatever the limits; it is in the counts already."""
        if past.header is not None:
            self.preludes.begin(sock, peer, past.opened_at, past.header)
            return
        connection = self._connection(sock, peer, is_counted=past.is_counted)
        connection.resume(past)
        if past.is_counted:
            self.served.add(connection)
            self.admission.let_in(connection.host)
        else:
            self.admission.uncounted.add(connection)
        self.openings.start(connection, sock)

    def _is_ours(self, sock: socket.socket, peer: SockAddr) -> bool:
        """Whether it is ourselves, and served already; by the name of the socket, for a header may say anything."""
        is_ours = self.selfcheck.is_ours(peer)
        if is_ours:
            connection = self._connection(sock, peer, is_counted=False)
            self.admission.uncounted.add(connection)
            self.openings.start(connection, sock)
        return is_ours

    def _let_in(self, sock: socket.socket, peer: SockAddr) -> None:
        host = peer[0] if isinstance(peer, tuple) else None
        if refusal := self.admission.refusal(host, len(self), self.limits):
            self._turn_away(sock, peer, *refusal)
            return
        connection = self._connection(sock, peer, is_counted=True)
        self.served.add(connection)
        self.admission.let_in(host)
        self._stats.accepted += 1
        if self.is_draining:
            connection.start_draining(self._loop.time())
        self.openings.start(connection, sock)

    def _on_bad_header(self, sock: socket.socket, peer: SockAddr, why: str) -> None:
        log.debug("no PROXY header", peer=peer_name(sock.family, peer), why=why)
        self._turn_away(sock, peer, "proxy", "")

    def _turn_away(self, sock: socket.socket, peer: SockAddr, reason: str, words: str) -> None:
        connection = self._connection(sock, peer, is_counted=False)
        self.admission.turn_away(connection, reason, words)
        self._on_crowd()
        self.openings.start(connection, sock)

    def _connection(self, sock: socket.socket, peer: SockAddr, *, is_counted: bool) -> Connection:
        forget = self._forget_served if is_counted else self._forget_uncounted
        return Connection(sock, peer, self.limits.line_bytes, self._loop.time(), forget)

    # -- they go ---------------------------------------------------------------------------------------------------

    def _on_uncounted_closed(self, connection: Connection) -> None:
        self.admission.forget(connection)
        self._on_crowd()
        self._check_emptied()

    def _on_closed(self, connection: Connection) -> None:
        reason = connection.reason
        assert reason is not None
        self.served.discard(connection)
        self.admission.let_out(connection.host)
        self._stats.close(reason, connection)
        self.unacknowledged += connection.unacknowledged_bytes > 0
        # Without a byte it is a probe as a rule, such as a balancer's every second.
        is_probe = not connection.bytes_in and reason in ("client", "reset")
        (log.debug if is_probe else log.info)(
            "connection closed",
            peer=connection.peer,
            reason=reason,
            lines=connection.lines,
            bytes_in=connection.bytes_in,
            bytes_out=connection.bytes_out,
            duration_s=round(self._loop.time() - connection.opened_at, 6),
        )
        self._check_emptied()

    def _check_emptied(self) -> None:
        if not self.are_any:
            self.emptied.set()
