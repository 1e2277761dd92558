"""All clients: admits or rejects each accepted client, keeps its connection until it closes, and counts it.

Owns the sets of connections; nothing else changes them. This module knows nothing of listeners, or of what a reload or
a drain does to clients.
"""

import asyncio
import math
import socket
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import structlog

from echod.config.schema import Limits
from echod.net.sockets import ListenerSettings, RawAddress, peer_name
from echod.process.phase import Life
from echod.server.admission import LOG_INTERVAL_S, Admission
from echod.server.arrival import Arrival
from echod.server.connection import Connection
from echod.server.memory import MemoryLimit
from echod.server.parking import Parking
from echod.server.proxy_handshake import ProxyHandshakes
from echod.server.scheduler import Scheduler
from echod.server.self_probe import SelfProbe
from echod.server.state import ConnectionState
from echod.telemetry.reasons import CloseReason, RejectReason
from echod.telemetry.stats import Stats

if TYPE_CHECKING:
    from echod.server.tls_handshake import TlsHandshake

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
        self.tls_handshakes: set[TlsHandshake] = set()
        """The clients whose TLS handshake is not complete yet; they hold a place, too."""
        self.handshake_s = 0.0
        """How long a TLS handshake may take; 0 for no timeout."""
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
        """How many places are in use, including clients whose PROXY header or TLS handshake is not complete yet."""
        return len(self.served) + len(self.handshakes) + len(self.tls_handshakes)

    @property
    def has_any(self) -> bool:
        """Whether any connection is open, including self-probes and clients that are being rejected."""
        return bool(len(self) or self.admission.has_uncounted)

    @property
    def connections(self) -> list[Connection]:
        """All connections, including self-probes and clients that are being rejected."""
        return [*self.served, *self.admission.uncounted]

    @property
    def tls(self) -> list[Connection]:
        """All TLS connections, including those of clients that are being rejected."""
        return [connection for connection in self.connections if connection.is_tls]

    @property
    def has_tls(self) -> bool:
        """Whether any TLS connection or handshake is open."""
        return bool(self.tls or self.tls_handshakes)

    # -- accept ----------------------------------------------------------------------------------------------------

    def accept(self, descriptor: int, peer: RawAddress, settings: ListenerSettings) -> None:
        """Serve an accepted client, once its PROXY header is read if it sends one; reject it if a limit is reached."""
        arrival = Arrival(descriptor, peer, not isinstance(peer, tuple), settings)
        if self.self_probe.is_self_probe(peer):  # by its socket address: a PROXY header could lie
            connection = self._connection(arrival, is_counted=False)
            self.admission.keep(connection)
            connection.open()
        elif not settings.proxy_protocol:
            self._on_identified(arrival)
        elif reason := self.admission.check(None, len(self), self.limits):
            self._reject(arrival, reason)
        else:
            self.handshakes.begin(arrival, self.loop.time())

    def adopt(self, arrival: Arrival, saved: ConnectionState) -> None:
        """Continue to serve a client of the predecessor, regardless of limits; it is in the statistics already."""
        if saved.proxy_header is not None:
            self.handshakes.begin(arrival, saved.opened_at, saved.proxy_header)
            return
        connection = self._connection(arrival, is_counted=saved.is_counted)
        connection.restore(saved)
        if saved.is_counted:
            self._serve(connection)
        else:
            self.admission.keep(connection)
        connection.open()

    def _on_identified(self, arrival: Arrival) -> None:
        """Admit a client whose address is known, if the listener lets it connect, after its TLS handshake if any."""
        settings = arrival.settings
        if settings.access and arrival.host and not settings.access.admits(arrival.host):
            self._reject(arrival, RejectReason.DENIED)
        elif settings.is_tls:
            self._begin_tls(arrival)
        else:
            self._admit(arrival)

    def _begin_tls(self, arrival: Arrival) -> None:
        from echod.server.tls_handshake import TlsHandshake  # imports ssl (10 ms), for listeners with TLS only
        from echod.server.tls_stream import HandshakeError

        if arrival.settings.tls is None:
            self._reject(arrival, RejectReason.TLS)
        elif reason := self.admission.check_handshake(arrival.host, len(self), self.limits):
            self._reject(arrival, reason)
        else:
            try:
                handshake = TlsHandshake(arrival, self.scheduler, self.handshake_s, self._on_tls)
            except HandshakeError as error:  # the client is gone, and its descriptor is closed
                self._count_failed_handshake(arrival, str(error))
                self._stats.rejected[RejectReason.TLS.value] += 1
            else:
                self.tls_handshakes.add(handshake)
                self.admission.begin_handshake(arrival.host)

    def _on_tls(self, handshake: "TlsHandshake", why: str) -> None:
        self.tls_handshakes.discard(handshake)
        arrival, stream = handshake.arrival, handshake.stream
        self.admission.end_handshake(arrival.host)
        if why:
            self._count_failed_handshake(arrival, why)
            stream.release()
            self._reject(arrival, RejectReason.TLS)
        else:
            self._stats.count_handshake(stream.version)
            arrival.stream = stream
            self._admit(arrival)

    def _count_failed_handshake(self, arrival: Arrival, why: str) -> None:
        self._stats.count_handshake("")
        log.debug("TLS handshake failed", peer=_name(arrival), why=why)

    def _admit(self, arrival: Arrival) -> None:
        if reason := self.admission.check(arrival.host, len(self), self.limits):
            self._reject(arrival, reason)
            return
        connection = self._connection(arrival, is_counted=True)
        connection.is_anonymous = arrival.is_anonymous
        self._serve(connection)
        self._stats.accepted += 1
        if self._life.is_draining:
            connection.start_draining(self.loop.time())
        connection.open()

    def _serve(self, connection: Connection) -> None:
        self.served.add(connection)
        self.active.add(connection)
        self.admission.admit(connection.host)

    def _on_header(self, arrival: Arrival, source: RawAddress | None) -> None:
        arrival.is_anonymous = source is None
        arrival.peer = arrival.peer if source is None else source
        self._on_identified(arrival)

    def _on_bad_header(self, arrival: Arrival, why: str) -> None:
        log.debug("no PROXY header", peer=_name(arrival), why=why)
        self._reject(arrival, RejectReason.PROXY)

    def _reject(self, arrival: Arrival, reason: RejectReason) -> None:
        connection = self._connection(arrival, is_counted=False)
        # A client that expects TLS cannot read an error line that is sent without it.
        can_be_told = arrival.stream is not None or not arrival.settings.is_tls
        self.admission.reject(connection, reason, self.limits, can_be_told=can_be_told)

    def _connection(self, arrival: Arrival, *, is_counted: bool) -> Connection:
        arguments = (self, arrival.descriptor, arrival.peer, self.limits.line_bytes, self.loop.time())
        if arrival.stream is None:
            return Connection(*arguments, is_unix=arrival.is_unix, is_counted=is_counted)
        from echod.server.tls_connection import TlsConnection

        return TlsConnection(*arguments, stream=arrival.stream, is_unix=arrival.is_unix, is_counted=is_counted)

    def fail_handshakes(self, why: str) -> None:
        """Give up every PROXY and TLS handshake that is not complete."""
        self.handshakes.fail_all(why)
        for handshake in [*self.tls_handshakes]:
            handshake.fail(why)

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
            **connection.log_fields,
        )

    # -- live upgrade ----------------------------------------------------------------------------------------------

    def hold_tls(self) -> None:
        """Begin no TLS handshake for clients whose PROXY header is not complete yet, until `release_tls` is called."""
        for handshake in self.handshakes:
            if handshake.arrival.settings.is_tls:
                handshake.pause()

    def release_tls(self) -> None:
        """Undo `hold_tls`."""
        for handshake in [*self.handshakes]:
            if handshake.arrival.settings.is_tls:
                handshake.resume()

    def each(self) -> Iterator[tuple[Connection, bool]]:
        """Yield each connection, and whether it is served (True) or uncounted (False)."""
        yield from ((connection, True) for connection in self.served)
        yield from ((connection, False) for connection in self.admission.uncounted)


def _name(arrival: Arrival) -> str:
    return peer_name(socket.AF_UNIX if arrival.is_unix else socket.AF_INET, arrival.peer)
