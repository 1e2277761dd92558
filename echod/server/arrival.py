"""A client between its accept and its admission: what is known about it so far."""

from typing import TYPE_CHECKING

from msgspec import Struct

from echod.net.sockets import ListenerSettings, RawAddress

if TYPE_CHECKING:
    from echod.server.tls_stream import TlsStream


class Arrival(Struct):
    """An accepted client whose descriptor is still to be passed to a connection."""

    descriptor: int
    peer: RawAddress
    """The client's address, which a PROXY header replaces."""
    is_unix: bool
    """Whether the client connected through a Unix socket; its PROXY header may still name an IP address."""
    settings: ListenerSettings
    is_anonymous: bool = False
    """Whether the PROXY header names no client, as in a health check by the balancer itself."""
    stream: "TlsStream | None" = None
    """The TLS layer once its handshake has begun."""

    @property
    def host(self) -> str | None:
        """The client's IP address without the port; None for a Unix socket."""
        return self.peer[0] if isinstance(self.peer, tuple) else None
