"""A flood of TLS handshakes, each of which costs the server far more than the client."""

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.measurements import Figures, Usage, scene
from tests.support.daemon import DEADLINE_S, settled
from tests.support.tls import TlsClient, issue, serving_listens, tls_connect

CLIENTS = 200
SECONDS = 4.0

MOST_MS = 60.0
"""The bystander's 99th percentile; 10 ms was measured on two cores, and 28 ms under a load of 25."""


@pytest.mark.timeout(120)
def test_200_clients_that_begin_handshakes_as_fast_as_they_can(
    tmp_path: Path, report: Callable[[Figures], None]
) -> None:
    """They replay one ClientHello, wait for the server's flight, and leave; a plain client hardly notices."""
    with serving_listens(tmp_path, {}, issue(tmp_path).keys) as echod, socket.socket() as unused:
        _, secret = echod.ports
        hello = TlsClient(unused).hello()
        with tls_connect(secret) as client:
            client.ask(b"one\n")
        settled(echod, 0)
        idle = Usage.of(echod.pid)
        with scene(f"{CLIENTS} clients begin TLS handshakes", echod) as it:
            count = asyncio.run(_flood(secret, hello))
            with tls_connect(secret) as client:
                assert client.ask(b"served\n") == b"SERVED\n"
        end = time.monotonic() + DEADLINE_S
        while Usage.of(echod.pid).descriptors > idle.descriptors:
            assert time.monotonic() < end
        failed = echod.stats()["tls"]["handshakes"]["failed"]
        it.notes |= {"handshakes": count, "per second": round(count / SECONDS)}
        report(it.row())
        assert failed == echod.stats()["connections"]["rejected"]["tls"] >= count
        assert it.grown_bytes < 40_000_000
        # The flood takes CPU time from the daemon, so the usual comparison would not apply. Without the scheduler's
        # bound for an iteration, 200 handshakes in a row delay everyone by 80 to 130 ms.
        assert it.during
        assert it.during.p99_ms <= MOST_MS
        assert echod.stop() == 0


async def _flood(port: int, hello: bytes) -> int:
    """Return how many handshakes the server has begun."""
    end = time.monotonic() + SECONDS
    return sum(await asyncio.gather(*(_begin_handshakes(port, hello, end) for _ in range(CLIENTS))))


async def _begin_handshakes(port: int, hello: bytes, end: float) -> int:
    count = 0
    while time.monotonic() < end:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(hello)
        count += bool(await reader.read(65_536))
        writer.close()
    return count
