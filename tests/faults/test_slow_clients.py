"""Clients that take their time: with their lines, or with our replies."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import pytest

from tests.daemon import serving, settings
from tests.faults.scene import Figures, scene

LORISES = 2000
LINE_S = 4.0


@pytest.mark.timeout(120)
def test_2_000_slow_lorises_are_gone_within_the_line_timeout(report: Callable[[Figures], None]) -> None:
    """2 000 clients, a byte every second: each is told and gone within the `line` timeout, no bystander harmed."""
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
    """What it received, and how long after its first byte its stream had ended."""
    await asyncio.sleep(number * 0.0005)  # no flood: that is another fault
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
