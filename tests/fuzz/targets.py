"""Fuzz targets: each takes any bytes, and raises if echod handles them wrongly.

The first bytes of an input are options, so that a fuzzer can vary them too.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from echod.config.loader import ConfigError, load
from echod.config.schema import KEYS, SECTIONS, Config
from echod.config.sources import Setting
from echod.config.toml import render
from echod.net.address import parse_address
from echod.protocol.echo import Echo
from tests.support.reference import BROKEN, CASED, LIMIT, OTHERS, SPACES, bytewise, cut, receive, reference, told

MOST_CUTS = 16

OPEN_FILES = 1024
"""So few descriptors that the default of connections is lowered, and a value that is set may be refused."""


@dataclass(frozen=True, slots=True)
class Target:
    """A check with a dictionary of words, and seeds to begin with."""

    check: Callable[[bytes], None]
    words: Sequence[bytes]
    seeds: Sequence[bytes]


# -- the protocol ------------------------------------------------------------------------------------------------------


def pack(line_bytes: int, lengths: Sequence[int], stream: bytes) -> bytes:
    """Return an input of `protocol`: the limit of a line, the lengths of chunks, and the stream."""
    return bytes([line_bytes - 1, len(lengths), *lengths]) + stream


def _unpack(data: bytes) -> tuple[int, list[bytes]]:
    line_bytes, count = [byte + 1 for byte in data[:1]] or [1], [byte % MOST_CUTS for byte in data[1:2]] or [0]
    lengths, stream = data[2 : 2 + count[0]], data[2 + count[0] :]
    return line_bytes[0], cut(stream, [min(place, len(stream)) for place in accumulate(lengths)])


def protocol(data: bytes) -> None:
    """Check that after each chunk, and byte by byte, the replies are those of the reference."""
    line_bytes, chunks = _unpack(data)
    echo = Echo(line_bytes)
    seen = replies = b""
    for chunk in chunks:
        seen += chunk
        replies += receive(echo, chunk)
        assert replies == reference(seen, line_bytes, is_ended=False)
        assert echo.partial_bytes == (0 if echo.error else len(seen.rpartition(b"\n")[2]))
    replies += echo.finish()
    assert replies == reference(seen, line_bytes, is_ended=True)
    assert replies == told([seen], line_bytes) == told(bytewise(seen), line_bytes)
    assert echo.answered == replies.count(b"\n") - bool(echo.error)
    assert echo.partial_bytes == 0


# -- the configuration -------------------------------------------------------------------------------------------------


def settings(data: bytes) -> None:
    """Check that a file, variables and flags, separated by NUL, round-trip or raise ConfigError.

    Each fault is one line that begins with its source.
    """
    file, *others = data.split(b"\0")
    told_apart = [os.fsdecode(other).partition("=") for other in others]
    environment = {name: value for name, _, value in told_apart if name.startswith("ECHOD_")}
    flags = [Setting("--set", name, value) for name, _, value in told_apart if not name.startswith("ECHOD_")]
    try:
        loaded = load(_file(file), environment, flags, OPEN_FILES)
    except ConfigError as error:
        faults = error.errors
    else:
        assert load(_file(render(loaded.config).encode()), {}, (), OPEN_FILES).config == loaded.config
        return
    assert faults
    for fault in faults:
        assert fault.startswith((f"{_file(file)}: ", "ECHOD_", "--set: ", "default: ")), fault
        assert fault.isprintable(), fault


def _file(content: bytes) -> str:
    os.pwrite(_memory(), content, 0)
    os.truncate(_memory(), len(content))
    return f"/proc/self/fd/{_memory()}"


@cache
def _memory() -> int:
    return os.memfd_create("fuzz")


# -- addresses ---------------------------------------------------------------------------------------------------------


def address(data: bytes) -> None:
    """Check that any text is an address that round-trips, or raises a ValueError with the reason."""
    try:
        parsed = parse_address(os.fsdecode(data))
    except UnicodeError:
        raise  # a ValueError, but not about addresses
    except ValueError:
        return
    assert parse_address(str(parsed)) == parsed


# -- what is worth trying ----------------------------------------------------------------------------------------------

TARGETS = {
    "protocol": Target(
        protocol,
        [*(text.encode() for text in (*CASED, *SPACES, *OTHERS)), *BROKEN, b"\n", b"\r\n", b"x" * LIMIT],
        [pack(LIMIT, [1, 3, 0, 2], " Straße \r\n\nab\ncd".encode()), pack(256, [9], "ς\u3000\n".encode() * 9)],
    ),
    "settings": Target(
        settings,
        [
            *(f"{key.partition('.')[2]} = ".encode() for key in KEYS),
            *(f"\0{key}=".encode() for key in [*KEYS, "listen", "log.colour"]),
            *(f"\0ECHOD_{key.replace('.', '_').upper()}=".encode() for key in [*KEYS, "listen", "limit", "log.levels"]),
            *(f"[{section}]\n".encode() for section in SECTIONS),
            *(
                b"[[listen]]\n",
                b'address = "127.0.0.1:0"\n',
                b'address = "unix:/',
                b"[[limits]]\n",
                b"limits.",
                b"listen = ",
            ),
            *(
                b"\n",
                b'"',
                b"'",
                b'"""',
                b"=",
                b"{",
                b"}",
                b"[",
                b"]",
                b",",
                b"#",
                b"\\u0000",
                b"\\u007f",
                b"\xff",
                b"\xef\xbb\xbf",
            ),
            *(
                b"0",
                b"1",
                b"-1",
                b"1e400",
                b"-0.0",
                b"inf",
                b"nan",
                b"0x10",
                b"1_000",
                b"9" * 25,
                b"31536000.5",
                b"16777217",
            ),
            *(b"true", b"1979-05-27T07:32:00Z", b"debug", b'"json"', b"auto", b"Info", b"a:1", b"[::1]:80", b"unix:/a"),
        ],
        [
            render(Config(), with_comments=True).encode(),
            b"[limits]\nconnections = 2\n\0ECHOD_LISTEN=a:1,[::1]:2\0timeouts.idle=0.5\0log.level=debug",
        ],
    ),
    "address": Target(
        address,
        [
            b"unix:",
            b"unix:/",
            b"[",
            b"]:",
            b":",
            b"::",
            b"%",
            b"/",
            b".",
            b"0",
            b"65535",
            b"65536",
            b"127.0.0.1",
            b"ffff",
            b"localhost",
            b"a-b_c",
            b" ",
            b"\0",
            b"\n",
            b"\xff",
            "é１".encode(),
            b"x" * 100,
        ],
        [b"127.0.0.1:8888", b"[fe80::1%eth0]:80", b"unix:/run/echod.sock", b"localhost:0"],
    ),
}
