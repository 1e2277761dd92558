"""The header of the PROXY protocol, versions 1 and 2, in which a balancer names the client's address.

It follows HAProxy's proxy-protocol.txt, and refuses what no correct sender can send. This module does no I/O and knows
neither sockets nor time.
"""

import re
import struct
from ipaddress import IPv4Address, IPv6Address

from msgspec import Struct

MAX_BYTES = 4096
"""The longest header that is accepted. Version 2 allows 64 KiB; real headers have at most a few hundred bytes."""

_V1, _V1_BYTES = b"PROXY ", 107
_V2, _V2_HEAD = b"\r\n\r\n\0\r\nQUIT\n", struct.Struct("!12sBBH")
_LOCAL, _PROXY = 0x20, 0x21  # version and command
_UNSPEC, _TCP4, _TCP6, _UNIX = 0x00, 0x11, 0x21, 0x31  # family and transport, which is a stream
_ADDRESSES = {_UNSPEC: struct.Struct(""), _TCP4: struct.Struct("!4s4sHH"), _TCP6: struct.Struct("!16s16sHH")} | {
    _UNIX: struct.Struct("!108s108s")
}
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")


class ProxyError(Exception):
    """The bytes are not a valid header; the message says why."""


Source = tuple[str, int] | tuple[str, int, int, int] | str | bytes
"""An IPv4, IPv6 or Unix address in the format of the socket module."""


class Header(Struct, frozen=True):
    """A complete header."""

    length: int
    """Its length in bytes."""
    source: Source | None
    """The client's address; None if the header does not name one."""


def read(data: bytes) -> Header | None:
    """Return the header at the start of `data`, or None if it is not complete yet; raises ProxyError."""
    if data[: len(_V2)] == _V2[: len(data)]:
        return _read_v2(data) if data else None
    if data[: len(_V1)] == _V1[: len(data)]:
        return _read_v1(data)
    raise ProxyError("no header")


def _read_v1(data: bytes) -> Header | None:
    line, end, rest = data[:_V1_BYTES].partition(b"\r")
    if b"\n" in line or rest[:1] not in (b"", b"\n") or (len(data) >= _V1_BYTES and not rest):
        raise ProxyError("version 1: expected CR LF within 107 bytes")
    if not rest:
        return None
    return Header(len(line) + len(end) + 1, _source_v1(line))


def _source_v1(line: bytes) -> Source | None:
    match line.decode("latin-1").split(" "):
        case ["PROXY", "UNKNOWN", *_]:
            return None
        case ["PROXY", "TCP4", source, destination, source_port, destination_port]:
            read_address = _ipv4
        case ["PROXY", "TCP6", source, destination, source_port, destination_port]:
            read_address = _ipv6
        case _:
            raise ProxyError("version 1: expected TCP4, TCP6 or UNKNOWN, two addresses and two ports")
    read_address(destination, _port(destination_port))
    return read_address(source, _port(source_port))


def _port(text: str) -> int:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise ProxyError("version 1: expected ports from 0 to 65535")
    return int(text)


def _ipv4(host: str | bytes, port: int) -> Source:
    try:
        return str(IPv4Address(host)), port
    except ValueError:
        raise ProxyError("version 1: expected IPv4 addresses") from None


def _ipv6(host: str | bytes, port: int) -> Source:
    """Return the address in its normal form, so that each client has only one; IPv4-mapped IPv6 becomes IPv4."""
    try:
        address = IPv6Address(host)
    except ValueError:
        raise ProxyError("version 1: expected IPv6 addresses") from None
    if address.scope_id is not None:
        raise ProxyError("version 1: expected IPv6 addresses")
    return (str(address.ipv4_mapped), port) if address.ipv4_mapped else (str(address), port, 0, 0)


def _read_v2(data: bytes) -> Header | None:
    if len(data) < _V2_HEAD.size:
        return None
    _, command, family, length = _V2_HEAD.unpack_from(data)
    whole = _V2_HEAD.size + length
    if command not in (_LOCAL, _PROXY):
        raise ProxyError("version 2: expected version 2 and the command LOCAL or PROXY")
    if whole > MAX_BYTES:
        raise ProxyError(f"version 2: longer than {MAX_BYTES} bytes")
    if command == _PROXY and (family not in _ADDRESSES or length < _ADDRESSES[family].size):
        raise ProxyError(
            "version 2: expected stream sockets of IPv4, IPv6 or Unix, or unspecified, and their addresses"
        )
    if len(data) < whole:
        return None
    return Header(whole, _source_v2(family, data) if command == _PROXY else None)


def _source_v2(family: int, data: bytes) -> Source | None:
    parts = _ADDRESSES[family].unpack_from(data, _V2_HEAD.size)  # the TLVs that follow are skipped
    if family == _TCP4:
        return _ipv4(parts[0], parts[2])
    if family == _TCP6:
        return _ipv6(parts[0], parts[2])
    return _path(parts[0]) if family == _UNIX else None


def _path(field: bytes) -> str | bytes:
    if field.startswith(b"\0") and (name := field.rstrip(b"\0")):
        return name  # in the abstract namespace (unix(7))
    return field.partition(b"\0")[0].decode(errors="surrogateescape")
