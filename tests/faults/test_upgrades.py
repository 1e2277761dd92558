"""Live upgrades under load: how long clients wait, and what they cost."""

import asyncio
import contextlib
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.measurements import Figures, Usage, scene
from tests.support.daemon import DEADLINE_S, Daemon, read_to_end, serving, settings, settled
from tests.support.streams import stream_through_upgrades, upgrade

ROUNDS = 20
CROWD = 1000
UNSENT_BYTES = 12_288
TEXT = b"".join(b"%06d is owed to me, in lower case no more\n" % number for number in range(15_000))
STUCK_S = 0.5
"""Time without progress after which all clients count as stuck."""


@pytest.mark.timeout(180)
def test_50_streams_through_20_upgrades(report: Callable[[Figures], None]) -> None:
    """Every stream is byte-exact, the pid stays, no client is refused or reset; the waiting time is reported."""
    with serving(*settings(timeouts_write=60, timeouts_line=0)) as echod:
        with scene(f"{ROUNDS} upgrades, 50 streams", echod) as it:
            results = asyncio.run(stream_through_upgrades(echod, ROUNDS))
        gaps = [result["gap_ms"] for result in results]
        it.notes |= {"gap p50 ms": statistics.median(gaps), "gap p99 ms": max(gaps), "lost": 0}
        report(it.row())
        assert {result["pid"] for result in results} == {echod.pid}
        assert settled(echod, 0)["upgrades"] == ROUNDS


@pytest.mark.timeout(180)
def test_an_upgrade_with_12_kb_pending_on_each_of_1_000_connections(
    tmp_path: Path, report: Callable[[Figures], None]
) -> None:
    """The replies owed to each client cross byte-exact; memory and gap are reported."""
    path = str(tmp_path / "sock")
    with serving("-l", f"unix:{path}", *settings(timeouts_write=120)) as echod, contextlib.ExitStack() as clients:
        crowd = [clients.enter_context(_connected(path)) for _ in range(CROWD)]
        sent = _send_until_owed(crowd)
        held, before = _held_once_all_is_answered(echod), Usage.of(echod.pid)
        done = upgrade(echod)
        still_held, after = echod.stats()["held_bytes"], Usage.of(echod.pid)
        report(
            {
                "fault": f"upgrade, {CROWD} connections that read nothing",
                "owed KB each": f"{held // CROWD // 1024} -> {still_held // CROWD // 1024}",
                "gap ms": done["gap_ms"],
                "memory MB": f"{before.rss_bytes / 1e6:.1f} -> {after.rss_bytes / 1e6:.1f}",
                "descriptors": f"{before.descriptors} -> {after.descriptors}",
            }
        )
        assert held >= CROWD * UNSENT_BYTES
        assert held <= still_held <= held + CROWD
        assert after.descriptors == before.descriptors
        for number, (client, count) in enumerate(zip(crowd, sent, strict=True)):
            client.shutdown(socket.SHUT_WR)
            lines = _sent_by(number)[:count].upper().splitlines()  # an unterminated last line is answered too
            assert read_to_end(client) == b"".join(line.strip() + b"\n" for line in lines)


def _held_once_all_is_answered(echod: Daemon) -> int:
    """Return `held_bytes` once it stays the same: a busy machine may still be answering what was sent."""
    held = -1
    deadline = time.monotonic() + DEADLINE_S
    while (now := echod.stats()["held_bytes"]) != held:
        assert time.monotonic() < deadline
        held = now
        time.sleep(STUCK_S)
    return held


def _connected(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    client.settimeout(DEADLINE_S)
    client.connect(path)
    return client


def _sent_by(number: int) -> bytes:
    """Return a text in which no line occurs twice, also among clients."""
    start = number * 7
    return TEXT[start : start + 500_000]


def _send_until_owed(crowd: list[socket.socket]) -> list[int]:
    """Send without reading until no client can send more; return the bytes sent by each."""
    sent = [0] * len(crowd)
    for client in crowd:
        client.setblocking(False)
    progress = time.monotonic()
    while time.monotonic() < progress + STUCK_S:
        for number, client in enumerate(crowd):
            with contextlib.suppress(BlockingIOError):
                sent[number] += client.send(_sent_by(number)[sent[number] :][:65_536])
                progress = time.monotonic()
    for client in crowd:
        client.settimeout(DEADLINE_S)
    return sent
