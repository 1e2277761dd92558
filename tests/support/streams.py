"""Clients whose streams cross upgrades: fast, slow, with a partial line, idle, and short-lived."""

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Callable

from tests.support.clients import Tally, come_and_go, finished, pipeline
from tests.support.daemon import DEADLINE_S, Daemon, Event


def upgrade(echod: Daemon, event: str = "upgrade done") -> Event:
    """Request an upgrade and return the event with its result."""
    known = len(echod.events)
    echod.send(signal.SIGUSR2)
    return echod.wait_for(event, after=known)


def descriptors(echod: Daemon) -> int:
    """Return the number of open descriptors."""
    return len(os.listdir(f"/proc/{echod.pid}/fd"))


class Slow:
    """A client that is owed 8 MB, more than the kernel buffers hold, and reads slowly."""

    def __init__(self, number: int) -> None:
        self._random = random.Random(number)
        self.text = b"".join(
            b"%d owes %d %x\n" % (number, line, self._random.getrandbits(200)) for line in range(120_000)
        )
        self.received = hashlib.sha256()
        self.is_hurried = False
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        self._socket.setblocking(False)

    async def run(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, ("127.0.0.1", port))
        sending = asyncio.ensure_future(self._send(loop))
        while chunk := await loop.sock_recv(self._socket, 65_536 if self.is_hurried else 1024):
            self.received.update(chunk)
            if not self.is_hurried:
                await asyncio.sleep(0.02)
        await sending
        self._socket.close()

    def hurry(self) -> None:
        """Read the rest at full speed."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.is_hurried = True

    async def _send(self, loop: asyncio.AbstractEventLoop) -> None:
        await loop.sock_sendall(self._socket, self.text)
        self._socket.shutdown(socket.SHUT_WR)

    def check(self) -> None:
        assert self.received.hexdigest() == hashlib.sha256(self.text.upper()).hexdigest()


async def _begin_line(port: int, text: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text)
    await writer.drain()
    return reader, writer


@contextlib.asynccontextmanager
async def passers_by(address: str, count: int) -> AsyncIterator[Tally]:
    """Run clients that connect and leave repeatedly; the tally is complete afterwards."""
    tally = Tally()
    going = [asyncio.ensure_future(come_and_go(address, tally)) for _ in range(count)]
    yield tally
    tally.is_over = True
    await asyncio.wait_for(asyncio.gather(*going), DEADLINE_S)


async def stream_through_upgrades(echod: Daemon, rounds: int) -> list[Event]:
    """Assert that 50 streams are byte-exact across the upgrades, with no client refused or reset."""
    port, address = echod.port, f"127.0.0.1:{echod.port}"
    slow = [Slow(number) for number in range(5)]
    slowly = [asyncio.ensure_future(each.run(port)) for each in slow]
    fast = await pipeline(address, 25)
    begun = [await _begin_line(port, b"begun by %d, " % number) for number in range(10)]
    idle = [await _begin_line(port, b"") for _ in range(10)]
    await _until(lambda: echod.stats()["connections"]["open"] >= 50, "not all are accepted")
    before = await asyncio.to_thread(descriptors, echod)
    results = []
    async with passers_by(address, 3) as tally:
        for number in range(rounds):
            results.append(await asyncio.to_thread(upgrade, echod))
            for _, writer in begun:
                writer.write(b"%d " % number)
    assert tally.served > rounds
    await _until(lambda: descriptors(echod) == before, "descriptors are lost")
    for index, (reader, writer) in enumerate(begun):
        writer.write(b"and ended\n")
        said = b"BEGUN BY %d, %s AND ENDED\n" % (index, b" ".join(b"%d" % number for number in range(rounds)))
        assert await asyncio.wait_for(reader.readline(), DEADLINE_S) == said
    for reader, writer in idle:
        writer.write(b"still here\n")
        assert await asyncio.wait_for(reader.readline(), DEADLINE_S) == b"STILL HERE\n"
    for _, writer in (*begun, *idle):
        writer.close()
    await finished(fast)
    for each in slow:
        each.hurry()
    await asyncio.wait_for(asyncio.gather(*slowly), DEADLINE_S)
    for each in slow:
        each.check()
    assert tally.complaints == []
    return results


async def _until(look: Callable[[], bool], complaint: str) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not await asyncio.to_thread(look):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(complaint) from None
