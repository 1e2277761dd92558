"""Slow clients: in sending lines, or in reading replies."""

import asyncio
import contextlib
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest

from tests.faults.measurements import Figures, Usage, scene
from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, serving, settings, settled

LORISES = 2000
LINE_S = 4.0

STUCK = 200
QUIET = 20
WRITE_S = 5.0
LINE_BYTES = CHUNK_BYTES = 65_536
STUCK_BYTES = LINE_BYTES + 3 * CHUNK_BYTES
"""The most bytes that one client can make echod hold: a partial line, and the replies to a chunk, tripled."""

GROWING = "\u0390"
"""Two bytes of UTF-8, six in upper case: the largest growth there is."""


@pytest.mark.timeout(120)
def test_2_000_slow_lorises_end_within_the_line_timeout(report: Callable[[Figures], None]) -> None:
    """2 000 clients that send a byte a second all get the error and are closed within the `line` timeout."""
    with serving(*settings(timeouts_line=LINE_S)) as echod:
        with scene("2 000 slow lorises", echod) as it:
            ends = asyncio.run(_slow_lorises(echod.port))
        closed = echod.stats()["connections"]["closed"]
        slowest = max(seconds for _, seconds in ends)
        it.notes |= {"counted": f"line timeout {closed['line timeout']}", "last gone after s": round(slowest, 2)}
        report(it.row())
        assert {received for received, _ in ends} == {b"ERROR line not finished within 4 s\n"}
        assert closed["line timeout"] == len(ends) == LORISES
        assert min(seconds for _, seconds in ends) >= LINE_S
        assert slowest < LINE_S + 2
        it.assert_bystander_unaffected()


async def _slow_lorises(port: int) -> list[tuple[bytes, float]]:
    return await asyncio.gather(*(_slow_loris(port, number) for number in range(LORISES)))


async def _slow_loris(port: int, number: int) -> tuple[bytes, float]:
    """Return what the client received, and the time from its first byte to the end of its stream."""
    await asyncio.sleep(number * 0.0005)  # slowly: floods have tests of their own
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic()
    received = asyncio.ensure_future(reader.read())
    while not received.done():
        with contextlib.suppress(ConnectionError):
            writer.write(b"z")
        await asyncio.wait([received], timeout=1.0)
    seconds = time.monotonic() - began
    writer.close()
    return received.result(), seconds


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "lines",
    [
        pytest.param("no reply is read\n" * 4096, id="short lines"),
        pytest.param(GROWING * 32_767 + "\n", id="long lines that grow"),
    ],
)
def test_200_clients_that_never_read_are_aborted_and_others_served(
    lines: str, request: pytest.FixtureRequest, report: Callable[[Figures], None]
) -> None:
    """200 clients that pipeline and never read are bounded in memory and aborted at the `write` timeout."""
    with serving(*settings(timeouts_write=WRITE_S)) as echod, contextlib.ExitStack() as clients:
        quiet = [clients.enter_context(connect(echod.port)) for _ in range(QUIET)]
        assert {ask(client, b"before\n") for client in quiet} == {b"BEFORE\n"}
        idle = Usage.of(echod.pid)
        with scene(f"{STUCK} never read: {request.node.callspec.id}", echod) as it:
            ends = asyncio.run(_never_read(echod.port, lines.encode()))
        closed = settled(echod, QUIET)["connections"]["closed"]
        after = Usage.of(echod.pid)
        it.notes |= {
            "counted": f"write timeout {closed['write timeout']}, reset {closed['reset']}",
            "clients saw": dict(Counter(end.error for end in ends)),
            "KB each": it.grown_bytes // STUCK // 1024,
            "memory MB after": f"{after.rss_bytes / 1e6:.1f}",
            "gone after s": f"{min(end.after_s for end in ends):.2f}",
            "at most, once stuck": f"{max(end.stuck_s for end in ends):.2f}",
        }
        report(it.row())
        assert it.grown_bytes <= STUCK * STUCK_BYTES
        assert closed["write timeout"] == len(ends) == STUCK
        assert min(end.after_s for end in ends) >= WRITE_S
        assert max(end.stuck_s for end in ends) < WRITE_S + DEADLINE_S
        assert {ask(client, b"after\n") for client in quiet} == {b"AFTER\n"}
        assert after.descriptors == idle.descriptors
        # While they fill up, a turn of all of them comes between: 200 chunks of 64 KiB, about 0.8 ms each.
        it.assert_bystander_unaffected(slack_ms=STUCK * 0.8)


@dataclass(frozen=True, slots=True)
class CutOff:
    """How a client was aborted: the error, and the time since its first and its last accepted line."""

    error: str
    after_s: float
    stuck_s: float


async def _never_read(port: int, lines: bytes) -> list[CutOff]:
    return await asyncio.gather(*(_send_until_cut_off(port, lines, number) for number in range(STUCK)))


async def _send_until_cut_off(port: int, lines: bytes, number: int) -> CutOff:
    await asyncio.sleep(number * 0.02)  # slowly; but all are stuck before the first one is aborted
    with connect(port, receive_buffer=1) as client:
        client.setblocking(False)
        began = stuck = time.monotonic()
        try:
            while True:
                await asyncio.get_running_loop().sock_sendall(client, lines)
                stuck = time.monotonic()
        except ConnectionError as error:
            ended = time.monotonic()
            return CutOff(type(error).__name__, ended - began, ended - stuck)


@pytest.mark.timeout(120)
def test_the_most_expensive_partial_lines_stay_within_the_bound(report: Callable[[Figures], None]) -> None:
    """200 clients with the most expensive combination of partial lines stay within the bound, repeatedly."""
    with serving() as echod:
        idle_bytes = _rss_bytes_once_read(echod)
        grown_bytes = [_cut_where_it_hurts_most(echod) - idle_bytes for _ in range(3)]
        report(
            {
                "fault": f"{STUCK} never read: lines cut where it hurts most, three times",
                "KB each": [grown // STUCK // 1024 for grown in grown_bytes],
            }
        )
        assert max(grown_bytes) <= STUCK * STUCK_BYTES


def _cut_where_it_hurts_most(echod: Daemon) -> int:
    """Return the resident memory once the clients can send no more."""
    begun, rest = (GROWING * 32_768).encode(), f"\n{GROWING * 30_000}\n".encode()
    rss_bytes = 0
    with contextlib.ExitStack() as clients:
        stuck = [clients.enter_context(connect(echod.port, receive_buffer=1)) for _ in range(STUCK)]
        sent, before = 0, echod.stats()["bytes_in"]
        while echod.stats()["bytes_in"] - before == sent:
            sent += _send_at_once(stuck, begun)
            _rss_bytes_once_read(echod)
            echod.send(signal.SIGSTOP)  # so that the next read returns all of it
            sent += _send_at_once(stuck, rest)
            echod.send(signal.SIGCONT)
            rss_bytes = max(rss_bytes, _rss_bytes_once_read(echod))
    settled(echod, 0)
    return rss_bytes


def _send_at_once(clients: Iterable[socket.socket], text: bytes) -> int:
    """Send the text for each client as far as the kernel accepts it; return the number of bytes."""
    sent = 0
    for client in clients:
        with contextlib.suppress(BlockingIOError):
            sent += client.send(text, socket.MSG_DONTWAIT)
    return sent


def _rss_bytes_once_read(echod: Daemon) -> int:
    """Return the resident memory once echod reads no more."""
    seen = [echod.stats()["bytes_in"]]
    while len(seen) < 10 or seen[-10] != seen[-1]:
        seen.append(echod.stats()["bytes_in"])
    return Usage.of(echod.pid).rss_bytes
