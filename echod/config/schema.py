"""The keys of the configuration: their names, types, ranges, defaults and meanings, each written once.

The structs validate, and their descriptions are the comments of `echod config`. This room doesn't know who uses a key,
nor where its value comes from.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

RESERVED_FILES = 64
"""Descriptors kept beside one for each connection and listener: 32 for echod itself (standard streams, event loop, log,
a reload under way) and 32 for clients that are being told there are too many of them."""

Seconds = Annotated[float, Meta(ge=0, le=31_536_000)]


class Listen(Struct, frozen=True, kw_only=True):
    """One address to listen on."""

    address: Annotated[
        str,
        Meta(
            description="host:port, [v6]:port, unix:/path; port 0 = any free one; systemd:NAME = a socket handed over"
        ),
    ]
    proxy_protocol: Annotated[
        bool, Meta(description="the client's real address comes in a PROXY v1/v2 header; only for a balancer's")
    ] = False
    reuse_port: Annotated[bool, Meta(description="several instances share the port (same user)")] = False


class Limits(Struct, frozen=True, kw_only=True):
    """How much clients may take."""

    connections: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)],
        Meta(description="open at once; one more is told ERROR and closed; if set by hand it must fit under NOFILE"),
    ] = 10_000
    connections_per_address: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)],
        Meta(description="open at once from one IP address; 0 = no limit; Unix sockets have none"),
    ] = 0
    line_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=16_777_216)],
        Meta(description="longest line, without its LF"),
    ] = 65_536
    held_bytes: Annotated[
        Annotated[int, Meta(ge=0, le=1_099_511_627_776)],
        Meta(description="replies and partial lines of all clients together; 0 = a quarter of the memory allowed"),
    ] = 0


class Timeouts(Struct, frozen=True, kw_only=True):
    """How long clients may take, in seconds; 0 = never, but for drain, drain_quiet and lame_duck."""

    idle: Annotated[Seconds, Meta(description="nothing from the client, nothing owed to it, no line begun")] = 300
    line: Annotated[Seconds, Meta(description="a line begun must end")] = 30
    write: Annotated[Seconds, Meta(description="the client takes none of the replies it is owed")] = 30
    drain: Annotated[
        Seconds, Meta(description="with the 1 s of the last half-close, below Docker's 10 s; 0 = end at once")
    ] = 8
    drain_quiet: Annotated[Seconds, Meta(description="a draining connection this long quiet is finished")] = 0.5
    lame_duck: Annotated[
        Seconds,
        Meta(
            description="after TERM go on accepting so long, with /readyz draining; with drain and 1 s below the grace"
        ),
    ] = 0


class Log(Struct, frozen=True, kw_only=True):
    """What is logged, how and where."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="debug, info, warning, error")] = (
        "info"
    )
    format: Annotated[
        Literal["auto", "console", "json"], Meta(description="console, json; auto: console on a terminal, else json")
    ] = "auto"
    file: Annotated[str, Meta(description='"" = standard error; reopened on a reload')] = ""


class Admin(Struct, frozen=True, kw_only=True):
    """The endpoint for operators and monitoring."""

    listen: Annotated[
        str, Meta(description='host:port or unix:/path; "" = only `admin` in $RUNTIME_DIRECTORY, if that is set')
    ] = ""


class Config(Struct, frozen=True, kw_only=True):
    """Everything echod is told, valid as a whole."""

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

LISTEN_KEYS = frozenset(Listen.__struct_fields__)

KEYS: dict[str, Any] = {
    f"{section}.{field.name}": field.type
    for section, struct in SECTIONS.items()
    for field in msgspec.structs.fields(struct)
}
"""Type, with range and description, of each key but `listen`."""


def changed_keys(old: Config, new: Config) -> list[str]:
    """The names of the keys whose values differ."""
    changed = [key for key in KEYS if _value(old, key) != _value(new, key)]
    return changed if old.listen == new.listen else ["listen", *changed]


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
