"""Exhausted descriptors and connections: new clients wait or are rejected, and others are served."""

import asyncio
import contextlib
import resource
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from statistics import median

import pytest

from echod.config.schema import RESERVED_FILES
from echod.telemetry.stats import REJECT_REASONS
from tests.faults.measurements import Figures, Usage, scene
from tests.support.daemon import DEADLINE_S, Daemon, ask, leave_descriptors, read_line, serving, settings, settled

ESTABLISHED = 10
LEFT = 5
WAITING = 60
STARVED_S = 4.0

FLOOD = 2000
ALONE = 50
LIMIT = 100
PER_ADDRESS = 20
DESCRIPTORS = LIMIT + RESERVED_FILES + 1
"""The fewest descriptors that LIMIT connections and one listener fit into."""
TOLD_AT_ONCE = RESERVED_FILES // 2
BYSTANDER, CROWD = "127.0.0.1", "127.0.0.2"
"""Addresses of clients."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("relief", ["the limit is raised", "others leave"])
def test_clients_without_a_descriptor_wait_until_there_is_one(relief: str, report: Callable[[Figures], None]) -> None:
    """Without a descriptor, new clients wait, others are served, the loop does not spin, and echod recovers."""
    with serving() as echod, contextlib.ExitStack() as clients:
        others = _connected(clients, echod.port, WAITING)
        established = _connected(clients, echod.port, ESTABLISHED)
        _say(others + established, b"before\n")
        with scene(f"no descriptors, then {relief}", echod) as it:
            limit = leave_descriptors(echod.pid, LEFT)
            waiting = _connected(clients, echod.port, LEFT + WAITING)
            for client in waiting:
                client.sendall(b"patience\n")
            served = waiting[:LEFT]
            assert {read_line(client) for client in served} == {b"PATIENCE\n"}
            echod.wait_for("accepting paused")
            cpu_share = _starve(echod, waiting[LEFT:], established + served)
            began = time.monotonic()
            if relief == "others leave":
                for client in others:
                    client.close()
            else:
                resource.prlimit(echod.pid, resource.RLIMIT_NOFILE, limit)
            assert {read_line(client) for client in waiting[LEFT:]} == {b"PATIENCE\n"}
            recovered_s = time.monotonic() - began
            _say(established + waiting, b"after\n")
        closed = echod.stats()["connections"]["closed"]
        paused = len(echod.events_named("accepting paused"))
        it.notes |= {
            "CPU % while starved": round(100 * cpu_share, 1),
            "log lines": paused,
            "clients saw": f"{WAITING} waited {STARVED_S:.0f} s, all answered within {recovered_s:.2f} s of the relief",
            "counted": f"reset {closed['reset']}",
        }
        report(it.row())
        assert cpu_share < 0.05
        assert recovered_s < 2
        assert paused == 1
        assert closed["reset"] == 0
        it.assert_bystander_unaffected()


def _starve(echod: Daemon, waiting: list[socket.socket], served: list[socket.socket]) -> float:
    """Let clients wait for STARVED_S while others are served, and return the share of a core used meanwhile."""
    before, began = Usage.of(echod.pid), time.monotonic()
    while (lasted_s := time.monotonic() - began) < STARVED_S:
        _say(served, b"meanwhile\n")
        assert not select.select(waiting, [], [], 0.5)[0], "answered, closed or reset"
    return (Usage.of(echod.pid).cpu_s - before.cpu_s) / lasted_s


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("options", "source", "reason", "words"),
    [
        pytest.param({}, BYSTANDER, "limit", "too many connections", id="in all"),
        pytest.param(
            {"limits_connections_per_address": PER_ADDRESS},
            CROWD,
            "address",
            "too many connections from your address",
            id="from one address",
        ),
    ],
)
def test_2_000_clients_over_the_limit_are_rejected_with_an_error(
    options: dict[str, int], source: str, reason: str, words: str, report: Callable[[Figures], None]
) -> None:
    """At the limit, new clients are rejected at once within the reserved descriptors; the others are served."""
    command = ("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", "--", sys.executable, "-m", "echod")
    with (
        serving(*settings(limits_connections=LIMIT, **options), command=command) as echod,
        contextlib.ExitStack() as clients,
    ):
        with scene(f"{FLOOD} clients more than allowed {reason}", echod) as it:
            room = PER_ADDRESS if source == CROWD else LIMIT - 1  # the bystander is one of them
            established = _connected(clients, echod.port, room, source)
            _say(established, b"before\n")
            alone = [asyncio.run(_come(echod.port, source)) for _ in range(ALONE)]
            with ThreadPoolExecutor(1) as crowd:
                flood = crowd.submit(asyncio.run, _flood(echod.port, source))
                while wait([flood], 0.05).not_done:
                    _say(established, b"meanwhile\n")
            told = flood.result()
            _say(established, b"after\n")
        stats = settled(echod, len(established))
        it.notes |= {
            "counted": stats["connections"]["rejected"],
            "clients saw": dict(Counter(received for received, _ in alone + told)),
            "told after ms, alone and in the flood": f"{_slowest_ms(alone)}, {_slowest_ms(told)}",
        }
        report(it.row())
        assert {received for received, _ in alone + told} == {f"ERROR {words}\n".encode()}
        assert stats["connections"]["rejected"] == dict.fromkeys(REJECT_REASONS, 0) | {reason: ALONE + FLOOD}
        assert stats["connections"]["closed"]["reset"] == 0
        assert it.peak_descriptors <= it.usage_before.descriptors + room + TOLD_AT_ONCE
        assert Usage.of(echod.pid).descriptors == it.usage_before.descriptors - 1 + room
        assert not echod.events_named("accepting paused")
        assert median(seconds for _, seconds in alone) < 0.1
        it.assert_bystander_unaffected()


async def _flood(port: int, source: str) -> list[tuple[bytes, float]]:
    return await asyncio.gather(*(_come(port, source) for _ in range(FLOOD)))


async def _come(port: int, source: str) -> tuple[bytes, float]:
    """Connect and send a line at once; return what was received, and after how many seconds the stream ended.

    A rejected client that must make room is reset if its line arrives only then; it has received the error.
    """
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    writer.write(b"hello\n")
    async with asyncio.timeout(DEADLINE_S):
        received = await reader.readline()
        with contextlib.suppress(ConnectionResetError):
            received += await reader.read()
    writer.close()
    return received, time.monotonic() - began


def _slowest_ms(told: Iterable[tuple[bytes, float]]) -> int:
    return round(1000 * max(seconds for _, seconds in told))


def _connected(clients: contextlib.ExitStack, port: int, count: int, source: str = BYSTANDER) -> list[socket.socket]:
    """Connect this many clients, which the stack closes."""
    return [clients.enter_context(_connect_from(source, port)) for _ in range(count)]


def _connect_from(source: str, port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), DEADLINE_S, source_address=(source, 0))


def _say(clients: Iterable[socket.socket], line: bytes) -> None:
    assert {ask(client, line) for client in clients} == {line.upper()}
