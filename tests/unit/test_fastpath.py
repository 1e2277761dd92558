"""The compiled and the Python fast path, compared with each other and with the line-by-line reference."""

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from echod.protocol.echo import Echo
from echod.server import fastpath
from echod.server.connection import Connection
from echod.server.fastpath import CHUNK_BYTES, PythonHotPath
from tests.support.reference import BROKEN, CASED, LIMIT, OTHERS, SPACES, reference

needs_compiled = pytest.mark.skipif(not fastpath.IS_COMPILED, reason=f"no compiled fast path: {fastpath.WHY_NOT}")

texts = st.lists(st.sampled_from([*CASED, *SPACES, *OTHERS, "plain", " a ", "\x1f"]), max_size=6).map("".join)
lines = texts.map(lambda text: text.encode() + b"\n")
ordinary = st.lists(st.text(st.characters(codec="ascii"), max_size=LIMIT).map(str.encode), max_size=6).map(
    lambda found: b"".join(line.replace(b"\n", b"") + b"\n" for line in found)
)
chunks = st.lists(
    st.one_of(ordinary, lines, texts.map(str.encode), st.binary(max_size=6), st.sampled_from(BROKEN)).filter(bool),
    max_size=12,
)


class Recorder:
    """The methods that a hot path calls: echoes as a connection does, and records the calls."""

    descriptor: int
    is_hot: bool
    line_bytes: int
    hot_lines: int
    bytes_in: int
    bytes_out: int

    def begin(self, ours: socket.socket, line_bytes: int) -> None:
        self.descriptor = ours.fileno()
        self.line_bytes = line_bytes
        self.echo = Echo(line_bytes)
        self.is_hot = True
        self.handed_on: list[bytes] = []
        self.pending = b""
        self.lost: list[int] = []
        self.read_calls = 0

    def _receive(self, chunk: bytes) -> None:
        self.handed_on.append(chunk)
        self.bytes_in += len(chunk)
        replies = self.echo.receive(chunk)
        while self.echo.has_more:
            replies += self.echo.receive_more()
        self.bytes_out += len(replies)
        self.is_hot = self.echo.is_clean
        self.pending += replies
        with contextlib.suppress(BlockingIOError):
            self.pending = self.pending[os.write(self.descriptor, self.pending) if self.pending else 0 :]

    def _read(self) -> None:
        self.read_calls += 1
        self._receive(os.read(self.descriptor, CHUNK_BYTES))

    def _keep_pending(self, replies: bytes) -> None:
        self.pending = replies
        self.is_hot = False

    def _lose(self, error: int) -> None:
        self.lost.append(error)


class InPython(Recorder, PythonHotPath):
    """The Python fast path."""


if fastpath.IS_COMPILED:
    from echod.server._fastpath import HotPath as CompiledHotPath

    class Compiled(Recorder, CompiledHotPath):
        """The compiled fast path."""

    KINDS: list[type[Recorder]] = [InPython, Compiled]
else:
    KINDS = [InPython]


@contextlib.contextmanager
def connected(kind: type[Recorder], line_bytes: int = LIMIT) -> Iterator[tuple[Recorder, socket.socket]]:
    """Yield a hot path on one end of a socket pair, and the other end."""
    ours, client = socket.socketpair()
    with ours, client:
        ours.setblocking(False)
        it = kind()
        it.begin(ours, line_bytes)
        yield it, client


def call(it: Recorder) -> None:
    """Do what the event loop does when the descriptor is readable."""
    it.read_now()  # type: ignore[attr-defined]


def available(client: socket.socket) -> bytes:
    data = b""
    while select.select([client], [], [], 0)[0]:
        data += client.recv(1 << 20)
    return data


def play(kind: type[Recorder], sent: Iterable[bytes], line_bytes: int) -> tuple[list[bytes], int, int, int]:
    """Return the reply to each chunk, and the counters: lines including error lines, bytes in, bytes out."""
    with connected(kind, line_bytes) as (it, client):
        replies = []
        for chunk in sent:
            if it.echo.error:
                break
            client.sendall(chunk)
            call(it)
            replies.append(available(client))
        return replies, it.hot_lines + it.echo.answered + bool(it.echo.error), it.bytes_in, it.bytes_out


@given(chunks, st.sampled_from([LIMIT, 3, 5_000]))
@example([b" \x1c a\x1f\r\n", b"\n", b"\x85\n", b"abc"], LIMIT)
def test_both_paths_answer_each_chunk_as_the_reference(sent: list[bytes], line_bytes: int) -> None:
    """The same chunks get the same replies after each chunk, and the same counts."""
    played = [play(kind, sent, line_bytes) for kind in KINDS]
    assert all(each == played[0] for each in played)
    replies, lines_told, *_ = played[0]
    received = b"".join(sent[: len(replies)])
    assert b"".join(replies) == reference(received, line_bytes, is_ended=False)
    assert lines_told == b"".join(replies).count(b"\n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [LIMIT - 1, LIMIT, LIMIT + 1])
@pytest.mark.parametrize("margin", [b"", b" ", b"\t"])
def test_the_limit_includes_whitespace(kind: type[Recorder], length: int, margin: bytes) -> None:
    """The limit applies to the line as it was received."""
    line = margin + b"x" * (length - len(margin))
    (reply,), *_ = play(kind, [line + b"\n"], LIMIT)
    assert reply == reference(line + b"\n", LIMIT, is_ended=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
@pytest.mark.parametrize("line", [b"\n", b" \n", b"a\n", b"x" * 1023 + b"\n", " é \n".encode()])
def test_chunks_around_the_size_of_the_buffer(kind: type[Recorder], size: int, line: bytes) -> None:
    """One read returns at most CHUNK_BYTES, and the next read the rest."""
    data = (line * (size // len(line) + 1))[: size - 1] + b"\n"
    with connected(kind, CHUNK_BYTES) as (it, client):
        for end in (client, it):
            number = end.fileno() if isinstance(end, socket.socket) else end.descriptor
            with socket.socket(fileno=os.dup(number)) as same:
                same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * CHUNK_BYTES)
        client.sendall(data)
        replies = b""
        while select.select([it.descriptor], [], [], 0)[0]:
            call(it)
            replies += available(client)
        assert replies + it.pending == reference(data, CHUNK_BYTES, is_ended=False)
        assert it.bytes_in == len(data)


@needs_compiled
def test_an_ordinary_chunk_is_answered_without_python() -> None:
    """Every other chunk is passed to Python unchanged."""
    with connected(KINDS[-1]) as (it, client):
        client.sendall(b" one \ntwo\n")
        call(it)
        assert available(client) == b"ONE\nTWO\n"
        assert (it.handed_on, it.hot_lines, it.bytes_in, it.bytes_out) == ([], 2, 10, 8)
        for unusual in (b"partial", b" line\n", "ß\n".encode()):
            client.sendall(unusual)
            call(it)
        assert it.handed_on == [b"partial", b" line\n", "ß\n".encode()]
        client.shutdown(socket.SHUT_WR)
        call(it)
        assert it.handed_on[-1] == b""
        assert it.read_calls == 1, "while it is not hot, Python reads"


@needs_compiled
def test_reads_are_smaller_after_many_short_lines() -> None:
    """An iteration of the event loop stays short however many clients send empty lines."""
    with connected(KINDS[-1], 2_000) as (it, client):
        reads = []
        for line in (b"\n", b"\n", b"x" * 1023 + b"\n", b"x" * 1023 + b"\n"):
            data = line * (32_768 // len(line))
            client.sendall(data)
            left = it.bytes_in + len(data)
            call(it)
            reads.append(len(data) - (left - it.bytes_in))
            while it.bytes_in < left:
                call(it)
            assert available(client) == data.upper()
        assert reads == [32_768, 8_192, 8_192, 32_768]


@pytest.mark.parametrize("kind", KINDS)
def test_replies_that_the_kernel_does_not_accept_are_kept(kind: type[Recorder]) -> None:
    """Every byte is either sent or pending, in order."""
    data = b"0123456789abcdef\n" * 2_000
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_000)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2_000)
        client.connect(listener.getsockname())
        ours, _ = listener.accept()
        with ours:
            ours.setblocking(False)
            it = kind()
            it.begin(ours, 16)
            client.sendall(data)
            while it.bytes_in < len(data):
                call(it)
                assert it.bytes_in == it.bytes_out
            assert it.pending
            received = b""
            while it.pending or len(received) < len(data):
                received += available(client)
                with contextlib.suppress(BlockingIOError):  # what was read may not make room at once
                    it.pending = it.pending[os.write(it.descriptor, it.pending) if it.pending else 0 :]
            assert received == data.upper()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_read_changes_nothing(kind: type[Recorder]) -> None:
    """The event loop may call although another process has read the input."""
    with connected(kind) as (it, _):
        call(it)
        assert (it.handed_on, it.lost, it.bytes_in) == ([], [], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_is_reported_as_an_errno(kind: type[Recorder]) -> None:
    """The read or the send reports it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for sent in (b"", b"a line\n"):
            client = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
            with ours:
                ours.setblocking(False)
                it = kind()
                it.begin(ours, LIMIT)
                client.sendall(sent)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
                if kind is InPython and sent:
                    with pytest.raises(OSError, match=r"reset|pipe"):  # the recorder's own write
                        call(it)
                else:
                    call(it)
                    assert len(it.lost) == 1


@pytest.mark.parametrize("value", ["0", "1", ""])
def test_the_environment_disables_the_compiled_path(value: str) -> None:
    """ECHOD_FASTPATH=0 selects Python; any other value selects the compiled path if it is available."""
    code = "from echod.server import fastpath; print(fastpath.IS_COMPILED, fastpath.WHY_NOT)"
    environment = {**os.environ, "ECHOD_FASTPATH": value}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    is_compiled, _, why_not = said.stdout.strip().partition(" ")
    if value == "0":
        assert (is_compiled, why_not) == ("False", "ECHOD_FASTPATH=0")
    else:
        assert (is_compiled == "True") is not bool(why_not)


@needs_compiled
def test_a_module_built_for_another_version_is_not_used() -> None:
    """An updated checkout that was not built again uses Python, and says what to do."""
    code = (
        "from echod.server import _fastpath\n_fastpath.INTERFACE -= 1\n"
        "from echod.server import fastpath\nprint(fastpath.WHY_NOT)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "it was built for another version of echod; `make fastpath` builds it anew\n"


def test_connections_use_the_selected_path() -> None:
    """The statistics name it (`fast_path`)."""
    assert issubclass(Connection, PythonHotPath) is not fastpath.IS_COMPILED
