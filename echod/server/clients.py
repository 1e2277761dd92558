"""All clients: admits or rejects each accepted client, keeps its connection until it closes, and counts it.

Owns the sets of connections; nothing else changes them. This module knows nothing of listeners, or of what a reload or
a drain does to clients.
"""

import asyncio
import math
import socket
from collections.abc import Iterable, Iterator

import structlog

from echod.config.schema import Limits
from echod.net.sockets import ListenerSettings, RawAddress, peer_name
from echod.process.phase import Life
from echod.server.admission import LOG_INTERVAL_S, Admission
from echod.server.connection import Connection
from echod.server.memory import MemoryLimit
from echod.server.parking import Parking
from echod.server.proxy_handshake import ProxyHandshake, ProxyHandshakes
from echod.server.scheduler import Scheduler
from echod.server.self_probe import SelfProbe
from echod.server.state import ConnectionState
from echod.telemetry.reasons import CloseReason, RejectReason
from echod.telemetry.stats import Stats

log = structlog.get_logger()


class Clients:
    """Takes ownership of accepted sockets and keeps each connection until it closes (the `Owner` of connections)."""

    def __init__(self, limits: Limits, stats: Stats, open_files: int, life: Life) -> None:
        """`open_files` is the process's limit of descriptors."""
        self.loop = asyncio.get_running_loop()
        self.scheduler = Scheduler()
        self.memory = MemoryLimit(self._on_memory_exceeded)
        self.limits = limits
        self.served: set[Connection] = set()
        """The admitted connections, which count in limits and statistics."""
        self.active: set[Connection] = set()
        """The served connections that are sampled regularly; the others are parked."""
        self._parking = Parking[Connection]()
        self.admission = Admission(stats, open_files)
        self.handshakes = ProxyHandshakes(self._on_header, self._on_bad_header)
        """The clients whose PROXY header is not complete yet; they hold a place but are not in the statistics."""
        self.self_probe = SelfProbe()
        self.emptied = asyncio.Event()
        """Set when the last connection has closed."""
        self.unacknowledged = 0
        """How many connections closed before the client's kernel had acknowledged every byte."""
        self._life = life
        self._memory_logged_at = -math.inf
        self._stats = stats

    # -- queries ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many places are in use, including clients that may still be rejected after their PROXY header."""
        return len(self.served) + len(self.handshakes)

    @property
    def has_any(self) -> bool:
        """Whether any connection is open, including self-probes and clients that are being rejected."""
        return bool(len(self) or self.admission.has_uncounted)

    @property
    def connections(self) -> list[Connection]:
        """All connections, including self-probes and clients that are being rejected."""
        return [*self.served, *self.admission.uncounted]

    # -- accept ----------------------------------------------------------------------------------------------------

    def accept(self, descriptor: int, peer: RawAddress, settings: ListenerSettings) -> None:
        """Serve an accepted client, once its PROXY header is read if it sends one; reject it if a limit is reached."""
        is_unix = not isinstance(peer, tuple)
        if self.self_probe.is_self_probe(peer):  # by its socket address: a PROXY header could lie
            connection = self._connection(descriptor, peer, is_unix=is_unix, is_counted=False)
            self.admission.keep(connection)
            connection.open()
        elif not settings.proxy_protocol:
            self._admit(descriptor, peer, is_unix=is_unix)
        elif reason := self.admission.check(None, len(self), self.limits):
            self._reject(descriptor, peer, reason, is_unix=is_unix)
        else:
            self.handshakes.begin(descriptor, peer, self.loop.time())

    def adopt(self, descriptor: int, peer: RawAddress, saved: ConnectionState) -> None:
        """Continue to serve a client of the predecessor, regardless of limits; it is in the statistics already."""
        if saved.proxy_header is not None:
            self.handshakes.begin(descriptor, peer, saved.opened_at, saved.proxy_header)
            return
        is_unix = saved.family == socket.AF_UNIX
        connection = self._connection(descriptor, peer, is_unix=is_unix, is_counted=saved.is_counted)
        connection.restore(saved)
        if saved.is_counted:
            self._serve(connection)
        else:
            self.admission.keep(connection)
        connection.open()

    def _admit(self, descriptor: int, peer: RawAddress, *, is_unix: bool, is_anonymous: bool = False) -> None:
        host = peer[0] if isinstance(peer, tuple) else None
        if reason := self.admission.check(host, len(self), self.limits):
            self._reject(descriptor, peer, reason, is_unix=is_unix)
            return
        connection = self._connection(descriptor, peer, is_unix=is_unix, is_counted=True)
        connection.is_anonymous = is_anonymous
        self._serve(connection)
        self._stats.accepted += 1
        if self._life.is_draining:
            connection.start_draining(self.loop.time())
        connection.open()

    def _serve(self, connection: Connection) -> None:
        self.served.add(connection)
        self.active.add(connection)
        self.admission.admit(connection.host)

    def _on_header(self, handshake: ProxyHandshake, descriptor: int, source: RawAddress | None) -> None:
        peer = handshake.peer if source is None else source
        self._admit(descriptor, peer, is_unix=handshake.is_unix, is_anonymous=source is None)

    def _on_bad_header(self, handshake: ProxyHandshake, descriptor: int, why: str) -> None:
        family = socket.AF_UNIX if handshake.is_unix else socket.AF_INET
        log.debug("no PROXY header", peer=peer_name(family, handshake.peer), why=why)
        self._reject(descriptor, handshake.peer, RejectReason.PROXY, is_unix=handshake.is_unix)

    def _reject(self, descriptor: int, peer: RawAddress, reason: RejectReason, *, is_unix: bool) -> None:
        connection = self._connection(descriptor, peer, is_unix=is_unix, is_counted=False)
        self.admission.reject(connection, reason, self.limits)

    def _connection(self, descriptor: int, peer: RawAddress, *, is_unix: bool, is_counted: bool) -> Connection:
        now = self.loop.time()
        return Connection(self, descriptor, peer, self.limits.line_bytes, now, is_unix=is_unix, is_counted=is_counted)

    # -- timeouts and drain ----------------------------------------------------------------------------------------

    def sample(self) -> None:
        """Sample every connection now, so that its state is current when a live upgrade takes a snapshot."""
        now = self.loop.time()
        for connection in self.served:
            connection.sample(now)

    def park(self, connection: Connection, idle_s: float) -> None:
        """Stop sampling a silent connection until it has input or its idle timeout ends."""
        self.active.discard(connection)
        self._parking.add(connection, connection.activity.quiet_since + idle_s if idle_s else math.inf)

    def shrink_active(self) -> None:
        """Release the memory of `active` after many were parked: half a megabyte for ten thousand connections."""
        self.active = set(self.active)

    def unpark_due(self, now: float) -> None:
        """Resume sampling of the parked connections whose idle timeout has ended."""
        self._unpark(self._parking.take_due(now))

    def unpark_all(self) -> None:
        """Resume sampling of all parked connections, for example after a change of the timeouts."""
        self._unpark(self._parking.take_all())

    def _unpark(self, connections: Iterable[Connection]) -> None:
        for connection in connections:
            connection.unpark()
            self.active.add(connection)

    def on_active(self, connection: Connection) -> None:
        """Resume sampling of a parked connection that has input (Owner)."""
        self._parking.discard(connection)
        self._unpark((connection,))

    def start_draining(self) -> None:
        """Measure the quiet time of every connection from now on, including those accepted later."""
        self.unpark_all()
        now = self.loop.time()
        for connection in self.served:
            connection.start_draining(now)

    # -- memory ----------------------------------------------------------------------------------------------------

    def _on_memory_exceeded(self) -> None:
        for connection in self.served:
            connection.is_hot = False  # from now on each read checks the limit
        now = self.loop.time()
        if now - self._memory_logged_at < LOG_INTERVAL_S:
            return
        self._memory_logged_at = now
        log.warning(
            "memory limit exceeded",
            held_bytes=self.memory.held_bytes,
            limit_bytes=self.memory.limit_bytes,
            advice="reading from clients that hold much is paused; raise limits.held_bytes or lower limits.connections",
        )

    # -- close -----------------------------------------------------------------------------------------------------

    def on_closed(self, connection: Connection) -> None:
        """Remove a closed connection and count how it ended (Owner)."""
        if connection.is_counted:
            self._count_closed(connection)
        else:
            self.admission.forget(connection)
        if not self.served and not self.has_any:
            self.emptied.set()

    def _count_closed(self, connection: Connection) -> None:
        reason = connection.reason
        assert isinstance(reason, CloseReason)
        self.served.discard(connection)
        self.active.discard(connection)
        self._parking.discard(connection)
        self.admission.release(connection.host)
        self._stats.close(reason, connection)
        self.unacknowledged += connection.unacknowledged_bytes > 0
        # A client that sends nothing is usually a probe, such as a balancer's health check every second.
        is_probe = not connection.bytes_in and reason in (CloseReason.CLIENT, CloseReason.RESET)
        (log.debug if is_probe else log.info)(
            "connection closed",
            peer=connection.peer,
            reason=reason.value,
            lines=connection.lines,
            bytes_in=connection.bytes_in,
            bytes_out=connection.bytes_out,
            duration_s=round(self.loop.time() - connection.opened_at, 6),
        )

    # -- live upgrade ----------------------------------------------------------------------------------------------

    def each(self) -> Iterator[tuple[Connection, bool]]:
        """Yield each connection, and whether it is served (True) or uncounted (False)."""
        yield from ((connection, True) for connection in self.served)
        yield from ((connection, False) for connection in self.admission.uncounted)
