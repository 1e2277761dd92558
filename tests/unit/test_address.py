"""Addresses as people write them, and the errors of invalid ones."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from echod.net.address import UNIX_PATH_BYTES, Address, SystemdAddress, TcpAddress, UnixAddress, identity, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8888", TcpAddress("127.0.0.1", 8888)),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("my_host.example-1.org:65535", TcpAddress("my_host.example-1.org", 65535)),
        ("[::1]:80", TcpAddress("::1", 80)),
        ("[::]:0", TcpAddress("::", 0)),
        ("[::ffff:10.0.0.1]:80", TcpAddress("::ffff:10.0.0.1", 80)),
        ("[fe80::1%eth0.1]:80", TcpAddress("fe80::1%eth0.1", 80)),
        ("unix:/run/echod.sock", UnixAddress("/run/echod.sock")),
        ("unix:/a b:0", UnixAddress("/a b:0")),
        ("unix:/ß", UnixAddress("/ß")),
        ("systemd:web", SystemdAddress("web")),
        ("systemd:echod.socket", SystemdAddress("echod.socket")),
    ],
)
def test_good(text: str, address: Address) -> None:
    """An address is host:port, [v6]:port or unix:/path, and is shown as it was written."""
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["systemd:", "systemd:a:b", "systemd:ß", "systemd:a\n"])
def test_bad_systemd_name(text: str) -> None:
    """A name must be one that FileDescriptorName= can set (systemd.socket(5))."""
    with pytest.raises(ValueError, match=r"^expected a name that FileDescriptorName= in the socket unit can set$"):
        parse_address(text)


def test_leading_zeros_of_a_port_are_ignored() -> None:
    """A port is a number: 0080 is 80."""
    assert parse_address("a:0080") == TcpAddress("a", 80)


@pytest.mark.parametrize("text", ["", "a", "8888", "localhost"])
def test_no_port(text: str) -> None:
    """Without a colon there is no port, and the error names all three forms."""
    with pytest.raises(ValueError, match=r"^expected host:port, \[v6\]:port or unix:/path$"):
        parse_address(text)


@pytest.mark.parametrize(
    "text",
    ["a:", "a:x", "a:65536", "a:99999", "a:-1", "a:+1", "a:1 ", "a:1\n", "a:\uff11", "[::1]:x", "a:1e3", "a:000080"],
)
def test_bad_port(text: str) -> None:
    """A port is a decimal number from 0 to 65535, in ASCII digits."""
    with pytest.raises(ValueError, match=r"^expected a port from 0 to 65535$"):
        parse_address(text)


@pytest.mark.parametrize("text", ["::1:80", "::1", "[::1]", "[::1:80", "::1]:80", "2001:db8::1:80"])
def test_ipv6_without_brackets(text: str) -> None:
    """Without brackets, the last group of an IPv6 address could be a port."""
    with pytest.raises(ValueError, match=r"^expected an IPv6 address in brackets, \[v6\]:port$"):
        parse_address(text)


def test_no_host() -> None:
    """An address needs a host."""
    with pytest.raises(ValueError, match=r"^no host; 0.0.0.0:PORT or \[::\]:PORT listens on every address$"):
        parse_address(":80")


@pytest.mark.parametrize("text", [" a:1", "a b:1", "a\n:1", "a\0:1", "é:1", "*:1", "tcp://a:1", "a/b:1"])
def test_bad_host(text: str) -> None:
    """A host is a name or an IP address without spaces or other characters around it."""
    with pytest.raises(ValueError, match=r"^expected a host name or an IP address before the port$"):
        parse_address(text)


@pytest.mark.parametrize("text", ["[]:80", "[a]:1", "[127.0.0.1]:1", "[:::]:1", "[:]:1", "[1::2::3]:1"])
def test_bad_ipv6(text: str) -> None:
    """Brackets contain an IPv6 address."""
    with pytest.raises(ValueError, match=r"^not an IPv6 address$"):
        parse_address(text)


@pytest.mark.parametrize("text", ["999.9.9.9:1", "1.2.3:1", "127.0.0.01:1", "127.1:1", "1:1"])
def test_bad_ipv4(text: str) -> None:
    """Digits and dots must be an IPv4 address in its usual form."""
    with pytest.raises(ValueError, match=r"^not an IPv4 address$"):
        parse_address(text)


@pytest.mark.parametrize("text", ["unix:", "unix:a", "unix:./a", "unix:@abstract", "unix: /a"])
def test_relative_path(text: str) -> None:
    """The path of a Unix socket is absolute, because a daemon's working directory varies."""
    with pytest.raises(ValueError, match=r"^expected an absolute path, unix:/path$"):
        parse_address(text)


@pytest.mark.parametrize("letter", ["x", "ß"])
def test_longest_path(letter: str) -> None:
    """The length of a path is limited by sun_path and counts bytes."""
    fitting = "/" + "x" * ((UNIX_PATH_BYTES - 1) % len(letter.encode()))
    fitting += letter * ((UNIX_PATH_BYTES - len(fitting)) // len(letter.encode()))
    assert len(fitting.encode()) == UNIX_PATH_BYTES == 107
    assert parse_address(f"unix:{fitting}") == UnixAddress(fitting)
    with pytest.raises(ValueError, match=r"^path longer than 107 bytes$"):
        parse_address(f"unix:{fitting}x")


def test_nul_in_path() -> None:
    """NUL would end the path in the kernel."""
    with pytest.raises(ValueError, match=r"^a path cannot contain NUL$"):
        parse_address("unix:/a\0b")


@given(st.text() | st.from_regex(r"(unix:/?)?\[?[0-9a-f:.%]*\]?:[0-9]*"))
@example("unix:/\udcff")
@example("[:::]:1")
def test_anything_is_an_address_or_a_value_error(text: str) -> None:
    """Any text is either refused or parsed, and a parsed address is shown so that it parses to the same."""
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("127.0.0.1:1", "[::ffff:127.0.0.1]:1"),
        ("127.0.0.1:1", "[::FFFF:7F00:0001]:1"),
        ("[::1]:1", "[0:0:0:0:0:0:0:1]:1"),
        ("[fe80::1%eth0]:1", "[fe80:0::1%eth0]:1"),
        ("a.example:1", "A.EXAMPLE:01"),
        ("unix:/x/q", "unix:/x//q"),
        ("unix:/x/q", "unix:///x/./y/../q"),
    ],
)
def test_two_spellings_of_one_address(one: str, other: str) -> None:
    """They have the same identity, although each is shown as it was written."""
    assert identity(parse_address(one)) == identity(parse_address(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("127.0.0.1:1", "[::127.0.0.1]:1"),
        ("127.0.0.1:1", "127.0.0.1:2"),
        ("[fe80::1%a]:1", "[fe80::1%b]:1"),
        ("unix:/x/q", "unix:/x/Q"),
        ("systemd:web", "systemd:Web"),
    ],
)
def test_two_addresses(one: str, other: str) -> None:
    """Different addresses have different identities."""
    assert identity(parse_address(one)) != identity(parse_address(other))


def test_a_path_through_a_symbolic_link(tmp_path: Path) -> None:
    """Links in the directory are followed; the last component is the socket's own name and is not."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "q").symlink_to("elsewhere")
    assert identity(UnixAddress(f"{tmp_path}/link/q")) == UnixAddress(f"{tmp_path}/real/q")
