"""Addresses in the configuration and on the command line: `host:port`, `[v6]:port`, `unix:/path` or `systemd:NAME`."""

import os
import re
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

UNIX_PATH_BYTES = 107
"""Longest path of a Unix socket: sun_path holds 108 bytes with its NUL (unix(7))."""

_NAME = re.compile(r"[A-Za-z0-9._-]+")


class TcpAddress(NamedTuple):
    """A host name or IP address, and a port; port 0 means any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    """The absolute path of a Unix stream socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class SystemdAddress(NamedTuple):
    """The inherited sockets with this name, which the service manager passes at the start."""

    name: str

    def __str__(self) -> str:
        return f"systemd:{self.name}"


Address = TcpAddress | UnixAddress | SystemdAddress


def parse_address(text: str) -> Address:
    """Parse an address; raises ValueError, which says what is wrong with it."""
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"))
    if text.startswith("systemd:"):
        return _systemd(text.removeprefix("systemd:"))
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError("expected host:port, [v6]:port or unix:/path")
    if ":" in host and "/" not in host and not _is_bracketed(host):
        raise ValueError("expected an IPv6 address in brackets, [v6]:port")
    if not (re.fullmatch("[0-9]{1,5}", port) and int(port) <= 65535):
        raise ValueError("expected a port from 0 to 65535")
    return TcpAddress(_host(host), int(port))


def identity(address: Address) -> Address:
    """Return a normal form of the address: only one of several addresses with the same identity can be listened on.

    Follows symbolic links in the path of a Unix socket; resolves no host names.
    """
    match address:
        case UnixAddress(path):
            return UnixAddress(real_path(path))
        case TcpAddress(host, port):
            return TcpAddress(normal_host(host), port)
        case SystemdAddress():
            return address


def real_path(path: str) -> str:
    """Return the path of a Unix socket without symbolic links in its directory.

    The last component is not followed, as in bind(2).
    """
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def normal_host(host: str) -> str:
    """Return the normal form of a host, such as ::1 for 0:0:0:0:0:0:0:1.

    An IPv4-mapped IPv6 address becomes the IPv4 address: ::ffff:127.0.0.1 is 127.0.0.1 (RFC 4291, 2.5.5.2).
    """
    if ":" not in host:
        return host.lower()
    number = IPv6Address(host)
    return str(number.ipv4_mapped or number)


def _is_bracketed(host: str) -> bool:
    return host.startswith("[") and host.endswith("]")


def _host(host: str) -> str:
    if _is_bracketed(host):
        return _number(IPv6Address, host[1:-1])
    if not _NAME.fullmatch(host):
        raise ValueError(
            "expected a host name or an IP address before the port"
            if host
            else "no host; 0.0.0.0:PORT or [::]:PORT listens on every address"
        )
    return _number(IPv4Address, host) if re.fullmatch("[0-9.]+", host) else host


def _number(kind: type[IPv4Address] | type[IPv6Address], host: str) -> str:
    try:
        kind(host)
    except ValueError:
        raise ValueError(f"not an IPv{kind(0).version} address") from None
    return host


def _unix(path: str) -> UnixAddress:
    if not path.startswith("/"):
        raise ValueError("expected an absolute path, unix:/path")
    if "\0" in path:
        raise ValueError("a path cannot contain NUL")
    if len(path.encode(errors="surrogateescape")) > UNIX_PATH_BYTES:
        raise ValueError(f"path longer than {UNIX_PATH_BYTES} bytes")
    return UnixAddress(path)


def _systemd(name: str) -> SystemdAddress:
    # systemd.socket(5), FileDescriptorName=
    if not name or ":" in name or not name.isascii() or not name.isprintable():
        raise ValueError("expected a name that FileDescriptorName= in the socket unit can set")
    return SystemdAddress(name)
