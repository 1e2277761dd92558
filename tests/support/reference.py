"""A reference implementation of the protocol, one line at a time: slow, and simple enough to be trusted."""

# ruff: noqa: RUF001 (letters that look alike are what this is about)

from collections.abc import Iterable
from itertools import pairwise

from echod.protocol.echo import Echo

LIMIT = 12
"""A limit that short random lines often exceed."""

INVALID = b"ERROR invalid utf-8\n"

# Characters whose upper case is longer, depends on context, is irregular or missing; then every kind of white space,
# and what other tools take for a line ending.
CASED = ("ß", "ŉ", "ΐ", "ﬃ", "ς", "σ", "Σ", "ı", "i\u0307", "İ", "ǅ", "ǆ", "ᾳ", "\u0345", "ÿ", "µ", "𐐨", "և", "ẞ")
SPACES = (" ", "\t", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0", "\u2028", "\u2029", "\u3000")
OTHERS = ("\0", "a", "Z", "\x7f", "\ufeff", "\u200b", "😀", "ERROR ")
BROKEN = (b"\xff", b"\x80", b"\xc3", b"\xe2\x80", b"\xf0\x9f\x98", b"\xc0\x8a", b"\xed\xa0\x80", b"\xf4\x90\x80\x80")


def reference(data: bytes, line_bytes: int, *, is_ended: bool) -> bytes:
    """Return the replies to the data: every message before the bad one is answered, then the error, then nothing."""
    *lines, last = data.split(b"\n")
    too_long = b"ERROR line longer than %d bytes\n" % line_bytes
    replies = b""
    for line in [*lines, last] if is_ended and last else lines:
        if len(line) > line_bytes:
            return replies + too_long
        try:
            replies += (line.decode().strip().upper() + "\n").encode()
        except UnicodeDecodeError:
            return replies + INVALID
    return replies + too_long if len(last) > line_bytes and not is_ended else replies


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    return [data[start:end] for start, end in pairwise([0, *sorted(places), len(data)])]


def receive(echo: Echo, chunk: bytes) -> bytes:
    """Return every reply that the chunk completes, in as many turns as it takes."""
    replies = echo.receive(chunk)
    while echo.has_more:
        replies += echo.receive_more()
    return replies


def told(chunks: Iterable[bytes], line_bytes: int = LIMIT, *, is_ended: bool = True) -> bytes:
    """Return everything that a client receives that sends these chunks."""
    echo = Echo(line_bytes)
    replies = b"".join([receive(echo, chunk) for chunk in chunks])
    return replies + echo.finish() if is_ended else replies


def bytewise(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]
