"""A single connection on a real socket and the real event loop, with and without the compiled fast path."""

import asyncio
import contextlib
import errno
import socket
import struct
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
import uvloop

from echod.config.schema import Timeouts
from echod.net import sockets
from echod.protocol.echo import SLICE_LINES
from echod.server import fastpath, scheduler, timeouts
from echod.server.connection import Connection, State
from echod.server.fastpath import CHUNK_BYTES
from echod.server.memory import SPARE_BYTES, MemoryLimit
from echod.server.scheduler import Scheduler
from echod.server.state import ConnectionState
from echod.telemetry.reasons import CloseReason
from tests.support.daemon import DEADLINE_S

LINE_BYTES = 65_536
GROWING = "ΐ".encode() * (LINE_BYTES // 2)
"""The longest line, of a character that upper-casing triples."""

Found = TypeVar("Found")


def run(scenario: Coroutine[Any, Any, Found]) -> Found:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(scenario, DEADLINE_S))


class FakeOwner:
    """An owner of connections that records their callbacks."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.scheduler = Scheduler()
        self.memory = MemoryLimit(self._on_full)
        self.memory.set_limit(1 << 30)
        self.full = 0
        self.active: list[Connection] = []
        self.closed: list[Connection] = []
        self._changed = asyncio.Event()

    def _on_full(self) -> None:
        self.full += 1

    def on_active(self, connection: Connection) -> None:
        self.active.append(connection)
        connection.unpark()

    def on_closed(self, connection: Connection) -> None:
        self.closed.append(connection)

    def connection(
        self, ours: socket.socket, *, past: ConnectionState | None = None, kind: type[Connection] = Connection
    ) -> Connection:
        """Return a connection that owns the socket."""
        ours.setblocking(False)
        connection = kind(self, ours.detach(), "", LINE_BYTES, self.loop.time(), is_unix=True)
        if past:
            connection.restore(past)
        return connection

    def open(self, ours: socket.socket, **options: Any) -> Connection:
        """Return a connection that owns the socket and has started to read."""
        connection = self.connection(ours, **options)
        connection.open()
        return connection


async def until(condition: Callable[[], object]) -> None:
    """Return when the condition holds; the scenario has a deadline."""
    while not condition():
        await asyncio.sleep(0)


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield our end and the client's end of a connection."""
    ours, client = socket.socketpair()
    with ours, client:
        ours.setblocking(False)
        client.setblocking(False)
        yield ours, client


@contextlib.contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield our end and the client's end of a TCP connection, which can be reset."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        ours, _ = listener.accept()
        with ours:
            ours.setblocking(False)
            client.setblocking(False)
            yield ours, client


def fill(ours: socket.socket) -> None:
    """Send until the kernel accepts nothing more."""
    for piece in (b"\n" * 4096, b"\n"):
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(piece)


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


async def received(client: socket.socket, size: int) -> bytes:
    """So many bytes, or what came before the end of the stream."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size and (more := await loop.sock_recv(client, size - len(data))):
        data += more
    return data


# -- memory of one client ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [0, 1, 1_000, 16_384, 40_000, 49_151, 49_152, 65_535, 65_536])
def test_one_client_holds_at_most_the_line_limit_and_three_chunks(begun: int) -> None:
    """Unread replies to a line that upper-casing triples, and to more such input after it."""

    async def scenario(ours: socket.socket, client: socket.socket) -> int:
        owner = FakeOwner()
        connection = owner.open(ours)
        await owner.loop.sock_sendall(client, GROWING[:begun])
        await until(lambda: connection.held_bytes == begun)
        sending = owner.loop.create_task(owner.loop.sock_sendall(client, rest))
        await until(lambda: connection.pending)
        held = connection.held_bytes
        sending.cancel()
        connection.abort(CloseReason.CUT)
        return held

    rest = GROWING[begun:] + b"\n" + 1000 * ("ΐ".encode() * 100 + b"\n")
    with pair() as (ours, client):
        fill(ours)
        held = run(scenario(ours, client))
    assert 0 < held <= LINE_BYTES + 3 * CHUNK_BYTES


def test_restored_pending_replies_are_released_when_they_are_sent() -> None:
    """They may be large, and a connection may live for days."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        unsent = b"owed" * 100_000
        before = sys.getrefcount(unsent)
        past = ConnectionState(descriptor=0, family=socket.AF_UNIX, peer=b"", opened_at=0.0, pending=unsent)
        connection = owner.open(ours, past=past)
        del past
        assert await received(client, len(unsent)) == unsent
        await until(lambda: not connection.pending)
        assert sys.getrefcount(unsent) == before
        connection.end_now()

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_sending_pending_replies_takes_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads a large reply in small portions costs no copy of the rest for each of them."""
    portion, portions = 2_048, 8_192

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        unsent = b"0123456789abcdef" * (portion * portions // 16)
        saved = ConnectionState(descriptor=0, family=socket.AF_UNIX, peer=b"", opened_at=0.0, pending=unsent)
        connection = owner.open(ours, past=saved)
        sent: list[bytes] = []

        def write(_: int, data: bytearray) -> int:
            sent.append(bytes(memoryview(data)[:portion]))
            return portion

        monkeypatch.setattr(Connection, "_write", staticmethod(write))
        began_at = time.process_time()
        while connection.held_bytes:
            connection._on_writable()
            assert owner.memory.held_bytes == connection.held_bytes == len(unsent) - portion * len(sent)
        assert time.process_time() - began_at < 2, "copying the rest each time takes tens of seconds"
        monkeypatch.undo()
        assert b"".join(sent) == unsent
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        run(scenario(ours, client))


# -- scheduling --------------------------------------------------------------------------------------------------------


def test_a_client_that_sends_a_lot_does_not_block_others() -> None:
    """Each client gets one read per iteration of the event loop, however much input is left."""

    class Recorded(Connection):
        def _receive(self, chunk: bytes) -> None:
            order.append(self)
            super()._receive(chunk)

    order: list[Connection] = []

    async def scenario(much: socket.socket, little: socket.socket) -> None:
        owner = FakeOwner()
        first, second = owner.open(much, kind=Recorded), owner.open(little, kind=Recorded)
        await until(lambda: order.count(first) >= 2 and second in order)
        assert second in order[:2]
        for each in (first, second):
            each.end_now()

    with pair() as (ours, client), pair() as (others, other):
        other.send("ß\n".encode())  # not ordinary, so that the fast path hands it on
        with contextlib.suppress(BlockingIOError):
            while True:
                client.send("ß".encode() * 500 + b"\n")
        run(scenario(ours, others))


def test_others_are_answered_between_the_steps_of_costly_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of whitespace lines costs as much as many chunks of text; an echo gets in between."""
    monkeypatch.setattr(scheduler, "STEPS_S", 0.0)  # one step in each iteration
    chunk = b" \n" * (CHUNK_BYTES // 2)
    assert chunk.count(b"\n") > SLICE_LINES

    async def scenario(ours: socket.socket, client: socket.socket, others: socket.socket, other: socket.socket) -> None:
        owner = FakeOwner()
        greedy, modest = owner.open(ours), owner.open(others)
        greedy.is_hot = False  # as with bytes that are not ASCII: the fast path answers this quickly by itself
        sending = owner.loop.create_task(owner.loop.sock_sendall(client, chunk))
        await until(lambda: greedy.echo.has_more)
        await owner.loop.sock_sendall(other, b"quick\n")
        answered = greedy.lines
        assert await received(other, 6) == b"QUICK\n"
        assert greedy.echo.has_more
        assert greedy.lines - answered < len(chunk) // 2
        assert await received(client, len(chunk) // 2) == b"\n" * (len(chunk) // 2)
        await sending
        for each in (greedy, modest):
            each.end_now()

    with pair() as (ours, client), pair() as (others, other):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * CHUNK_BYTES)
        run(scenario(ours, client, others, other))


@pytest.fixture
def small_budget() -> Iterator[None]:
    """Limit each iteration of the event loop to five direct reads."""
    fastpath.limit_iteration(check_units=2, budget_units=5)
    yield
    fastpath.limit_iteration()


@pytest.mark.usefixtures("small_budget")
def test_reads_beyond_the_budget_are_postponed() -> None:
    """Otherwise libuv would poll repeatedly, without timers or new descriptors, while enough clients have input."""

    class Recorded(Connection):
        def _postpone(self) -> None:
            postponed.append(self)
            super()._postpone()

    postponed: list[Connection] = []

    async def scenario(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
        owner = FakeOwner()
        connections = [owner.open(ours, kind=Recorded) for ours, _ in pairs]
        for text in ("plain\n", "ß\n", "plain\n"):
            postponed.clear()
            for _, client in pairs:
                client.send(text.encode())
            for _, client in pairs:
                reply = text.upper().encode()
                assert await received(client, len(reply)) == reply
            assert len(pairs) - 8 <= len(postponed) < len(pairs)
        for each in connections:
            each.end_now()

    with contextlib.ExitStack() as stack:
        run(scenario([stack.enter_context(pair()) for _ in range(16)]))


@pytest.mark.usefixtures("small_budget")
def test_a_connection_may_end_before_its_postponed_read() -> None:
    """The postponed read copes with a closed connection and with one that lingers."""

    async def scenario(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
        owner = FakeOwner()
        connections = [owner.open(ours) for ours, _ in pairs]
        for _, client in pairs:
            client.send(b"plain\n")
        for connection in connections:
            connection()  # as the event loop does
        waiting = [each for each in connections if each.bytes_in == 0]
        assert len(waiting) > 8
        waiting[0].abort(CloseReason.CUT)
        waiting[1].finish(CloseReason.DRAINED)
        await until(lambda: all(each.bytes_in or each.state is not State.OPEN for each in connections))
        for each in connections:
            each.end_now()
        assert len(owner.closed) == len(pairs)

    with contextlib.ExitStack() as stack:
        run(scenario([stack.enter_context(pair()) for _ in range(16)]))


def test_costly_input_is_not_continued_while_replies_are_pending_or_after_the_end() -> None:
    """Otherwise the scheduler would take the next step again and again."""

    async def scenario(ours: socket.socket) -> None:
        connection = FakeOwner().open(ours)
        connection._receive(b" \n" * SLICE_LINES * 4)
        assert connection.take_step() is False
        assert connection.pending
        assert connection.echo.has_more
        assert connection.take_step() is False
        connection.abort(CloseReason.CUT)
        assert connection.take_step() is False

    with pair() as (ours, _):
        fill(ours)
        run(scenario(ours))


@pytest.mark.parametrize("is_hot", [False, True])
def test_a_wakeup_without_input_changes_nothing(is_hot: bool) -> None:
    """Poll may report a descriptor that has nothing to read."""

    async def scenario(ours: socket.socket) -> None:
        connection = FakeOwner().open(ours)
        connection.is_hot = is_hot
        connection()
        assert (connection.state, connection.bytes_in) == (State.OPEN, 0)
        connection.close()

    with pair() as (ours, _):
        run(scenario(ours))


def test_unanswered_lines_cross_an_upgrade() -> None:
    """Costly input that was read but not answered is answered by the next program, in order."""
    text = "\n".join(f" ß{number} " for number in range(3_000)) + "\nand a partial"
    data = text.encode()

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        before = owner.connection(ours.dup())
        before._receive(data)
        assert before.echo.has_more
        past = ConnectionState(
            descriptor=0,
            family=socket.AF_UNIX,
            peer=b"",
            opened_at=0.0,
            bytes_in=before.bytes_in,
            lines=before.lines,
            unanswered=before.echo.unanswered,
            activity=before.activity.save(),
        )
        before.close()
        after = owner.open(ours, past=past)
        expected = "".join(f"SS{number}\n" for number in range(3_000)).encode()
        assert await received(client, len(expected)) == expected
        assert after.lines == 3_000
        assert after.echo.unanswered == b"and a partial"
        assert after.bytes_in == len(data)
        after.end_now()

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_a_connection_that_was_ending_at_an_upgrade_ends_after_its_pending_replies() -> None:
    """FLUSHING, LINGERING: input that follows is not answered, and the reason stays."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        past = ConnectionState(
            descriptor=0,
            family=socket.AF_UNIX,
            peer=b"",
            opened_at=0.0,
            pending=b"OWED\n",
            reason=CloseReason.IDLE.value,
        )
        connection = FakeOwner().open(ours, past=past)
        client.send(b"too late\n")
        assert await received(client, 100) == b"OWED\n"
        assert (connection.state, connection.reason) == (State.LINGERING, CloseReason.IDLE)
        assert connection.lines == 0
        connection.close()

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_a_partial_line_that_crossed_an_upgrade_is_completed_by_the_next_program() -> None:
    """The fast path must not answer the rest of it on its own."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        past = ConnectionState(
            descriptor=0, family=socket.AF_UNIX, peer=b"", opened_at=0.0, bytes_in=6, unanswered=b"begun "
        )
        connection = FakeOwner().open(ours, past=past)
        assert not connection.is_hot
        client.send(b"and ended\n")
        assert await received(client, 16) == b"BEGUN AND ENDED\n"
        assert connection.is_hot
        connection.end_now()

    with pair() as (ours, client):
        run(scenario(ours, client))


# -- states ------------------------------------------------------------------------------------------------------------


def test_the_client_ends_its_stream_with_nothing_pending() -> None:
    """OPEN, CLOSED; the last line needs no LF."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        await owner.loop.sock_sendall(client, b"one\ntwo")
        client.shutdown(socket.SHUT_WR)
        assert await received(client, 100) == b"ONE\nTWO\n"
        await until(lambda: owner.closed)
        assert (connection.state, connection.reason, connection.lines) == (State.CLOSED, CloseReason.CLIENT, 2)

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_a_client_that_has_ended_its_stream_is_closed_at_once() -> None:
    """There is nothing left to read, so the connection does not linger."""

    async def scenario(ours: socket.socket) -> None:
        connection = FakeOwner().open(ours)
        connection._receive_end()
        assert connection.state is State.CLOSED

    with pair() as (ours, _):
        run(scenario(ours))


def test_the_client_ends_its_stream_with_replies_pending() -> None:
    """OPEN, FLUSHING, CLOSED: pending replies are sent first."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        await owner.loop.sock_sendall(client, b"a line\n")
        await until(lambda: connection.pending)
        connection._receive_end()
        assert connection.state is State.FLUSHING
        with contextlib.suppress(ConnectionResetError):  # a Unix socket may tell that we closed on unread input
            while await owner.loop.sock_recv(client, CHUNK_BYTES):
                pass
        await until(lambda: owner.closed)
        assert (connection.reason, connection.bytes_out) == (CloseReason.CLIENT, 7)

    with pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


def test_a_finished_connection_lingers_until_the_client_ends_its_stream() -> None:
    """OPEN, LINGERING, CLOSED: our stream ends after the error line, and later input is discarded."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        connection.finish(CloseReason.IDLE, "idle for 1 s")
        connection.finish(CloseReason.DRAINED)
        assert connection.state is State.LINGERING
        await owner.loop.sock_sendall(client, b"too late\n")
        assert await received(client, 100) == b"ERROR idle for 1 s\n"
        client.shutdown(socket.SHUT_WR)
        await until(lambda: owner.closed)
        assert (connection.reason, connection.lines, connection.bytes_in) == (CloseReason.IDLE, 0, 0)

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_lingering_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never ends its stream is closed after LINGER_S."""
    monkeypatch.setattr(sockets, "LINGER_S", 0.05)

    async def scenario(ours: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        connection.finish(CloseReason.DRAINED)
        await until(lambda: owner.closed)
        assert connection.unacknowledged_bytes == 0

    with pair() as (ours, _):
        run(scenario(ours))


def test_pending_replies_are_sent_before_the_error_line() -> None:
    """OPEN, FLUSHING, LINGERING."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        await owner.loop.sock_sendall(client, b"a line\n")
        await until(lambda: connection.pending)
        connection.finish(CloseReason.IDLE, "idle for 1 s")
        assert connection.state.name == "FLUSHING"
        data = b""
        while more := await owner.loop.sock_recv(client, CHUNK_BYTES):
            data += more
        assert data.lstrip(b"\n") == b"A LINE\nERROR idle for 1 s\n"
        assert connection.state is State.LINGERING
        client.close()
        await until(lambda: owner.closed)

    with pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


@pytest.mark.parametrize("sent", [b"", b"a line\n", b"partial", "ß partial".encode(), b"x" * 40_000])
def test_a_reset_is_noticed_even_right_after_input(sent: bytes) -> None:
    """The event loop reports an error once; input before it must not hide it."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        if sent:
            client.send(sent)
        reset(client)
        await until(lambda: owner.closed)
        assert connection.reason is CloseReason.RESET

    with tcp_pair() as (ours, client):
        run(scenario(ours, client))


@pytest.mark.parametrize(("sent", "reason"), [(b"", CloseReason.CLIENT), (b"a line\n", CloseReason.RESET)])
def test_a_health_check_of_a_balancer_may_end_with_a_reset(sent: bytes, reason: CloseReason) -> None:
    """Its PROXY header names no client; it is a lost client only if it has sent a line."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        connection.is_anonymous = True
        if sent:
            client.send(sent)
            await until(lambda: connection.bytes_in)
        reset(client)
        await until(lambda: owner.closed)
        assert connection.reason is reason

    with tcp_pair() as (ours, client):
        run(scenario(ours, client))


def test_a_reset_is_noticed_while_replies_are_pending() -> None:
    """Nothing is read then, but waiting for room to send reports it."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        await until(lambda: client.send(b"a line\n") and connection.pending)
        reset(client)
        await until(lambda: owner.closed)
        assert connection.reason is CloseReason.RESET

    with tcp_pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


def test_a_client_that_resets_after_its_end_of_stream_counts_as_reset() -> None:
    """It has ended its stream, but has not accepted its replies."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        await until(lambda: client.send(b"a line\n") and connection.pending)
        connection._receive_end()
        reset(client)
        await until(lambda: owner.closed)
        assert connection.reason is CloseReason.RESET

    with tcp_pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


def test_a_client_that_resets_before_it_is_served_counts_as_reset() -> None:
    """A client may be gone before its accept."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        reset(client)
        connection = owner.open(ours)
        await until(lambda: owner.closed)
        assert connection.reason is CloseReason.RESET
        assert connection.unread_bytes() == 0
        connection._lose(errno.ECONNRESET)
        connection.abort(CloseReason.CUT)
        assert len(owner.closed) == 1

    with tcp_pair() as (ours, client):
        run(scenario(ours, client))


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begun", "late", "reason"),
    [
        (b"hello\n", b"", CloseReason.IDLE),
        (b"hello\n", b"again\n", None),
        (b"begun", b"", CloseReason.LINE_TIMEOUT),
        (b"begun", b" and ended\n", None),
    ],
)
def test_unread_input_is_in_time(begun: bytes, late: bytes, reason: CloseReason | None) -> None:
    """After a pause, the process reads first and enforces timeouts afterwards."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        limits = Timeouts(idle=1, line=1, write=0)
        connection = owner.open(ours)
        client.send(begun)
        await until(lambda: connection.bytes_in == len(begun))
        timeouts.enforce_timeouts(connection, owner.loop.time(), limits)
        if late:
            client.send(late)
        timeouts.enforce_timeouts(
            connection, owner.loop.time() + 2, limits
        )  # no iteration in between: the input is unread
        assert connection.reason is reason
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_input_unparks_a_connection() -> None:
    """A parked connection is not sampled; its input is answered at once, and it may be hot again."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        now = owner.loop.time()
        connection.sample(now)
        assert connection.is_silent(now + 1)
        connection.park(now + 300)
        assert not connection.is_hot
        client.send(b"hello\n")
        assert await received(client, 6) == b"HELLO\n"
        assert owner.active == [connection]
        assert connection.is_hot
        connection.sample(now + 2)
        assert not connection.is_silent(now + 2)
        connection.end_now()

    with pair() as (ours, client):
        run(scenario(ours, client))


@pytest.mark.parametrize("sent", [b"partial", b"whole\n"])
def test_a_connection_with_work_left_is_never_silent(sent: bytes) -> None:
    """A partial line and an unaccepted reply have timeouts of their own."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        client.send(sent)
        await until(lambda: connection.bytes_in)
        for later in range(3):
            connection.sample(owner.loop.time() + later)
        assert not connection.is_silent(owner.loop.time() + 10)
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        if sent.endswith(b"\n"):
            fill(ours)
        run(scenario(ours, client))


def test_replies_to_costly_input_count_for_the_write_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that accepts none of them is aborted, even if the first sample saw none of them."""
    monkeypatch.setattr(scheduler, "STEPS_S", 0.0)  # one step in each iteration

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        limits = Timeouts(idle=0, line=0, write=1)
        connection = owner.open(ours)
        connection.is_hot = False
        connection._receive(b" \n" * SLICE_LINES * 4)
        assert connection.echo.has_more
        start = owner.loop.time()
        timeouts.enforce_timeouts(connection, start, limits)
        await until(lambda: connection.pending)
        timeouts.enforce_timeouts(connection, start + 1, limits)
        assert not connection.is_silent(start + 2)
        timeouts.enforce_timeouts(connection, start + 3, limits)
        assert connection.reason is CloseReason.WRITE_TIMEOUT

    with pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


@pytest.mark.parametrize(
    ("sent", "limits", "reason"),
    [
        (b"", Timeouts(idle=1, line=0, write=0), CloseReason.IDLE),
        (b"begun", Timeouts(idle=0, line=1, write=0), CloseReason.LINE_TIMEOUT),
        (b"", Timeouts(idle=0, line=0, write=0), None),
        (b"begun", Timeouts(idle=1, line=0, write=0), None),
    ],
)
def test_a_timeout_is_enforced_when_it_has_passed_and_not_before(
    sent: bytes, limits: Timeouts, reason: CloseReason | None
) -> None:
    """A timeout of 0 never ends, and a partial line is not idle."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        client.send(sent)
        await until(lambda: connection.bytes_in == len(sent))
        connection.activity.quiet_since = 100.0
        for now in (100.0, 100.9):
            timeouts.enforce_timeouts(connection, now, limits)
            assert connection.reason is None
        timeouts.enforce_timeouts(connection, 101.0, limits)
        assert connection.reason is reason
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_a_client_that_accepts_none_of_its_replies_is_reset_when_the_write_timeout_has_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a reset, the kernel would keep trying to send what it holds."""
    was_reset: list[int] = []
    monkeypatch.setattr(sockets, "reset_on_close", was_reset.append)

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        connection = FakeOwner().open(ours)
        client.send(b"a line\n")
        await until(lambda: connection.pending)
        limits = Timeouts(idle=0, line=0, write=1)
        for now in (100.0, 100.9):
            timeouts.enforce_timeouts(connection, now, limits)
            assert connection.state is State.OPEN
        timeouts.enforce_timeouts(connection, 101.0, limits)
        assert (connection.state, connection.reason) == (State.CLOSED, CloseReason.WRITE_TIMEOUT)
        assert was_reset == [connection.descriptor]

    with pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


def test_no_timeout_touches_the_descriptor_of_a_closed_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor may already belong to another client, even if the closed one was owed replies."""
    was_reset: list[int] = []
    monkeypatch.setattr(sockets, "reset_on_close", was_reset.append)

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        connection = FakeOwner().open(ours)
        client.send(b"a line\n")
        await until(lambda: connection.pending)
        limits = Timeouts(idle=0, line=0, write=1)
        timeouts.enforce_timeouts(connection, 100.0, limits)
        connection.abort(CloseReason.CUT)
        timeouts.enforce_timeouts(connection, 200.0, limits)
        assert not was_reset
        assert connection.reason is CloseReason.CUT

    with pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


# -- drain -------------------------------------------------------------------------------------------------------------


def test_a_draining_connection_is_finished_once_it_was_quiet_for_long_enough() -> None:
    """The quiet time counts from the beginning of the drain."""

    async def scenario(ours: socket.socket) -> None:
        connection = FakeOwner().open(ours)
        connection.activity.quiet_since = 1.0
        connection.start_draining(100.0)
        for now in (100.0, 100.4):
            timeouts.finish_if_quiet(connection, now, 0.5)
            assert connection.state is State.OPEN
        timeouts.finish_if_quiet(connection, 100.5, 0.5)
        assert (connection.state, connection.reason) == (State.LINGERING, CloseReason.DRAINED)
        connection.close()

    with pair() as (ours, _):
        run(scenario(ours))


@pytest.mark.parametrize("work", ["partial line", "unaccepted reply", "unread input"])
def test_a_draining_connection_with_work_left_is_not_finished(work: str) -> None:
    """Each kind of work alone keeps the connection open, however long ago the last sample saw activity."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        connection = FakeOwner().open(ours)
        client.send(b"begun" if work == "partial line" else b"a line\n")
        if work != "unread input":
            await until(lambda: connection.bytes_in)
        if work == "unaccepted reply":
            connection.sample(100.0)
            assert connection.activity.owed_bytes
        connection.start_draining(100.0)
        timeouts.finish_if_quiet(connection, 200.0, 0.5)
        assert connection.state is State.OPEN
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        if work == "unaccepted reply":
            fill(ours)
        run(scenario(ours, client))


def test_a_client_that_ended_its_stream_while_draining_is_closed_without_a_linger() -> None:
    """LINGERING, CLOSED: it is closed as soon as its kernel has acknowledged every reply."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        connection = FakeOwner().open(ours)
        connection.start_draining(100.0)
        client.send(b"last")
        client.shutdown(socket.SHUT_WR)
        await until(lambda: connection.state is State.LINGERING)
        assert await received(client, 100) == b"LAST\n"
        assert connection.state is State.LINGERING
        timeouts.enforce_timeouts(connection, 100.0, Timeouts())
        timeouts.finish_if_quiet(connection, 100.0, 0.5)
        assert (connection.state, connection.reason) == (State.CLOSED, CloseReason.CLIENT)

    with pair() as (ours, client):
        run(scenario(ours, client))


@pytest.mark.parametrize(("sent", "reason"), [(b"begun", CloseReason.DRAINED), (b"a line\n", CloseReason.CUT)])
def test_at_the_deadline_of_a_drain_only_replies_are_owed(sent: bytes, reason: CloseReason) -> None:
    """A client with a partial line ends cleanly; a client with pending replies is aborted."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        connection = FakeOwner().open(ours)
        client.send(sent)
        await until(lambda: connection.held_bytes)
        timeouts.end_at_line_boundary(connection)
        assert connection.reason is reason
        assert connection.state is (State.CLOSED if reason is CloseReason.CUT else State.LINGERING)
        connection.close()

    with pair() as (ours, client):
        if reason is CloseReason.CUT:
            fill(ours)
        run(scenario(ours, client))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_held_bytes_are_counted_until_they_are_released() -> None:
    """Partial lines, pending replies and unanswered lines count until they are gone."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        client.send(b"partial")
        await until(lambda: owner.memory.held_bytes == 7)
        fill(ours_too)
        client.send(b" line\n")
        await until(lambda: connection.pending)
        assert owner.memory.held_bytes == len(connection.pending) == 13
        connection.abort(CloseReason.CUT)
        assert owner.memory.held_bytes == 0

    with pair() as (ours, client):
        ours_too = ours.dup()
        with ours_too:
            run(scenario(ours, client))


def test_held_bytes_are_counted_after_each_step_of_costly_input() -> None:
    """Bytes that were answered are available to others before the whole chunk is."""

    async def scenario(ours: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        connection._receive(b" \n" * SLICE_LINES * 4)
        before = owner.memory.held_bytes
        assert connection.take_step()
        assert owner.memory.held_bytes == connection.held_bytes < before
        connection.abort(CloseReason.CUT)

    with pair() as (ours, _):
        run(scenario(ours))


def test_a_connection_lost_between_steps_holds_nothing() -> None:
    """Its bytes are released once, whatever was still unanswered."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        connection = owner.open(ours)
        connection._receive(b" ab\xc3\x9f\n" * 5_000)
        assert owner.memory.held_bytes
        client.close()
        await until(lambda: owner.closed)
        assert connection.reason is CloseReason.RESET
        assert owner.memory.held_bytes == 0

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_over_the_limit_only_a_client_that_holds_little_is_read_from() -> None:
    """A client that holds much waits until memory is available, and all others are answered."""

    async def scenario(ours: socket.socket, client: socket.socket, others: socket.socket, other: socket.socket) -> None:
        owner = FakeOwner()
        owner.memory.set_limit(10_000)
        greedy, modest = owner.open(ours), owner.open(others)
        client.send(b"x" * 20_000)
        await until(lambda: owner.full)
        greedy.is_hot = modest.is_hot = False  # as the owner does in `on_exceeded`
        client.send(b"y")
        other.send(b"partial")
        await until(lambda: owner.memory.waiting)
        assert greedy.held_bytes == 20_000
        for _ in range(3):
            other.send(b" line\npartial")
            assert await received(other, 13) == b"PARTIAL LINE\n"
            owner.memory.retry()
        assert greedy.held_bytes == 20_000
        owner.memory.set_limit(1 << 20)
        client.send(b"\n")
        assert await received(client, 20_002) == b"X" * 20_000 + b"Y\n"
        assert not owner.memory.waiting
        for each in (greedy, modest):
            each.abort(CloseReason.CUT)
        assert owner.memory.held_bytes == 0

    with pair() as (ours, client), pair() as (others, other):
        run(scenario(ours, client, others, other))


def test_over_the_limit_reads_are_small() -> None:
    """So many clients that start lines at the same time hardly exceed the limit."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        owner.memory.set_limit(0)
        connection = owner.open(ours)
        owner.memory.add(1)
        connection.is_hot = False
        client.send(b"x" * 50_000)
        await until(lambda: owner.memory.waiting)
        assert SPARE_BYTES < connection.held_bytes <= 2 * SPARE_BYTES
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        run(scenario(ours, client))


@pytest.mark.parametrize("is_retried", [False, True])
def test_a_client_that_waits_for_memory_has_a_line_timeout(is_retried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise clients with partial lines and unread input could hold all memory forever."""
    monkeypatch.setattr(sockets, "LINGER_S", 2 * DEADLINE_S)  # the input is read, so the linger is not waited for

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        limits = Timeouts(idle=0, line=1, write=0)
        owner.memory.set_limit(10_000)
        connection = owner.open(ours)
        client.send(b"x" * 20_000)
        await until(lambda: owner.full)
        connection.is_hot = False  # as the owner does in `on_exceeded`
        client.send(b"x")
        await until(lambda: owner.memory.waiting)
        start = owner.loop.time()
        timeouts.enforce_timeouts(connection, start, limits)
        if is_retried:
            owner.memory.retry()
        timeouts.enforce_timeouts(connection, start + 2, limits)
        assert connection.reason is CloseReason.LINE_TIMEOUT
        assert await received(client, 100) == b"ERROR line not finished within 1 s\n"
        client.shutdown(socket.SHUT_WR)
        await until(lambda: owner.closed)
        assert owner.memory.held_bytes == 0

    with pair() as (ours, client):
        run(scenario(ours, client))


@pytest.mark.parametrize("is_ended", [False, True])
def test_over_the_limit_a_partial_line_may_be_completed(is_ended: bool) -> None:
    """Before a timeout, only its LF or the client's end of stream releases the memory."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        owner.memory.set_limit(19_000)
        connection = owner.open(ours)
        client.send(b"x" * 20_000)
        await until(lambda: owner.full)
        connection.is_hot = False  # as the owner does in `on_exceeded`
        client.send(b"x" * 500)
        await until(lambda: owner.memory.waiting)
        client.send(b"" if is_ended else b"\ny\npartial")
        client.shutdown(socket.SHUT_WR)
        owner.memory.retry()
        assert connection.held_bytes == 20_000
        assert await received(client, 30_000) == b"X" * 20_500 + (b"\n" if is_ended else b"\nY\nPARTIAL\n")
        await until(lambda: owner.closed)
        assert owner.memory.held_bytes == 0

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_far_over_the_limit_no_partial_line_is_completed() -> None:
    """Its reply may need three times the memory, and thousands of clients may complete lines at once."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        owner = FakeOwner()
        owner.memory.set_limit(10_000)
        connection = owner.open(ours)
        client.send(b"x" * 20_000)
        await until(lambda: owner.full)
        connection.is_hot = False  # as the owner does in `on_exceeded`
        client.send(b"\n")
        await until(lambda: owner.memory.waiting)
        assert connection.held_bytes == 20_000
        owner.memory.set_limit(19_000)
        owner.memory.retry()
        assert await received(client, 20_001) == b"X" * 20_000 + b"\n"
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        run(scenario(ours, client))
