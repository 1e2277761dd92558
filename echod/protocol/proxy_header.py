"""The header of the PROXY protocol, versions 1 and 2: where a client comes from that a balancer has brought.

As HAProxy's proxy-protocol.txt has it: what no correct sender can send is refused. Bytes go in, a source comes out;
sockets and time are not known here.
"""

import re
import struct
from ipaddress import IPv4Address, IPv6Address

from msgspec import Struct

MAX_BYTES = 4096
"""The longest header that is read. Version 2 allows 64 KiB, of which a sender uses a few hundred bytes."""

_V1, _V1_BYTES = b"PROXY ", 107
_V2, _V2_HEAD = b"\r\n\r\n\0\r\nQUIT\n", struct.Struct("!12sBBH")
_LOCAL, _PROXY = 0x20, 0x21  # version and command
_UNSPEC, _TCP4, _TCP6, _UNIX = 0x00, 0x11, 0x21, 0x31  # family and transport, which is a stream
_ADDRESSES = {_UNSPEC: struct.Struct(""), _TCP4: struct.Struct("!4s4sHH"), _TCP6: struct.Struct("!16s16sHH")} | {
    _UNIX: struct.Struct("!108s108s")
}
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")


class ProxyError(Exception):
    """Why this is no header."""


Source = tuple[str, int] | tuple[str, int, int, int] | str | bytes
"""As the socket module has the addresses of IPv4, IPv6 and Unix sockets."""


class Header(Struct, frozen=True):
    """A whole header: how many bytes it has, and where the client comes from; None if that isn't told."""

    length: int
    source: Source | None


def read(data: bytes) -> Header | None:
    """The header that `data` begins with; None as long as all of it is only its beginning. Raises ProxyError."""
    if data[: len(_V2)] == _V2[: len(data)]:
        return _read_v2(data) if data else None
    if data[: len(_V1)] == _V1[: len(data)]:
        return _read_v1(data)
    raise ProxyError("no header")


def _read_v1(data: bytes) -> Header | None:
    line, end, rest = data[:_V1_BYTES].partition(b"\r")
    if b"\n" in line or rest[:1] not in (b"", b"\n") or (len(data) >= _V1_BYTES and not rest):
        raise ProxyError("version 1: no line that ends with CR LF within 107 bytes")
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
    """One spelling for each client, or it would be several; of IPv4 where it was mapped for a socket of IPv6."""
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
        raise ProxyError("version 2: another version, or neither LOCAL nor PROXY")
    if whole > MAX_BYTES:
        raise ProxyError(f"version 2: longer than {MAX_BYTES} bytes")
    if command == _PROXY and (family not in _ADDRESSES or length < _ADDRESSES[family].size):
        raise ProxyError("version 2: neither a stream of IPv4, IPv6 or Unix sockets nor unspecified, or no addresses")
    if len(data) < whole:
        return None
    return Header(whole, _source_v2(family, data) if command == _PROXY else None)


def _source_v2(family: int, data: bytes) -> Source | None:
    parts = _ADDRESSES[family].unpack_from(data, _V2_HEAD.size)  # what follows them (TLV) is skipped
    if family == _TCP4:
        return _ipv4(parts[0], parts[2])
    if family == _TCP6:
        return _ipv6(parts[0], parts[2])
    return _path(parts[0]) if family == _UNIX else None


def _path(field: bytes) -> str | bytes:
    if field.startswith(b"\0") and (name := field.rstrip(b"\0")):
        return name  # of the abstract namespace
    return field.partition(b"\0")[0].decode(errors="surrogateescape")
