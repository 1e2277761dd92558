"""The PROXY header: what is read from it, byte by byte, and what is refused."""

import struct
from ipaddress import IPv4Address, IPv6Address
from socket import SOCK_STREAM

import proxyprotocol
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from proxyprotocol.result import ProxyResultIPv4, ProxyResultIPv6, ProxyResultLocal, ProxyResultUnix, ProxyResultUnknown
from proxyprotocol.tlv import ProxyProtocolTLV
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from echod.protocol import proxy_header
from echod.protocol.proxy_header import MAX_BYTES, Header, ProxyError, Source

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v2(command: int, family: int, block: bytes = b"", length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(block) if length is None else length) + block


IPV4 = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 40001, 8888)
IPV6 = IPv6Address("2001:db8::1").packed + IPv6Address("2001:db8::2").packed + struct.pack("!HH", 40001, 8888)
MAPPED = IPv6Address("::ffff:192.0.2.1").packed * 2 + struct.pack("!HH", 40001, 8888)
UNIX = b"/run/client".ljust(108, b"\0") + b"/run/echod".ljust(108, b"\0")

GOOD: dict[str, tuple[bytes, Source | None]] = {
    "v1 IPv4": (b"PROXY TCP4 192.0.2.1 198.51.100.2 40001 8888\r\n", ("192.0.2.1", 40001)),
    "v1 longest IPv4": (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", ("255.255.255.255", 65535)),
    "v1 port 0": (b"PROXY TCP4 192.0.2.1 198.51.100.2 0 0\r\n", ("192.0.2.1", 0)),
    "v1 IPv6": (b"PROXY TCP6 2001:db8::1 2001:db8::2 40001 8888\r\n", ("2001:db8::1", 40001, 0, 0)),
    "v1 IPv6, another spelling": (b"PROXY TCP6 2001:DB8:0::1 ::2 40001 8888\r\n", ("2001:db8::1", 40001, 0, 0)),
    "v1 IPv4 on IPv6": (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:c000:202 40001 8888\r\n", ("192.0.2.1", 40001)),
    "v1 longest IPv6": (b"PROXY TCP6 " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2) + b" 65535 65535\r\n", None),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "v1 longest UNKNOWN": (
        b"PROXY UNKNOWN " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2) + b" 65535 65535\r\n",
        None,
    ),
    "v1 UNKNOWN and anything": (b"PROXY UNKNOWN what \xff ever\r\n", None),
    "v2 IPv4": (v2(0x21, 0x11, IPV4), ("192.0.2.1", 40001)),
    "v2 IPv6": (v2(0x21, 0x21, IPV6), ("2001:db8::1", 40001, 0, 0)),
    "v2 IPv4 on IPv6": (v2(0x21, 0x21, MAPPED), ("192.0.2.1", 40001)),
    "v2 Unix": (v2(0x21, 0x31, UNIX), "/run/client"),
    "v2 Unix without a name": (v2(0x21, 0x31, bytes(216)), ""),
    "v2 Unix, abstract": (v2(0x21, 0x31, b"\0name".ljust(216, b"\0")), b"\0name"),
    "v2 Unix, no UTF-8": (v2(0x21, 0x31, b"/\xff".ljust(216, b"\0")), "/\udcff"),
    "v2 with more behind": (v2(0x21, 0x11, IPV4 + b"\x04\x00\x05extra"), ("192.0.2.1", 40001)),
    "v2 longest": (v2(0x21, 0x11, IPV4 + bytes(MAX_BYTES - 16 - 12)), ("192.0.2.1", 40001)),
    "v2 UNSPEC": (v2(0x21, 0x00), None),
    "v2 UNSPEC with more behind": (v2(0x21, 0x00, b"\x04\x00\x05extra"), None),
    "v2 LOCAL": (v2(0x20, 0x00), None),
    "v2 LOCAL with addresses": (v2(0x20, 0x11, IPV4), None),
    "v2 LOCAL with what nobody knows": (v2(0x20, 0x77, b"?"), None),
}
GOOD["v1 longest IPv6"] = (GOOD["v1 longest IPv6"][0], ("ffff:" * 7 + "ffff", 65535, 0, 0))


@pytest.mark.parametrize("name", GOOD)
def test_a_header_is_read_wherever_it_is_split(name: str) -> None:
    """Each proper prefix needs more; the last byte completes the header, and what follows is ignored."""
    header, source = GOOD[name]
    for length in range(len(header)):
        assert proxy_header.read(header[:length]) is None, length
    for behind in (b"", b"h", b"hello\r\n", b"\n", header, SIGNATURE, bytes(MAX_BYTES)):
        assert proxy_header.read(header + behind) == Header(len(header), source)


BAD = {
    "a line": b"hello\n",
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "an empty line": b"\n",
    "v1 in lower case": b"proxy TCP4 192.0.2.1 198.51.100.2 40001 8888\r\n",
    "v1 without CR": b"PROXY TCP4 192.0.2.1 198.51.100.2 40001 8888\n",
    "v1 UNKNOWN without CR": b"PROXY UNKNOWN\n",
    "v1 without LF": b"PROXY TCP4 192.0.2.1 198.51.100.2 40001 8888\rx",
    "v1 without a family": b"PROXY \r\n",
    "v1 UNKNOWN and on": b"PROXY UNKNOWNS\r\n",
    "v1 another family": b"PROXY UDP4 192.0.2.1 198.51.100.2 40001 8888\r\n",
    "v1 too few fields": b"PROXY TCP4 192.0.2.1 198.51.100.2 40001\r\n",
    "v1 too many fields": b"PROXY TCP4 192.0.2.1 198.51.100.2 40001 8888 1\r\n",
    "v1 two spaces": b"PROXY TCP4  192.0.2.1 198.51.100.2 40001 8888\r\n",
    "v1 a space at the end": b"PROXY TCP4 192.0.2.1 198.51.100.2 40001 8888 \r\n",
    "v1 a tab": b"PROXY TCP4\t192.0.2.1 198.51.100.2 40001 8888\r\n",
    "v1 a port too high": b"PROXY TCP4 192.0.2.1 198.51.100.2 65536 8888\r\n",
    "v1 the other port too high": b"PROXY TCP4 192.0.2.1 198.51.100.2 40001 65536\r\n",
    "v1 a port below 0": b"PROXY TCP4 192.0.2.1 198.51.100.2 -1 8888\r\n",
    "v1 a port with 0 before": b"PROXY TCP4 192.0.2.1 198.51.100.2 080 8888\r\n",
    "v1 a port with _": b"PROXY TCP4 192.0.2.1 198.51.100.2 4_0 8888\r\n",
    "v1 a port of Arabic digits": "PROXY TCP4 192.0.2.1 198.51.100.2 ٤٠ 8888\r\n".encode(),
    "v1 no port": b"PROXY TCP4 192.0.2.1 198.51.100.2  8888\r\n",
    "v1 no IPv4": b"PROXY TCP4 192.0.2.256 198.51.100.2 40001 8888\r\n",
    "v1 IPv4 with 0 before": b"PROXY TCP4 192.0.2.01 198.51.100.2 40001 8888\r\n",
    "v1 the other is no IPv4": b"PROXY TCP4 192.0.2.1 198.51.100 40001 8888\r\n",
    "v1 IPv6 for IPv4": b"PROXY TCP4 2001:db8::1 2001:db8::2 40001 8888\r\n",
    "v1 IPv4 for IPv6": b"PROXY TCP6 192.0.2.1 198.51.100.2 40001 8888\r\n",
    "v1 IPv6 with an interface": b"PROXY TCP6 fe80::1%eth0 2001:db8::2 40001 8888\r\n",
    "v1 no end": b"PROXY UNKNOWN " + b"x" * 93,
    "v1 an end too late": b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    "v2 another signature": SIGNATURE[:-1] + b"\r",
    "v2 version 1": v2(0x11, 0x11, IPV4),
    "v2 version 3": v2(0x31, 0x11, IPV4),
    "v2 another command": v2(0x22, 0x11, IPV4),
    "v2 datagrams": v2(0x21, 0x12, IPV4),
    "v2 another family": v2(0x21, 0x41, IPV4),
    "v2 a family and no stream": v2(0x21, 0x10, IPV4),
    "v2 a stream of no family": v2(0x21, 0x01, IPV4),
    "v2 IPv4 too short": v2(0x21, 0x11, IPV4[:-1]),
    "v2 IPv6 too short": v2(0x21, 0x21, IPV4),
    "v2 Unix too short": v2(0x21, 0x31, UNIX[:-1]),
    "v2 too long": v2(0x21, 0x11, IPV4, length=MAX_BYTES - 15),
    "v2 LOCAL too long": v2(0x20, 0x00, length=65535),
}


@pytest.mark.parametrize("name", BAD)
def test_an_invalid_header_is_refused(name: str) -> None:
    """It is refused at the first byte that shows it, whatever follows."""
    shows_at = next((n for n in range(len(BAD[name])) if _is_refused(BAD[name][:n])), len(BAD[name]))
    for length in range(shows_at, len(BAD[name]) + 1):
        with pytest.raises(ProxyError):
            proxy_header.read(BAD[name][:length])
    with pytest.raises(ProxyError):
        proxy_header.read(BAD[name] + b"more\r\n")


def _is_refused(data: bytes) -> bool:
    try:
        proxy_header.read(data)
    except ProxyError:
        return True
    return False


@pytest.mark.parametrize("line", [b"hello\n", b"G", b"P\n", b"\r\nx", b"PROXIES"])
def test_a_client_without_a_header_is_refused_at_once(line: bytes) -> None:
    """Bytes that cannot become a header are not waited for."""
    assert _is_refused(line)


# -- anything ----------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300) | st.binary(max_size=300).map(SIGNATURE.__add__) | st.binary().map(b"PROXY ".__add__))
@example(b"PROXY TCP6 ::1 ::1 1 1\r\n\r\n")
def test_any_bytes(data: bytes) -> None:
    """An incomplete header fits into the limit, a refused one stays refused, and a complete one stays the same."""
    try:
        found = proxy_header.read(data)
    except ProxyError:
        assert _is_refused(data + b"more")
        return
    if found is None:
        assert len(data) < MAX_BYTES
    else:
        assert 0 < found.length <= len(data)
        assert proxy_header.read(data[: found.length]) == proxy_header.read(data + b"more") == found
        assert all(proxy_header.read(data[:length]) is None for length in range(found.length))


# -- another implementation --------------------------------------------------------------------------------------------

PORTS = st.integers(0, 65535)
V4 = st.tuples(st.integers(0, 2**32 - 1).map(IPv4Address), PORTS)
V6 = st.tuples(st.integers(2**48, 2**128 - 1).map(IPv6Address), PORTS)  # those below hold addresses of IPv4
PATHS = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=107)


def _same(header: bytes, source: Source | None) -> None:
    """Return the header's source; the header is complete, and every split gives the same result."""
    assert proxy_header.read(header) == proxy_header.read(header + b"hello\n") == Header(len(header), source)
    assert all(proxy_header.read(header[:length]) is None for length in range(len(header)))


@given(V4, V4, st.sampled_from([ProxyProtocolV1(), ProxyProtocolV2()]))
def test_ipv4_as_another_implementation_writes_it(
    source: tuple[IPv4Address, int], destination: tuple[IPv4Address, int], version: proxyprotocol.ProxyProtocol
) -> None:
    """The client's address and port, in both versions, and in version 2 with a checksum."""
    _same(version.pack(ProxyResultIPv4(source, destination, protocol=SOCK_STREAM)), (str(source[0]), source[1]))


@given(V6, V6, st.sampled_from([ProxyProtocolV1(), ProxyProtocolV2()]))
def test_ipv6_as_another_implementation_writes_it(
    source: tuple[IPv6Address, int], destination: tuple[IPv6Address, int], version: proxyprotocol.ProxyProtocol
) -> None:
    """The client's address in the format of the socket module, in both versions."""
    _same(version.pack(ProxyResultIPv6(source, destination, protocol=SOCK_STREAM)), (str(source[0]), source[1], 0, 0))


@given(PATHS, PATHS)
def test_unix_as_another_implementation_writes_it(source: str, destination: str) -> None:
    """The path of the client's socket, if it has one."""
    _same(ProxyProtocolV2().pack(ProxyResultUnix(source, destination, protocol=SOCK_STREAM)), source)


@pytest.mark.parametrize("tlv", [ProxyProtocolTLV(), ProxyProtocolTLV(authority="echod.example", unique_id=b"1" * 128)])
def test_local_and_unknown_as_another_implementation_writes_them(tlv: ProxyProtocolTLV) -> None:
    """LOCAL and UNKNOWN name no client."""
    _same(ProxyProtocolV1().pack(ProxyResultUnknown()), None)
    _same(ProxyProtocolV2().pack(ProxyResultLocal(tlv=tlv)), None)
    _same(ProxyProtocolV2().pack(ProxyResultUnknown(tlv=tlv)), None)


@pytest.mark.parametrize("name", GOOD)
def test_another_implementation_reads_the_same(name: str) -> None:
    """It accepts the headers that we accept, and reads the same source."""
    header, source = GOOD[name]
    version = ProxyProtocolV1() if header.startswith(b"PROXY") else ProxyProtocolV2()
    if name in ("v2 Unix, no UTF-8", "v2 Unix, abstract", "v2 LOCAL with what nobody knows", "v2 longest"):
        return  # it reads only ASCII paths, and also the bytes after them
    read = version.unpack(header).source
    if not isinstance(read, tuple):
        assert read == (source if isinstance(source, str) else None) or not read
        return
    host = getattr(read[0], "ipv4_mapped", None) or read[0]
    assert isinstance(source, tuple)
    assert (str(host), read[1]) == source[:2]
