"""An address as people write it: `host:port`, `[v6]:port` or `unix:/path`."""

import re
from dataclasses import dataclass

UNIX_PATH_BYTES = 107
"""Longest path of a Unix socket: sun_path holds 108 bytes with its NUL (unix(7))."""

_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(%[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, by name or number, and a port; port 0 means any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The absolute path of a Unix stream socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """Read an address; a ValueError says what is wrong with it."""
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError("expected host:port, [v6]:port or unix:/path")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not _HOST.fullmatch(host) or bracketed != (":" in host):
        raise ValueError("expected host:port with an IPv6 address in brackets, [v6]:port" if ":" in host else "no host")
    if not (re.fullmatch("[0-9]{1,5}", port) and int(port) <= 65535):
        raise ValueError("expected a port from 0 to 65535")
    return TcpAddress(host, int(port))


def _unix(path: str) -> UnixAddress:
    if not path.startswith("/"):
        raise ValueError("expected an absolute path, unix:/path")
    if "\0" in path:
        raise ValueError("a path holds no NUL")
    if len(path.encode(errors="surrogateescape")) > UNIX_PATH_BYTES:
        raise ValueError(f"path longer than {UNIX_PATH_BYTES} bytes")
    return UnixAddress(path)
