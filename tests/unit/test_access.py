"""Which clients the networks of a listener admit."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echod.net.access import AccessRules, Networks, pack


@pytest.mark.parametrize(
    ("allow", "deny", "host", "is_admitted"),
    [
        ([], [], "192.0.2.1", True),
        (["10.0.0.0/8"], [], "10.255.0.1", True),
        (["10.0.0.0/8"], [], "11.0.0.1", False),
        (["10.0.0.0/8"], ["10.1.0.0/16"], "10.1.2.3", False),
        (["10.1.2.3"], ["10.0.0.0/8"], "10.1.2.3", False),
        ([], ["0.0.0.0/0"], "192.0.2.1", False),
        ([], ["0.0.0.0/0"], "2001:db8::1", True),
        (["2001:db8::/32"], [], "2001:db8:1::1", True),
        (["2001:db8::/32"], [], "10.0.0.1", False),
        (["10.0.0.0/8"], [], "::ffff:10.0.0.1", True),
        (["::ffff:10.0.0.0/104"], [], "10.0.0.1", True),
        ([], ["::ffff:10.0.0.0/104"], "10.0.0.1", False),
        (["fe80::/10"], [], "fe80::1%eth0", True),
        ([], [], "no address", False),
    ],
)
def test_deny_wins_and_an_empty_allow_admits_every_client(
    allow: list[str], deny: list[str], host: str, is_admitted: bool
) -> None:
    assert AccessRules(allow, deny).admits(host) is is_admitted


ADDRESSES = st.one_of(
    st.integers(0, 2**32 - 1).map(IPv4Address),
    st.integers(0, 2**128 - 1).map(IPv6Address),
)


@given(st.lists(st.tuples(ADDRESSES, st.integers(0, 128))), ADDRESSES)
def test_a_lookup_agrees_with_ipaddress(networks: list[tuple[IPv4Address | IPv6Address, int]], host: object) -> None:
    """For addresses that are not IPv4-mapped, the lookup returns what `ipaddress` says."""
    texts = [f"{address}/{min(length, address.max_prefixlen)}" for address, length in networks]
    parsed = [ip_network(text, strict=False) for text in texts]
    address = ip_address(str(host))
    packed = pack(str(host))
    assert packed is not None
    found = packed in Networks(str(network) for network in parsed)
    assert found is any(address in network for network in parsed)


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.0/33", "example.org", ""])
def test_what_is_no_network_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Networks([text])
