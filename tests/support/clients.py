"""Clients that record what they sent, what they received and how the stream ended."""

import asyncio
from dataclasses import dataclass, field

from tests.support.daemon import DEADLINE_S

WINDOW = 16
"""Lines that a pipelining client keeps in flight."""


class Pipeliner(asyncio.Protocol):
    """Keep WINDOW lines in flight until the stream ends; then `check` compares the replies with the lines."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._number = 0
        self._is_finishing = False
        self.sent = bytearray()
        self.received = bytearray()
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.sockname: tuple[str, int] | str = transport.get_extra_info("sockname")
        self._send(WINDOW)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self._transport.is_closing() and not self._is_finishing:
            self._send(data.count(b"\n"))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(exc)

    def _send(self, count: int) -> None:
        lines = b"".join(f"{self._name} line {self._number + n}.\n".encode() for n in range(count))
        self._number += count
        self.sent += lines
        self._transport.write(lines)

    def finish(self) -> None:
        """Send no more and end the stream, once the lines in flight are answered."""
        self._is_finishing = True
        self._transport.write_eof()

    def check(self) -> None:
        """Assert that the replies answer a prefix of the lines sent, that none is torn, and that there was no reset."""
        assert self.ended.result() is None, f"{self._name}: {self.ended.result()!r}"
        assert self.received == self.sent.upper()[: len(self.received)], f"{self._name}: not a prefix"
        assert not self.received or self.received.endswith(b"\n"), f"{self._name}: torn reply {self.received[-50:]!r}"


async def pipeline(address: str, count: int) -> list[Pipeliner]:
    """Connect this many pipelining clients."""
    clients = [Pipeliner(f"client {number}") for number in range(count)]
    await asyncio.gather(*(_connect(client, address) for client in clients))
    return clients


async def finished(clients: list[Pipeliner]) -> None:
    """Let the clients send no more, and assert that every line was answered."""
    for client in clients:
        client.finish()
    await asyncio.wait_for(asyncio.gather(*(client.ended for client in clients)), DEADLINE_S)
    for client in clients:
        client.check()
        assert client.received == client.sent.upper()


async def _connect(client: Pipeliner, address: str) -> None:
    loop = asyncio.get_running_loop()
    if address.startswith("unix:"):
        await loop.create_unix_connection(lambda: client, address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        await loop.create_connection(lambda: client, host.strip("[]"), int(port))


async def open_stream(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an address in the form that echod logs."""
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port))


@dataclass
class Tally:
    """Results of clients that connect, send one line and leave."""

    served: int = 0
    refused: int = 0
    complaints: list[str] = field(default_factory=list)
    is_over: bool = False


async def come_and_go(address: str, tally: Tally) -> None:
    """Connect, send a line, read its reply and disconnect, repeatedly, until refused or over."""
    while not tally.is_over:
        try:
            reader, writer = await open_stream(address)
        except (ConnectionRefusedError, FileNotFoundError):
            tally.refused += 1
            return
        except OSError as error:
            tally.complaints.append(f"connect: {error!r}")
            return
        try:
            writer.write(b"quick\n")
            async with asyncio.timeout(DEADLINE_S):
                reply = await reader.readline()
                writer.write_eof()
                rest = await reader.read()
        except OSError as error:
            tally.complaints.append(repr(error))
        else:
            if (reply, rest) == (b"QUICK\n", b""):
                tally.served += 1
            else:
                tally.complaints.append(f"got {reply!r} then {rest!r}")
        writer.close()
