"""One connection alone, on a real socket and the real loop, with the fast path and without it."""

import asyncio
import contextlib
import errno
import os
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


class Keeper:
    """Owns connections, and notes what they tell."""

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
        """A connection that takes that end over."""
        ours.setblocking(False)
        connection = kind(self, ours.detach(), "", LINE_BYTES, self.loop.time(), is_unix=True)
        if past:
            connection.restore(past)
        return connection

    def open(self, ours: socket.socket, **options: Any) -> Connection:
        """The same, begun."""
        connection = self.connection(ours, **options)
        connection.open()
        return connection


async def until(condition: Callable[[], object]) -> None:
    """Return when the condition holds; the scenario has a deadline."""
    while not condition():
        await asyncio.sleep(0)


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end and the client's."""
    ours, client = socket.socketpair()
    with ours, client:
        ours.setblocking(False)
        client.setblocking(False)
        yield ours, client


@contextlib.contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end and the client's, over TCP, which can be reset."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        ours, _ = listener.accept()
        with ours:
            ours.setblocking(False)
            client.setblocking(False)
            yield ours, client


def fill(ours: socket.socket) -> None:
    """Send until the kernel takes nothing more."""
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


# -- what one client may hold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [0, 1, 1_000, 16_384, 40_000, 49_151, 49_152, 65_535, 65_536])
def test_one_client_holds_at_most_the_line_limit_and_three_chunks(begun: int) -> None:
    """Replies that nobody reads, to a line that upper-casing triples and to more of that kind after it."""

    async def scenario(ours: socket.socket, client: socket.socket) -> int:
        keeper = Keeper()
        connection = keeper.open(ours)
        await keeper.loop.sock_sendall(client, GROWING[:begun])
        await until(lambda: connection.held_bytes == begun)
        sending = keeper.loop.create_task(keeper.loop.sock_sendall(client, rest))
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


def test_what_was_owed_before_an_upgrade_is_forgotten_when_it_was_taken() -> None:
    """It may be much, and a connection may live for days."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        unsent = b"owed" * 100_000
        before = sys.getrefcount(unsent)
        past = ConnectionState(descriptor=0, family=socket.AF_UNIX, peer=b"", opened_at=0.0, pending=unsent)
        connection = keeper.open(ours, past=past)
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
        keeper = Keeper()
        unsent = b"0123456789abcdef" * (portion * portions // 16)
        saved = ConnectionState(descriptor=0, family=socket.AF_UNIX, peer=b"", opened_at=0.0, pending=unsent)
        connection = keeper.open(ours, past=saved)
        sent: list[bytes] = []

        def write(_: int, data: bytearray) -> int:
            sent.append(bytes(memoryview(data)[:portion]))
            return portion

        monkeypatch.setattr(os, "write", write)
        began_at = time.process_time()
        while connection.held_bytes:
            connection._on_writable()
            assert keeper.memory.held_bytes == connection.held_bytes == len(unsent) - portion * len(sent)
        assert time.process_time() - began_at < 2, "copying the rest each time takes tens of seconds"
        monkeypatch.undo()
        assert b"".join(sent) == unsent
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        run(scenario(ours, client))


# -- turns -------------------------------------------------------------------------------------------------------------


def test_a_client_that_sends_much_at_once_leaves_others_their_turn() -> None:
    """After a chunk it is the next one's turn, however much more there is."""

    class Noted(Connection):
        def _receive(self, chunk: bytes) -> None:
            order.append(self)
            super()._receive(chunk)

    order: list[Connection] = []

    async def scenario(much: socket.socket, little: socket.socket) -> None:
        keeper = Keeper()
        first, second = keeper.open(much, kind=Noted), keeper.open(little, kind=Noted)
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


def test_costly_input_waits_its_turn_and_everyone_else_is_answered_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of whitespace lines, each of which costs as much as a whole chunk of text: an echo comes in between."""
    monkeypatch.setattr(scheduler, "STEPS_S", 0.0)  # one step a turn
    chunk = b" \n" * (CHUNK_BYTES // 2)
    assert chunk.count(b"\n") > SLICE_LINES

    async def scenario(ours: socket.socket, client: socket.socket, others: socket.socket, other: socket.socket) -> None:
        keeper = Keeper()
        greedy, modest = keeper.open(ours), keeper.open(others)
        greedy.is_hot = False  # as with bytes that are not ASCII: the fast path answers this quickly by itself
        sending = keeper.loop.create_task(keeper.loop.sock_sendall(client, chunk))
        await until(lambda: greedy.echo.has_more)
        await keeper.loop.sock_sendall(other, b"quick\n")
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
def short_turns() -> Iterator[None]:
    """Turns of the event loop have room for five reads."""
    fastpath.limit_iteration(check_units=2, budget_units=5)
    yield
    fastpath.limit_iteration()


@pytest.mark.usefixtures("short_turns")
def test_where_very_many_have_input_the_event_loop_turns_between_them() -> None:
    """Else the loop polls again and again, without a timer or a new descriptor, while enough of them are ready."""

    class Noted(Connection):
        def _postpone(self) -> None:
            postponed.append(self)
            super()._postpone()

    postponed: list[Connection] = []

    async def scenario(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
        keeper = Keeper()
        connections = [keeper.open(ours, kind=Noted) for ours, _ in pairs]
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


@pytest.mark.usefixtures("short_turns")
def test_a_client_that_is_gone_before_its_turn_to_be_read_from_is_no_trouble() -> None:
    """Neither its end, nor a reset, nor replies that became pending meanwhile."""

    async def scenario(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
        keeper = Keeper()
        connections = [keeper.open(ours) for ours, _ in pairs]
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
        assert len(keeper.closed) == len(pairs)

    with contextlib.ExitStack() as stack:
        run(scenario([stack.enter_context(pair()) for _ in range(16)]))


def test_lines_that_wait_their_turn_cross_an_upgrade() -> None:
    """What was read and not answered yet is handed over, and answered by the next program, in order."""
    text = "\n".join(f" ß{number} " for number in range(3_000)) + "\nand a partial"
    data = text.encode()

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        before = keeper.connection(ours.dup())
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
        after = keeper.open(ours, past=past)
        expected = "".join(f"SS{number}\n" for number in range(3_000)).encode()
        assert await received(client, len(expected)) == expected
        assert after.lines == 3_000
        assert after.echo.unanswered == b"and a partial"
        assert after.bytes_in == len(data)
        after.end_now()

    with pair() as (ours, client):
        run(scenario(ours, client))


# -- states ------------------------------------------------------------------------------------------------------------


def test_the_client_ends_its_stream_with_nothing_pending() -> None:
    """OPEN, CLOSED; its last line needs no line feed."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        await keeper.loop.sock_sendall(client, b"one\ntwo")
        client.shutdown(socket.SHUT_WR)
        assert await received(client, 100) == b"ONE\nTWO\n"
        await until(lambda: keeper.closed)
        assert (connection.state, connection.reason, connection.lines) == (State.CLOSED, CloseReason.CLIENT, 2)

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_the_client_ends_its_stream_with_replies_pending() -> None:
    """OPEN, FLUSHING, CLOSED: what it is owed comes first."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        await keeper.loop.sock_sendall(client, b"a line\n")
        await until(lambda: connection.pending)
        connection._receive_end()
        assert connection.state is State.FLUSHING
        with contextlib.suppress(ConnectionResetError):  # a Unix socket may tell that we closed on unread input
            while await keeper.loop.sock_recv(client, CHUNK_BYTES):
                pass
        await until(lambda: keeper.closed)
        assert (connection.reason, connection.bytes_out) == (CloseReason.CLIENT, 7)

    with pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


def test_finished_it_lingers_until_the_client_ends_its_stream() -> None:
    """OPEN, LINGERING, CLOSED: the error line comes with an end of stream, and what still arrives is dropped."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        connection.finish(CloseReason.IDLE, "idle for 1 s")
        connection.finish(CloseReason.DRAINED)
        assert connection.state is State.LINGERING
        await keeper.loop.sock_sendall(client, b"too late\n")
        assert await received(client, 100) == b"ERROR idle for 1 s\n"
        client.shutdown(socket.SHUT_WR)
        await until(lambda: keeper.closed)
        assert (connection.reason, connection.lines, connection.bytes_in) == (CloseReason.IDLE, 0, 0)

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_it_lingers_no_longer_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never ends its stream is closed all the same."""
    monkeypatch.setattr(sockets, "LINGER_S", 0.05)

    async def scenario(ours: socket.socket) -> None:
        keeper = Keeper()
        keeper.open(ours).finish(CloseReason.DRAINED)
        await until(lambda: keeper.closed)

    with pair() as (ours, _):
        run(scenario(ours))


def test_finished_with_replies_pending_it_sends_them_first() -> None:
    """OPEN, FLUSHING, LINGERING: the error line comes after what the client was owed."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        await keeper.loop.sock_sendall(client, b"a line\n")
        await until(lambda: connection.pending)
        connection.finish(CloseReason.IDLE, "idle for 1 s")
        assert connection.state.name == "FLUSHING"
        data = b""
        while more := await keeper.loop.sock_recv(client, CHUNK_BYTES):
            data += more
        assert data.lstrip(b"\n") == b"A LINE\nERROR idle for 1 s\n"
        assert connection.state is State.LINGERING
        client.close()
        await until(lambda: keeper.closed)

    with pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


@pytest.mark.parametrize("sent", [b"", b"a line\n", b"partial", "ß partial".encode(), b"x" * 40_000])
def test_a_reset_is_noticed_even_right_after_input(sent: bytes) -> None:
    """The event loop tells of an error once; input that came before it must not hide it."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        if sent:
            client.send(sent)
        reset(client)
        await until(lambda: keeper.closed)
        assert connection.reason is CloseReason.RESET

    with tcp_pair() as (ours, client):
        run(scenario(ours, client))


def test_a_reset_is_noticed_while_replies_are_pending() -> None:
    """Nothing is read then, but the wish to send tells."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        await until(lambda: client.send(b"a line\n") and connection.pending)
        reset(client)
        await until(lambda: keeper.closed)
        assert connection.reason is CloseReason.RESET

    with tcp_pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


def test_a_client_that_resets_after_its_end_of_stream_counts_as_reset() -> None:
    """It ended its stream, but didn't take what it was owed."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        await until(lambda: client.send(b"a line\n") and connection.pending)
        connection._receive_end()
        reset(client)
        await until(lambda: keeper.closed)
        assert connection.reason is CloseReason.RESET

    with tcp_pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


def test_what_failed_before_it_was_opened_is_lost() -> None:
    """A client that resets before its accept is counted as any other."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        reset(client)
        connection = keeper.open(ours)
        await until(lambda: keeper.closed)
        assert connection.reason is CloseReason.RESET
        assert connection.unread_bytes() == 0
        connection._lose(errno.ECONNRESET)
        connection.abort(CloseReason.CUT)
        assert len(keeper.closed) == 1

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
def test_what_has_arrived_and_was_not_read_is_in_time(begun: bytes, late: bytes, reason: CloseReason | None) -> None:
    """A process that was stopped for a while reads before it calls anyone idle or slow."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        limits = Timeouts(idle=1, line=1, write=0)
        connection = keeper.open(ours)
        client.send(begun)
        await until(lambda: connection.bytes_in == len(begun))
        timeouts.enforce_timeouts(connection, keeper.loop.time(), limits)
        if late:
            client.send(late)
        timeouts.enforce_timeouts(
            connection, keeper.loop.time() + 2, limits
        )  # no turn of the loop in between: it wasn't read
        assert connection.reason is reason
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_a_parked_connection_comes_back_with_its_next_input() -> None:
    """Nobody looks at it until then; its input is answered at once, and the next chunk may be answered fast again."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        now = keeper.loop.time()
        connection.sample(now)
        assert connection.is_silent(now + 1)
        connection.park(now + 300)
        assert not connection.is_hot
        client.send(b"hello\n")
        assert await received(client, 6) == b"HELLO\n"
        assert keeper.active == [connection]
        assert connection.is_hot
        connection.sample(now + 2)
        assert not connection.is_silent(now + 2)
        connection.end_now()

    with pair() as (ours, client):
        run(scenario(ours, client))


@pytest.mark.parametrize("sent", [b"partial", b"whole\n"])
def test_a_connection_that_is_not_at_rest_is_never_silent(sent: bytes) -> None:
    """A partial line, or a reply that nobody takes, has a timeout of its own."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        client.send(sent)
        await until(lambda: connection.bytes_in)
        for later in range(3):
            connection.sample(keeper.loop.time() + later)
        assert not connection.is_silent(keeper.loop.time() + 10)
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        if sent.endswith(b"\n"):
            fill(ours)
        run(scenario(ours, client))


def test_replies_that_wait_their_turn_past_a_look_are_owed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes none of them is aborted, although nothing of it was owed when its input was first seen."""
    monkeypatch.setattr(scheduler, "STEPS_S", 0.0)  # one step a turn

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        limits = Timeouts(idle=0, line=0, write=1)
        connection = keeper.open(ours)
        connection.is_hot = False
        connection._receive(b" \n" * SLICE_LINES * 4)
        assert connection.echo.has_more
        start = keeper.loop.time()
        timeouts.enforce_timeouts(connection, start, limits)
        await until(lambda: connection.pending)
        timeouts.enforce_timeouts(connection, start + 1, limits)
        assert not connection.is_silent(start + 2)
        timeouts.enforce_timeouts(connection, start + 3, limits)
        assert connection.reason is CloseReason.WRITE_TIMEOUT

    with pair() as (ours, client):
        fill(ours)
        run(scenario(ours, client))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_what_clients_hold_is_counted_and_given_back() -> None:
    """Partial lines, pending replies and lines that wait their turn count until they are gone."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        client.send(b"partial")
        await until(lambda: keeper.memory.held_bytes == 7)
        fill(ours_too)
        client.send(b" line\n")
        await until(lambda: connection.pending)
        assert keeper.memory.held_bytes == len(connection.pending) == 13
        connection.abort(CloseReason.CUT)
        assert keeper.memory.held_bytes == 0

    with pair() as (ours, client):
        ours_too = ours.dup()
        with ours_too:
            run(scenario(ours, client))


def test_a_client_that_is_lost_while_it_takes_its_turn_holds_nothing() -> None:
    """What it held is given back once, whatever was still to be answered."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        connection = keeper.open(ours)
        connection._receive(b" ab\xc3\x9f\n" * 5_000)
        assert keeper.memory.held_bytes
        client.close()
        await until(lambda: keeper.closed)
        assert connection.reason is CloseReason.RESET
        assert keeper.memory.held_bytes == 0

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_over_the_limit_only_a_client_that_holds_little_is_read_from() -> None:
    """Who holds much waits until there is memory again, and everyone else is answered."""

    async def scenario(ours: socket.socket, client: socket.socket, others: socket.socket, other: socket.socket) -> None:
        keeper = Keeper()
        keeper.memory.set_limit(10_000)
        greedy, modest = keeper.open(ours), keeper.open(others)
        client.send(b"x" * 20_000)
        await until(lambda: keeper.full)
        greedy.is_hot = modest.is_hot = False  # as the owner does when it is told
        client.send(b"y")
        other.send(b"partial")
        await until(lambda: keeper.memory.waiting)
        assert greedy.held_bytes == 20_000
        for _ in range(3):
            other.send(b" line\npartial")
            assert await received(other, 13) == b"PARTIAL LINE\n"
            keeper.memory.retry()
        assert greedy.held_bytes == 20_000
        keeper.memory.set_limit(1 << 20)
        client.send(b"\n")
        assert await received(client, 20_002) == b"X" * 20_000 + b"Y\n"
        assert not keeper.memory.waiting
        for each in (greedy, modest):
            each.abort(CloseReason.CUT)
        assert keeper.memory.held_bytes == 0

    with pair() as (ours, client), pair() as (others, other):
        run(scenario(ours, client, others, other))


def test_over_the_limit_no_read_brings_more_than_a_little() -> None:
    """So many clients that begin at once exceed it by next to nothing."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        keeper.memory.set_limit(0)
        connection = keeper.open(ours)
        keeper.memory.add(1)
        connection.is_hot = False
        client.send(b"x" * 50_000)
        await until(lambda: keeper.memory.waiting)
        assert SPARE_BYTES < connection.held_bytes <= 2 * SPARE_BYTES
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_a_client_that_waits_for_memory_has_a_line_timeout_all_the_same() -> None:
    """Or clients that hold all of it by partial lines, and have sent more, would keep it for ever."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        limits = Timeouts(idle=0, line=1, write=0)
        keeper.memory.set_limit(10_000)
        connection = keeper.open(ours)
        client.send(b"x" * 20_000)
        await until(lambda: keeper.full)
        connection.is_hot = False  # as the owner does when it is told
        client.send(b"x")
        await until(lambda: keeper.memory.waiting)
        start = keeper.loop.time()
        timeouts.enforce_timeouts(connection, start, limits)
        keeper.memory.retry()
        timeouts.enforce_timeouts(connection, start + 2, limits)
        assert connection.reason is CloseReason.LINE_TIMEOUT
        connection.close()
        assert keeper.memory.held_bytes == 0

    with pair() as (ours, client):
        run(scenario(ours, client))


@pytest.mark.parametrize("is_ended", [False, True])
def test_over_the_limit_a_partial_line_may_still_end(is_ended: bool) -> None:
    """Only that gives the memory back before a timeout: its line feed, or the client's end of stream."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        keeper.memory.set_limit(19_000)
        connection = keeper.open(ours)
        client.send(b"x" * 20_000)
        await until(lambda: keeper.full)
        connection.is_hot = False  # as the owner does when it is told
        client.send(b"x" * 500)
        await until(lambda: keeper.memory.waiting)
        client.send(b"" if is_ended else b"\ny\npartial")
        client.shutdown(socket.SHUT_WR)
        keeper.memory.retry()
        assert connection.held_bytes == 20_000
        assert await received(client, 30_000) == b"X" * 20_500 + (b"\n" if is_ended else b"\nY\nPARTIAL\n")
        await until(lambda: keeper.closed)
        assert keeper.memory.held_bytes == 0

    with pair() as (ours, client):
        run(scenario(ours, client))


def test_far_over_the_limit_no_partial_line_is_read_to_its_end() -> None:
    """Its reply may take three times the memory, and thousands of clients may end their lines at once."""

    async def scenario(ours: socket.socket, client: socket.socket) -> None:
        keeper = Keeper()
        keeper.memory.set_limit(10_000)
        connection = keeper.open(ours)
        client.send(b"x" * 20_000)
        await until(lambda: keeper.full)
        connection.is_hot = False  # as the owner does when it is told
        client.send(b"\n")
        await until(lambda: keeper.memory.waiting)
        assert connection.held_bytes == 20_000
        keeper.memory.set_limit(19_000)
        keeper.memory.retry()
        assert await received(client, 20_001) == b"X" * 20_000 + b"\n"
        connection.abort(CloseReason.CUT)

    with pair() as (ours, client):
        run(scenario(ours, client))
