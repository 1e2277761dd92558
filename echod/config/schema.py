"""The configuration keys: the name, type, range, default and description of each, in one place.

The structs validate values. Their descriptions are the comments that `echod config` prints. This module knows neither
who uses a key nor which source its value comes from.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

RESERVED_FILES = 64
"""Descriptors reserved beside one for each connection and listener: 32 for echod itself (standard streams, event loop,
log, a reload in progress) and 32 for clients that are being rejected."""

Seconds = Annotated[float, Meta(ge=0, le=31_536_000)]


class Listen(Struct, frozen=True, kw_only=True):
    """One address to listen on."""

    address: Annotated[
        str,
        Meta(
            description="host:port, [v6]:port or unix:/path; port 0 = any free port; systemd:NAME = an inherited socket"
        ),
    ]
    proxy_protocol: Annotated[
        bool, Meta(description="the client's real address comes in a PROXY v1/v2 header; only behind a balancer")
    ] = False
    reuse_port: Annotated[bool, Meta(description="several instances share the port (same user)")] = False
    tls_certificate: Annotated[
        str, Meta(description="PEM chain; with tls_key, the listener speaks TLS, after the PROXY header if any")
    ] = ""
    tls_key: Annotated[str, Meta(description="PEM private key, not encrypted")] = ""
    tls_client_ca: Annotated[
        str, Meta(description="PEM; if set, clients must present a certificate signed by one of these CAs")
    ] = ""
    tls_minimum: Annotated[
        Literal["1.2", "1.3"], Meta(description="the oldest version that is accepted, 1.2 or 1.3")
    ] = "1.2"
    allow: Annotated[
        tuple[str, ...],
        Meta(description="networks, such as 10.0.0.0/8 or 2001:db8::/32; [] = all clients may connect"),
    ] = ()
    deny: Annotated[
        tuple[str, ...], Meta(description="networks; wins over allow; both look at the address in the PROXY header")
    ] = ()


class Limits(Struct, frozen=True, kw_only=True):
    """How much clients may use."""

    connections: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="open at once; one more gets ERROR and is closed; a value set by hand must fit under NOFILE",
        ),
    ] = 10_000
    connections_per_address: Annotated[
        int,
        Meta(ge=0, le=1_000_000, description="open at once from one IP address; 0 = no limit; Unix sockets are exempt"),
    ] = 0
    connection_rate: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="new connections per second from one address, in bursts of one second's worth; 0 = no limit",
        ),
    ] = 0
    line_bytes: Annotated[int, Meta(ge=1, le=16_777_216, description="longest line, without its LF")] = 65_536
    held_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1_099_511_627_776,
            description="pending replies and partial lines of all clients; 0 = a quarter of the memory allowed",
        ),
    ] = 0


class Timeouts(Struct, frozen=True, kw_only=True):
    """How long clients may take, in seconds; 0 = never, except for drain, drain_quiet and lame_duck."""

    handshake: Annotated[Seconds, Meta(description="the TLS handshake must finish")] = 10
    idle: Annotated[Seconds, Meta(description="no input, no pending reply, no partial line")] = 300
    line: Annotated[Seconds, Meta(description="a partial line must be completed")] = 30
    write: Annotated[Seconds, Meta(description="the client accepts none of its pending replies")] = 30
    drain: Annotated[
        Seconds,
        Meta(description="what is still open then is aborted; with the final 1 s below Docker's 10 s; 0 = at once"),
    ] = 8
    drain_quiet: Annotated[
        Seconds, Meta(description="a draining connection that has been quiet this long is finished")
    ] = 0.5
    lame_duck: Annotated[
        Seconds,
        Meta(description="after SIGTERM keep accepting this long, with /readyz at 503; it adds to the time of a stop"),
    ] = 0


class Log(Struct, frozen=True, kw_only=True):
    """What is logged, how and where."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="debug, info, warning, error")] = (
        "info"
    )
    format: Annotated[
        Literal["auto", "console", "json"], Meta(description="auto (console on a terminal, else json), console, json")
    ] = "auto"
    file: Annotated[str, Meta(description='"" = standard error; reopened by a reload')] = ""


class Admin(Struct, frozen=True, kw_only=True):
    """The HTTP endpoint for operators and monitoring."""

    listen: Annotated[
        str,
        Meta(description='host:port or unix:/path; "" = only the Unix socket `admin` in $RUNTIME_DIRECTORY, if set'),
    ] = ""


class Config(Struct, frozen=True, kw_only=True):
    """A complete, valid configuration."""

    listen: tuple[Listen, ...] = (Listen(address="127.0.0.1:8888"),)
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    log: Log = Log()
    admin: Admin = Admin()


SECTIONS: dict[str, type[Limits] | type[Timeouts] | type[Log] | type[Admin]] = {
    "limits": Limits,
    "timeouts": Timeouts,
    "log": Log,
    "admin": Admin,
}

LISTEN_KEYS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Listen)}
"""Type, with description, of each key of a [[listen]]."""

KEYS: dict[str, Any] = {
    f"{section}.{field.name}": field.type
    for section, struct in SECTIONS.items()
    for field in msgspec.structs.fields(struct)
}
"""The type of each key except `listen`, annotated with its range and description."""


def changed_keys(old: Config, new: Config) -> list[str]:
    """Return the names of the keys whose values differ."""
    changed = [key for key in KEYS if _value(old, key) != _value(new, key)]
    return changed if old.listen == new.listen else ["listen", *changed]


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
