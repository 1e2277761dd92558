"""A TLS connection on a real socket and the real event loop: records, close_notify, and waits that cross directions."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from echod.config.schema import Timeouts
from echod.net import tls
from echod.net.tls import TlsSettings
from echod.server import timeouts
from echod.server.connection import State
from echod.server.memory import SPARE_BYTES
from echod.server.tls_connection import TlsConnection
from echod.server.tls_stream import HandshakeError, TlsStream
from echod.telemetry.reasons import CloseReason
from tests.support.daemon import DEADLINE_S
from tests.support.tls import VERSIONS, TlsClient, ca_file, client_context, issue
from tests.unit.test_connection import LINE_BYTES, FakeOwner, reset, run, tcp_pair, until

TEXT = " Straße \r\none\n\nlast".encode()
REPLIES = b"STRASSE\nONE\n\nLAST\n"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    files = issue(tmp_path_factory.mktemp("tls"))
    return tls.load(TlsSettings(certificate=str(files.certificate), key=str(files.key))).context


class Pair:
    """Both ends of a TLS connection whose handshake is complete; the client blocks, so call it in a thread."""

    def __init__(self, ours: socket.socket, client: TlsClient, stream: TlsStream) -> None:
        self._ours = ours
        self.client = client
        self.stream = stream
        client.sock.setblocking(False)

    def shake_hands(self) -> None:
        """Complete the handshake in turns."""
        client = self.client
        while True:
            with contextlib.suppress(BlockingIOError):
                self.stream.handshake()
                break
            with contextlib.suppress(BlockingIOError):
                client.handshake()
        client.sock.settimeout(DEADLINE_S)
        client.handshake()

    def connection(self, owner: FakeOwner) -> TlsConnection:
        return TlsConnection(owner, self._ours.detach(), "", LINE_BYTES, owner.loop.time(), stream=self.stream)


@contextlib.contextmanager
def connected(
    context: ssl.SSLContext, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, kind: type[TlsStream] = TlsStream
) -> Iterator[Pair]:
    """Yield both ends of a TLS connection."""
    with tcp_pair() as (ours, client):
        both = Pair(ours, TlsClient(client, client_context(version)), kind(ours.fileno(), context))
        both.shake_hands()
        yield both


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_records_split_at_every_position_are_answered_byte_exact(
    context: ssl.SSLContext, version: ssl.TLSVersion, full: bool
) -> None:
    """The ciphertext of several records arrives in two pieces, split at each of its bytes."""

    async def scenario(place: int) -> int:
        with connected(context, version) as both:
            owner, client = FakeOwner(), both.client
            connection = both.connection(owner)
            connection.open()
            data = client.records(TEXT[:10]) + client.records(TEXT[10:]) + client.close_notify()
            client.sock.sendall(data[:place])
            for _ in range(3):  # iterations of the event loop, in which the first piece is read
                await asyncio.sleep(0)
            client.sock.sendall(data[place:])
            assert await asyncio.to_thread(client.read_to_end) == REPLIES
            await until(lambda: owner.closed)
            assert connection.reason is CloseReason.CLIENT
            assert (connection.bytes_in, connection.lines) == (len(TEXT), 4)
            return len(data)

    size = run(scenario(0))
    for place in range(1, size + 1, 1 if full else 7):
        run(scenario(place))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [1, 7, 16_384, 65_536])
def test_a_line_may_take_many_records_and_a_record_may_hold_many_lines(
    context: ssl.SSLContext, version: ssl.TLSVersion, size: int
) -> None:
    text = b"x" * 2000 + b"\n" + b"short\n" * 3000 + b"y" * LINE_BYTES + b"\n"
    text = text[-5000:] if size < 10 else text

    async def scenario() -> None:
        with connected(context, version) as both:
            owner, client = FakeOwner(), both.client
            both.connection(owner).open()

            def exchange() -> bytes:
                for start in range(0, len(text), size):
                    client.sendall(text[start : start + size])
                client.half_close()
                return client.read_to_end()

            assert await asyncio.to_thread(exchange) == text.upper()

    run(scenario())


def test_decrypted_input_is_read_although_the_descriptor_stays_silent(context: ssl.SSLContext) -> None:
    """A read that is smaller than a record leaves the rest in OpenSSL, of which the kernel knows nothing."""

    async def scenario() -> None:
        with connected(context) as both:
            owner, client = FakeOwner(), both.client
            connection = both.connection(owner)
            connection.open()
            owner.memory.set_limit(1)
            owner.memory.add(2)  # held by others: each read now brings SPARE_BYTES at most
            text = b"a line of text\n" * (8 * SPARE_BYTES // 15)
            client.sendall(text)
            reading = asyncio.ensure_future(asyncio.to_thread(receive, client, len(text)))
            while not reading.done():
                await asyncio.sleep(0.001)
                owner.memory.retry()  # if the kernel has not acknowledged everything yet, the client has to wait
            assert connection.bytes_in == len(text)
            connection.abort(CloseReason.CUT)

    def receive(client: TlsClient, size: int) -> None:
        while size > 0:
            size -= len(client.recv())

    run(scenario())


# -- ends --------------------------------------------------------------------------------------------------------------


def test_replies_follow_the_client_s_close_notify_and_end_with_ours(context: ssl.SSLContext) -> None:
    async def scenario() -> None:
        with connected(context) as both:
            owner, client = FakeOwner(), both.client
            connection = both.connection(owner)
            connection.open()
            client.sock.sendall(client.records(b"unterminated") + client.close_notify())
            assert await asyncio.to_thread(client.read_to_end) == b"UNTERMINATED\n"
            await until(lambda: owner.closed)
            assert connection.reason is CloseReason.CLIENT

    run(scenario())


@pytest.mark.parametrize("text", [b"one\n", b"one\ntw"])
def test_an_end_of_stream_without_close_notify_is_a_reset(context: ssl.SSLContext, text: bytes) -> None:
    """Whoever can cut the TCP stream could otherwise pass a part of the client's text off as all of it."""

    async def scenario() -> None:
        with connected(context) as both:
            owner, client = FakeOwner(), both.client
            connection = both.connection(owner)
            connection.open()
            client.sendall(text)
            client.sock.shutdown(socket.SHUT_WR)
            await until(lambda: owner.closed)
            assert connection.reason is CloseReason.RESET
            assert client.read_line() == b"ONE\n"
            with pytest.raises(ssl.SSLError):
                client.recv()

    run(scenario())


def test_a_forged_record_is_a_reset(context: ssl.SSLContext) -> None:
    async def scenario() -> None:
        with connected(context) as both:
            owner, client = FakeOwner(), both.client
            connection = both.connection(owner)
            connection.open()
            record = bytearray(client.records(b"line\n"))
            record[-1] ^= 1
            client.sock.sendall(record)
            await until(lambda: owner.closed)
            assert connection.reason is CloseReason.RESET
            assert connection.bytes_in == 0

    run(scenario())


def test_our_half_close_discards_what_the_client_still_sends(context: ssl.SSLContext) -> None:
    """After an error line the client may go on sending; it reads the line and our close_notify, and is not reset."""

    async def scenario() -> None:
        with connected(context) as both:
            owner, client = FakeOwner(), both.client
            connection = both.connection(owner)
            connection.open()
            connection.finish(CloseReason.IDLE, "idle for 1 s")
            client.sendall(b"too late\n" * 10_000)
            assert await asyncio.to_thread(client.read_to_end) == b"ERROR idle for 1 s\n"
            client.half_close()
            await until(lambda: owner.closed)
            assert connection.reason is CloseReason.IDLE
            assert connection.lines == 0

    run(scenario())


def test_input_in_front_of_our_half_close_is_discarded(context: ssl.SSLContext) -> None:
    """OpenSSL refuses to read it once close_notify is sent."""

    async def scenario() -> None:
        with connected(context) as both:
            owner, client = FakeOwner(), both.client
            connection = both.connection(owner)
            connection.open()
            client.sendall(b"too late\n" * 3000)
            connection.finish(CloseReason.IDLE, "idle for 1 s")
            assert await asyncio.to_thread(client.read_to_end) == b"ERROR idle for 1 s\n"
            client.half_close()
            await until(lambda: owner.closed)
            assert connection.reason is CloseReason.IDLE

    run(scenario())


def test_an_aborted_stream_ends_without_close_notify(context: ssl.SSLContext) -> None:
    """The client notices that replies are missing."""

    async def scenario() -> None:
        with connected(context) as both:
            owner, client = FakeOwner(), both.client
            connection = both.connection(owner)
            connection.open()
            client.sendall(b"line\n")
            await until(lambda: connection.lines == 1)
            connection.abort(CloseReason.CUT)
            assert client.read_line() == b"LINE\n"
            with pytest.raises(ssl.SSLEOFError):
                client.recv()

    run(scenario())


def test_a_stream_that_ends_at_once_and_is_owed_nothing_ends_with_close_notify(context: ssl.SSLContext) -> None:
    async def scenario() -> None:
        with connected(context) as both:
            owner, client = FakeOwner(), both.client
            connection = both.connection(owner)
            connection.open()
            client.sendall(b"line\n")
            await until(lambda: connection.lines == 1)
            connection.end_now()
            assert connection.reason is CloseReason.DRAINED
            assert client.read_to_end() == b"LINE\n"

    run(scenario())


class Full(TlsStream):
    """Has no room for close_notify at first."""

    __slots__ = ("refusals",)

    def __init__(self, descriptor: int, context: ssl.SSLContext) -> None:
        super().__init__(descriptor, context)
        self.refusals = 0

    def close_sending(self) -> None:
        self.refusals += 1
        if self.refusals < 3:
            raise BlockingIOError
        super().close_sending()


@pytest.mark.parametrize("is_ended", [True, False], ids=["by the client", "by us"])
def test_close_notify_waits_for_room(context: ssl.SSLContext, *, is_ended: bool) -> None:
    """A client whose replies fill every buffer reads all of them, and then our close_notify."""

    async def scenario() -> None:
        with connected(context, kind=Full) as both:
            owner, client = FakeOwner(), both.client
            connection = both.connection(owner)
            connection.open()
            client.sendall(b"line\n")
            await until(lambda: connection.lines == 1)
            if is_ended:
                client.sock.sendall(client.close_notify())
            else:
                connection.finish(CloseReason.DRAINED)
            await until(lambda: connection.state is State.FLUSHING)
            assert await asyncio.to_thread(client.read_to_end) == b"LINE\n"
            client.sock.close()
            await until(lambda: owner.closed)
            assert connection.reason is (CloseReason.CLIENT if is_ended else CloseReason.DRAINED)

    run(scenario())


# -- waits -------------------------------------------------------------------------------------------------------------


class Updating(TlsStream):
    """Wants to send before it can read, as after a key update that the client has requested."""

    __slots__ = ("has_room", "reads")

    def __init__(self, descriptor: int, context: ssl.SSLContext) -> None:
        super().__init__(descriptor, context)
        self.reads = 0
        self.has_room = False

    def read_into(self, room: memoryview) -> int:
        self.reads += 1
        if not self.has_room:
            self.wants_room = True
            raise BlockingIOError
        return super().read_into(room)


def test_a_read_that_wants_to_send_waits_for_room_and_not_for_input(context: ssl.SSLContext) -> None:
    """Input that OpenSSL does not take would otherwise wake the event loop for ever."""

    async def scenario() -> None:
        with connected(context, kind=Updating) as both:
            owner, client, stream = FakeOwner(), both.client, both.stream
            assert isinstance(stream, Updating)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection = both.connection(owner)
            while not connection.pending:
                connection._send(b"x" * 16_383 + b"\n")
            connection._pending = bytearray()  # nothing is left to send, and there is no room
            connection.open()
            client.sendall(b"line\n")
            await until(lambda: stream.reads == 1)
            for _ in range(10):
                await asyncio.sleep(0.001)
            assert stream.reads == 1
            assert not connection._is_reading
            connection.abort(CloseReason.CUT)

    run(scenario())


def test_a_read_that_wanted_to_send_goes_on_when_there_is_room(context: ssl.SSLContext) -> None:
    async def scenario() -> None:
        with connected(context, kind=Updating) as both:
            owner, client, stream = FakeOwner(), both.client, both.stream
            assert isinstance(stream, Updating)
            connection = both.connection(owner)
            connection.open()
            client.sendall(b"line\n")
            await until(lambda: stream.reads == 2)
            stream.has_room = True
            assert await asyncio.to_thread(client.read_line) == b"LINE\n"
            assert await asyncio.to_thread(client.ask, b"and on\n") == b"AND ON\n"
            connection.abort(CloseReason.CUT)

    run(scenario())


def test_trickled_lines_do_not_keep_a_client_that_never_reads(context: ssl.SSLContext) -> None:
    """Records are larger than replies, so what is written in between must not look like progress."""

    async def scenario() -> None:
        with connected(context) as both:
            owner, client = FakeOwner(), both.client
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection = both.connection(owner)
            with socket.socket(fileno=connection.descriptor) as ours:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                ours.detach()
            connection.open()
            lines = 16
            for number in range(lines):  # more than the client's kernel accepts, less than ours does
                client.sendall(b"x" * 16_000 + b"\n")
                await until(lambda wanted=number + 1: connection.lines == wanted)  # type: ignore[misc]
            await asyncio.sleep(0.1)
            assert not connection.pending
            limits, start = Timeouts(idle=0, line=0, write=1), owner.loop.time()
            for step in range(12):
                timeouts.enforce_timeouts(connection, start + step / 10, limits)
                if owner.closed:
                    break
                assert connection.activity.owed_bytes
                client.sendall(b"x\n")
                await until(lambda wanted=lines + step + 1: connection.lines == wanted)  # type: ignore[misc]
            assert connection.reason is CloseReason.WRITE_TIMEOUT

    run(scenario())


# -- handshake ---------------------------------------------------------------------------------------------------------


def test_a_client_that_has_reset_already_is_a_failed_handshake(context: ssl.SSLContext) -> None:
    with tcp_pair() as (ours, client):
        reset(client)
        descriptor = ours.detach()
        with pytest.raises(HandshakeError, match="not connected"):
            TlsStream(descriptor, context)
        with pytest.raises(OSError, match="Bad file descriptor"):
            socket.socket(fileno=descriptor)


def test_the_name_in_the_client_s_certificate(tmp_path: Path) -> None:
    """The common name, else the first alternative name."""
    files = issue(tmp_path)
    settings = TlsSettings(certificate=str(files.certificate), key=str(files.key), client_ca=str(ca_file(tmp_path)))
    context = tls.load(settings).context
    for common_name, subject in (("Robot 7", "Robot 7"), (None, "robot.example")):
        client = issue(tmp_path, "client", hosts=("robot.example",), common_name=common_name)
        with tcp_pair() as (ours, theirs):
            both = Pair(ours, TlsClient(theirs, client_context(certificate=client)), TlsStream(ours.fileno(), context))
            both.shake_hands()
            assert both.stream.subject == subject
            both.stream.release()
