"""The protocol without I/O: the replies depend only on the bytes, never on how they were split into chunks."""

# ruff: noqa: RUF001 (letters that look alike are what this is about)

import time
from collections.abc import Sequence
from itertools import combinations, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from echod.config.schema import Config
from echod.protocol.echo import Echo, LineError, error_line
from tests.support.reference import (
    BROKEN,
    CASED,
    INVALID,
    LIMIT,
    OTHERS,
    SPACES,
    bytewise,
    cut,
    receive,
    reference,
    told,
)

texts = st.lists(
    st.sampled_from([*CASED, *SPACES, *OTHERS]) | st.characters(exclude_categories=["Cs"]), max_size=8
).map("".join)
pieces = st.one_of(
    texts.map(str.encode),
    st.just(b"\n"),
    st.just(b"\r\n"),
    st.binary(max_size=4),
    st.sampled_from(BROKEN),
    st.integers(LIMIT - 1, LIMIT + 1).map(lambda length: b"x" * length),
)
streams = st.lists(pieces, max_size=20).map(b"".join)
valid_streams = st.lists(texts, max_size=12).map(lambda lines: "\n".join(lines).encode())


# -- equal to the reference, however it is cut -------------------------------------------------------------------------


@given(streams, st.data(), st.booleans())
def test_any_bytes_in_any_chunks(data: bytes, draw: st.DataObject, is_ended: bool) -> None:
    """Any bytes, split anywhere, are answered line by line, in order, up to the first bad line."""
    places = draw.draw(st.lists(st.integers(0, len(data)), max_size=10))
    assert told(cut(data, places), is_ended=is_ended) == reference(data, LIMIT, is_ended=is_ended)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=10))
def test_raw_binary(data: bytes, places: list[int]) -> None:
    """Random bytes get the same replies and the same error line, wherever they are split."""
    assert told(cut(data, [min(place, len(data)) for place in places])) == reference(data, LIMIT, is_ended=True)


@given(valid_streams, st.lists(st.integers(0, 100), max_size=10))
@example(data="ς\nΑΣ\nς".encode(), places=[1])
def test_valid_text(data: bytes, places: list[int]) -> None:
    """Valid text never gets an error, and each reply is the message stripped and upper-cased."""
    replies = told(cut(data, [min(place, len(data)) for place in places]), 10_000)
    lines = data.decode().split("\n")
    expected = [line.strip().upper() for line in (lines if lines[-1] else lines[:-1])]
    assert replies.decode() == "".join(f"{line}\n" for line in expected)


@given(streams, st.data())
def test_replies_are_returned_as_soon_as_possible(data: bytes, draw: st.DataObject) -> None:
    """After each chunk, the replies so far are those to everything received so far."""
    echo = Echo(LIMIT)
    replies = b""
    seen = b""
    for chunk in cut(data, draw.draw(st.lists(st.integers(0, len(data)), max_size=6))):
        seen += chunk
        replies += receive(echo, chunk)
        assert replies == reference(seen, LIMIT, is_ended=False)


@pytest.mark.parametrize(
    "data",
    [
        b"ab\r\ncd\n",
        "ß😀ΐ\n ﬃ\n".encode(),
        b"a\n\xe2\x80\nb\n",
        b"\n\n \n",
        b"abcd\nabcde\nx",
        b"ab\ncd",
        b"a\n\xf0\x9f",
    ],
)
def test_every_split(data: bytes) -> None:
    """Every split into up to three chunks, and into single bytes, gets the same replies."""
    expected = reference(data, 11, is_ended=True)
    for places in combinations(range(len(data) + 1), 2):
        assert told(cut(data, places), 11) == expected
    assert told([data], 11) == told(bytewise(data), 11) == expected


def test_every_split_of_a_line_that_is_too_long() -> None:
    """A line over the limit is detected wherever it is split, and the line before it is answered."""
    data = b"ab\nabcdef\ngh\n"
    for places in combinations(range(len(data) + 1), 2):
        assert told(cut(data, places), 5) == b"AB\nERROR line longer than 5 bytes\n"


# -- the words of the contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        (" Straße \r\n", "STRASSE\n"),
        ("\n", "\n"),
        (" \t\r\n", "\n"),
        ("a\u2028b\x0bc\x1cd\x85e\0f\rg\n", "A\u2028B\x0bC\x1cD\x85E\0F\rG\n"),
        ("\u2028a\x85\n", "A\n"),
        ("\0 a\0\n", "\0 A\0\n"),
        ("ὀδυσσεύς\n", "ὈΔΥΣΣΕΎΣ\n"),
        ("ŉ ΐ ﬃ ı ǆ ǅ\n", "\u02bcN \u0399\u0308\u0301 FFI I \u01c4 \u01c4\n"),
        ("error line longer\n", "ERROR LINE LONGER\n"),
    ],
)
def test_examples(message: str, reply: str) -> None:
    """The reply is the text decoded as UTF-8, stripped at both ends and upper-cased; LF is the only line ending."""
    assert told([message.encode()], 100).decode() == reply
    assert told(bytewise(message.encode()), 100).decode() == reply


def test_every_character() -> None:
    """Every Unicode character is upper-cased as by str.upper, in the middle of a word and of a chunk."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and code != 0x0A]
    lines = ["σ".join(["a", *characters[start : start + 64], "a"]) for start in range(0, len(characters), 64)]
    replies = told(["".join([f"{line}\n" for line in lines]).encode()], 1_000).decode().split("\n")
    expected = [
        "Σ".join(["A", *map(str.upper, characters[start : start + 64]), "A"]) for start in range(0, len(characters), 64)
    ]
    assert replies == [*expected, ""]


def test_neighbours_do_not_matter() -> None:
    """The upper case of a character does not depend on its neighbours, within a line and across lines."""
    for left, right in product((*CASED, *SPACES, *OTHERS), repeat=2):
        data = f"{left}{right}\n{right}\n{left}{right}{left}\n".encode()
        assert told([data], 100) == reference(data, 100, is_ended=True)


@pytest.mark.parametrize("length", [254, 255, 256, 257, 1023])
@pytest.mark.parametrize("margin", [*SPACES, *OTHERS, " \r", ""])
def test_long_lines(margin: str, length: int) -> None:
    """Each long line is stripped at both ends, whatever the others contain; one of them may be short."""
    long = "x" * length
    for odd in (f"{margin}{long}", f"{long}{margin}", f"{long}{margin}{long}", margin, "short"):
        for lines in ([long, odd, long], [odd, long], [long, odd]):
            data = "".join(f"{line}\n" for line in lines).encode()
            echo = Echo(5_000)
            assert receive(echo, data) == reference(data, 5_000, is_ended=True)
            assert echo.answered == len(lines)


@given(streams)
def test_no_lower_case(data: bytes) -> None:
    """Replies contain no lower-case ASCII letter, so no reply can look like an error line."""
    echo = Echo(LIMIT)
    lines = (receive(echo, data) + echo.finish()).splitlines(keepends=True)
    if echo.error:
        error = lines.pop()
        assert error.startswith(b"ERROR ")
        assert error.upper() != error
    assert not any(97 <= byte <= 122 for line in lines for byte in line)


# -- the last line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"", b""),
        (b"a\n", b""),
        (b"a\nb", b"B\n"),
        (b" ", b"\n"),
        (b"\r", b"\n"),
        (b"\xc3", INVALID),
        (b"a\n\xe2\x80", INVALID),
        (b"x" * LIMIT, b"X" * LIMIT + b"\n"),
    ],
)
def test_unterminated_last_line(data: bytes, reply: bytes) -> None:
    """A non-empty, unterminated last line is a message too, answered at the end of the stream."""
    echo = Echo(LIMIT)
    receive(echo, data)
    assert echo.finish() == reply


def test_finish_answers_once() -> None:
    """The last line is answered once, and no partial line is left."""
    echo = Echo(LIMIT)
    receive(echo, b"ab")
    assert echo.partial_bytes == 2
    assert echo.finish() == b"AB\n"
    assert echo.finish() == b""
    assert echo.partial_bytes == 0


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"a\n\xff\nb\n", LineError.INVALID_UTF8),
        (b"a\n\xff\nb", LineError.INVALID_UTF8),
        (b"a\n" + b"x" * 13 + b"\nb\n", LineError.LINE_TOO_LONG),
        (b"a\n" + b"x" * 13 + b"\nb", LineError.LINE_TOO_LONG),
        (b"a\n" + b"x" * 13, LineError.LINE_TOO_LONG),
    ],
)
def test_nothing_after_an_error(data: bytes, fault: LineError) -> None:
    """After an error line nothing is answered, counted or kept."""
    echo = Echo(LIMIT)
    assert echo.error is None
    assert receive(echo, data).startswith(b"A\nERROR ")
    assert echo.error is fault
    assert receive(echo, b"c\nd") == receive(echo, b"\n") == receive(echo, b"x" * 100) == echo.finish() == b""
    assert (echo.answered, echo.partial_bytes) == (1, 0)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\xff\n" + b"x" * 13 + b"\n", INVALID),
        (b"x" * 13 + b"\n\xff\n", b"ERROR line longer than 12 bytes\n"),
        (b"\xff" * 13 + b"\n", b"ERROR line longer than 12 bytes\n"),
        (b"\xff\n" + b"x" * 13, INVALID),
        (b"\xff" + b"x" * 12, b"ERROR line longer than 12 bytes\n"),
    ],
)
def test_the_first_error_counts(data: bytes, error: bytes) -> None:
    """Of several bad lines the first is reported, even if all arrive at once; its length is checked first."""
    assert told([data]) == told(bytewise(data)) == error


def test_a_partial_line_is_not_decoded() -> None:
    """A UTF-8 sequence split between chunks is no error; a line is checked when it is complete."""
    echo = Echo(LIMIT)
    assert receive(echo, b"\xff") == b""
    assert echo.error is None
    assert receive(echo, b"\n") == INVALID


def test_error_lines() -> None:
    """An error line is ERROR, a space, the text and LF."""
    assert error_line("too many connections") == b"ERROR too many connections\n"


# -- the limit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [b"", b"ab\n", b"ab\n\ncd\n" * 20])
@pytest.mark.parametrize("after", [b"", b"ef\n", b"ef\n\ngh\n" * 20, b"ef"])
@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_limit(before: bytes, after: bytes, excess: int) -> None:
    """A line of `line_bytes` without its LF is answered, and one more byte is an error, however it is split."""
    data = before + b"x" * (LIMIT + excess) + b"\n" + after
    expected = reference(data, LIMIT, is_ended=True)
    assert (b"ERROR line longer than 12 bytes\n" in expected) == (excess > 0)
    assert told(bytewise(data)) == expected
    for place in range(len(data) + 1):
        assert told(cut(data, [place])) == expected


def test_limit_without_line_end() -> None:
    """A line over the limit is refused as soon as it exceeds the limit, not when it ends."""
    echo = Echo(LIMIT)
    assert receive(echo, b"a\n" + b"x" * LIMIT) == b"A\n"
    assert receive(echo, b"x") == b"ERROR line longer than 12 bytes\n"


def test_default_limit() -> None:
    """A line may be 65536 bytes long by default; a longer one gets `ERROR line longer than 65536 bytes`."""
    limit = Config().limits.line_bytes
    longest = b"x" * 65_536
    assert told([longest + b"\n"], limit) == longest.upper() + b"\n"
    assert told([longest, b"\n"], limit) == longest.upper() + b"\n"
    assert told([b"a\n" + longest + b"x"], limit) == b"A\nERROR line longer than 65536 bytes\n"


def test_limit_counts_bytes() -> None:
    """The limit counts received bytes, not characters, and includes whitespace."""
    assert told(["ßßß".encode() + b"\n"], 6) == b"SSSSSS\n"
    assert told(["ßßß".encode() + b"\n"], 5) == b"ERROR line longer than 5 bytes\n"
    assert told([b"a     \n"], 5) == b"ERROR line longer than 5 bytes\n"


@pytest.mark.parametrize(
    ("begun", "new_limit", "rest", "reply"),
    [
        (b"abcdef", 6, b"\n", b"ABCDEF\n"),
        (b"abcdef", 5, b"\n", b"ERROR line longer than 5 bytes\n"),
        (b"abcdef", 5, b"g", b"ERROR line longer than 5 bytes\n"),
        (b"", 5, b"abcdef\n", b"ERROR line longer than 5 bytes\n"),
        (b"abcdef", 20, b"x" * 14 + b"\n", b"ABCDEF" + b"X" * 14 + b"\n"),
        (b"abcdef", 20, b"x" * 15, b"ERROR line longer than 20 bytes\n"),
    ],
)
def test_limit_changed_live(begun: bytes, new_limit: int, rest: bytes, reply: bytes) -> None:
    """A new limit applies immediately, also to the partial line."""
    echo = Echo(LIMIT)
    assert receive(echo, begun) == b""
    echo.line_bytes = new_limit
    assert receive(echo, rest) == reply


def test_limit_lowered_before_the_end_of_stream() -> None:
    """An unterminated last line is checked against the limit in force when the stream ends."""
    echo = Echo(LIMIT)
    receive(echo, b"abcdef")
    echo.line_bytes = 5
    assert echo.finish() == b"ERROR line longer than 5 bytes\n"


# -- counting and cost -------------------------------------------------------------------------------------------------


@given(streams, st.lists(st.integers(0, 200), max_size=5))
def test_answered(data: bytes, places: Sequence[int]) -> None:
    """`answered` counts the messages that got a reply; an error line is not one."""
    echo = Echo(LIMIT)
    chunks = cut(data, [min(place, len(data)) for place in places])
    replies = b"".join([receive(echo, chunk) for chunk in chunks]) + echo.finish()
    assert echo.answered == replies.count(b"\n") - bool(echo.error)


def _seconds_for_more(begun_bytes: int) -> float:
    echo = Echo(16_000_000)
    receive(echo, b"x" * begun_bytes)
    receive(echo, b"x")  # which may have to move the line once
    started_at = time.perf_counter()
    for _ in range(100):
        receive(echo, b"x")
    return time.perf_counter() - started_at


def test_the_cost_of_a_byte_does_not_depend_on_the_length_of_its_line() -> None:
    """A line that arrives byte by byte is neither copied nor searched again for each byte."""
    short = min(_seconds_for_more(1) for _ in range(5))
    long = min(_seconds_for_more(8_000_000) for _ in range(5))
    assert long < 50 * short  # about 1; copying would make it some thousands
