"""One connection alone, on a real socket and the real loop."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator

import pytest
import uvloop

from echod import deadlines
from echod.config import Timeouts
from echod.connection import CHUNK_BYTES, Connection
from echod.handover import Past

LINE_BYTES = 65_536
GROWING = "ΐ".encode() * (LINE_BYTES // 2)
"""The longest line, of a character that upper-casing triples."""


@contextlib.contextmanager
def _full_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end and the client's, where ours takes nothing more to send."""
    ours, client = socket.socketpair()
    with ours, client:
        ours.setblocking(False)
        client.setblocking(False)
        for piece in (b"\n" * 4096, b"\n"):
            with contextlib.suppress(BlockingIOError):
                while True:
                    ours.send(piece)
        yield ours, client


async def _held(ours: socket.socket, client: socket.socket, begun: int, rest: bytes) -> int:
    """What a connection holds that has read so much of a growing line and then as much of `rest` as it will."""
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()
    connection = Connection(ours, "", LINE_BYTES, loop.time(), lambda _: closed.set())
    await loop.connect_accepted_socket(lambda: connection, ours)
    await loop.sock_sendall(client, GROWING[:begun])
    while connection.held_bytes != begun:
        await asyncio.sleep(0)
    sending = loop.create_task(loop.sock_sendall(client, rest))
    while connection.unsent_bytes == 0:
        await asyncio.sleep(0)
    held = connection.held_bytes
    sending.cancel()
    connection.cut_off("cut")
    await closed.wait()
    return held


@pytest.mark.parametrize("begun", [0, 1, 1_000, 16_384, 40_000, 49_151, 49_152, 65_535, 65_536])
def test_one_client_holds_at_most_the_line_limit_and_three_chunks(begun: int) -> None:
    """Replies that nobody reads, to a line that upper-casing triples and to more of that kind behind it."""
    rest = GROWING[begun:] + b"\n" + 1000 * ("ΐ".encode() * 100 + b"\n")
    with _full_pair() as (ours, client), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        held = runner.run(_held(ours, client, begun, rest))
    assert 0 < held <= LINE_BYTES + 3 * CHUNK_BYTES


async def _references_to_unsent(ours: socket.socket, client: socket.socket) -> tuple[int, int]:
    """How often what a client was owed by the program before is held: before it is known, and when it was taken."""
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()
    unsent = b"owed" * 100_000
    before = sys.getrefcount(unsent)
    connection = Connection(ours, "", LINE_BYTES, loop.time(), lambda _: closed.set())
    connection.resume(Past(descriptor=ours.fileno(), family=ours.family, peer=b"", opened_at=0.0, unsent=unsent))
    await loop.connect_accepted_socket(lambda: connection, ours)
    left = len(unsent)
    while left:
        left -= len(await loop.sock_recv(client, left))
    while connection.unsent_bytes:
        await asyncio.sleep(0)
    after = sys.getrefcount(unsent)
    connection.end_now()
    await closed.wait()
    return before, after


def test_what_was_owed_before_an_upgrade_is_forgotten_when_it_was_taken() -> None:
    """It may be much, and a connection may live for days."""
    ours, client = socket.socketpair()
    with ours, client, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ours.setblocking(False)
        client.setblocking(False)
        before, after = runner.run(_references_to_unsent(ours, client))
    assert after == before


class Noted(Connection):
    """A connection that notes each of its reads."""

    name: str
    reads: list[str]

    def buffer_updated(self, nbytes: int) -> None:
        self.reads.append(self.name)
        super().buffer_updated(nbytes)


async def _order_of_reads(pairs: dict[str, tuple[socket.socket, socket.socket]]) -> list[str]:
    """Whose turn it was, read by read, when all of them have something to read at once."""
    loop = asyncio.get_running_loop()
    reads: list[str] = []
    gone = asyncio.Semaphore(0)
    connections = []
    for name, (ours, client) in pairs.items():
        connection = Noted(ours, "", LINE_BYTES, loop.time(), lambda _: gone.release())
        connection.name, connection.reads = name, reads
        connections.append(connection)
        client.shutdown(socket.SHUT_WR)
    await asyncio.gather(
        *(
            loop.connect_accepted_socket(lambda it=it: it, pair[0])  # type: ignore[misc]
            for it, pair in zip(connections, pairs.values(), strict=True)
        )
    )
    for _ in connections:
        await gone.acquire()
    return reads


def test_a_client_that_sends_much_at_once_leaves_others_their_turn() -> None:
    """After a chunk it is the next one's turn, however much more there is."""
    with contextlib.ExitStack() as opened:
        pairs = {}
        for name, sent in (("much", b"x" * 1023 + b"\n"), ("little", b"")):
            ours, client = (opened.enter_context(end) for end in socket.socketpair())
            ours.setblocking(False)
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while sent:
                    client.send(sent)
            if not sent:
                client.send(b"line\n")
            pairs[name] = (ours, client)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            reads = runner.run(_order_of_reads(pairs))
    assert reads.count("much") >= 2
    assert "little" in reads[:2]


async def _reason_when_time_is_over(
    ours: socket.socket, client: socket.socket, begun: bytes, late: bytes
) -> str | None:
    """Why it ends a client that sent `late` in time to a process that hadn't read it when its time was over."""
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()
    timeouts = Timeouts(idle=1, line=1, write=0)
    connection = Connection(ours, "", LINE_BYTES, loop.time(), lambda _: closed.set())
    await loop.connect_accepted_socket(lambda: connection, ours)
    client.send(begun)
    while connection.bytes_in < len(begun):
        await asyncio.sleep(0)
    deadlines.tend(connection, loop.time(), timeouts)
    client.send(late)
    deadlines.tend(connection, loop.time() + 2, timeouts)  # no turn of the loop in between: it can't have been read
    reason = connection.reason
    connection.cut_off("cut")
    await closed.wait()
    return reason


@pytest.mark.parametrize(
    ("begun", "late", "reason"),
    [
        (b"hello\n", b"", "idle"),
        (b"hello\n", b"again\n", None),
        (b"begun", b"", "line timeout"),
        (b"begun", b" and ended\n", None),
    ],
)
def test_what_has_arrived_and_was_not_read_is_in_time(begun: bytes, late: bytes, reason: str | None) -> None:
    """A process that was stopped for a while reads before it calls anyone idle or slow."""
    ours, client = socket.socketpair()
    with ours, client, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ours.setblocking(False)
        assert runner.run(_reason_when_time_is_over(ours, client, begun, late)) == reason
