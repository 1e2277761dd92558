"""Which clients may connect: the networks that a listener allows and denies."""

import socket
from collections.abc import Iterable

MAPPED = bytes(10) + b"\xff\xff"
"""The first twelve bytes of an IPv4-mapped IPv6 address (RFC 4291, 2.5.5.2)."""


class Networks:
    """A set of networks; a lookup takes one set access for each prefix length that occurs, however many there are."""

    def __init__(self, networks: Iterable[str]) -> None:
        """`networks` are in CIDR notation, IPv4-mapped ones as IPv6; raise ValueError for any other text."""
        from ipaddress import ip_network  # 6 ms that only a configuration with networks needs

        self._by_prefix: dict[tuple[int, int], set[int]] = {}
        for text in networks:
            network = ip_network(text)
            packed, length = network.network_address.packed, network.prefixlen
            if packed.startswith(MAPPED) and length >= 96:
                packed, length = packed[12:], length - 96
            shift = len(packed) * 8 - length
            self._by_prefix.setdefault((len(packed), shift), set()).add(int.from_bytes(packed, "big") >> shift)

    def __contains__(self, packed: bytes) -> bool:
        """Whether the address, as `pack` returns it, is in one of the networks."""
        number, size = int.from_bytes(packed, "big"), len(packed)
        return any(
            bytes_ == size and number >> shift in prefixes for (bytes_, shift), prefixes in self._by_prefix.items()
        )


class AccessRules:
    """What a listener allows and denies; `deny` wins over `allow`, and an empty `allow` allows every client."""

    def __init__(self, allow: Iterable[str], deny: Iterable[str]) -> None:
        allow = tuple(allow)
        self._allow = Networks(allow) if allow else None
        self._deny = Networks(deny)

    def admits(self, host: str) -> bool:
        """Whether a client of this IP address may connect; False if it is no IP address."""
        packed = pack(host)
        return packed is not None and packed not in self._deny and (self._allow is None or packed in self._allow)


def wrong_network(text: str) -> str:
    """Say what is wrong with a network in CIDR notation; "" if nothing is."""
    from ipaddress import ip_network

    try:
        ip_network(text)
    except ValueError as error:
        reason = "host bits set" if "host bits" in str(error) else "expected a network, such as 10.0.0.0/8"
        return f"{text!r}: {reason}"
    return ""


def pack(host: str) -> bytes | None:
    """Return the bytes of an IP address, 4 of an IPv4-mapped one, or None if it is none; a zone (%eth0) is ignored."""
    try:
        packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0]) if ":" in host else socket.inet_aton(host)
    except OSError:
        return None
    return packed[12:] if packed.startswith(MAPPED) else packed
