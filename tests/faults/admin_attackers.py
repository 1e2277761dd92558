"""Attackers of the admin endpoint, in a separate process."""

import asyncio
import contextlib
import multiprocessing
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator

import uvloop

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with a timeout of 0: `close` sends RST and leaves no port in TIME_WAIT."""

IP_BIND_ADDRESS_NO_PORT = 24
"""ip(7): `connect` chooses the port, which may be in use with another peer."""

Behaviour = Callable[[socket.socket], Awaitable[None]]

HEAD = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"
BODY_HEAD = b"POST /stats HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"


async def streams_a_body(client: socket.socket) -> None:
    """Send a body until the connection ends."""
    await _send(client, BODY_HEAD)
    while True:
        await _send(client, bytes(65536))


async def drips_a_head(client: socket.socket) -> None:
    """Send a request byte by byte without a pause."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in b"GET /" + b"x" * 10_000:
        await _send(client, bytes([byte]))
        await asyncio.sleep(0)


async def drips_a_body(client: socket.socket) -> None:
    """Send a body byte by byte."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    await _send(client, BODY_HEAD)
    while True:
        await _send(client, b"x")
        await asyncio.sleep(0)


async def scrapes(client: socket.socket) -> None:
    """Request the most expensive page, read the answer and repeat at once."""
    await _send(client, HEAD % b"/metrics")
    await _read_to_end(client)


async def checks_health(client: socket.socket) -> None:
    """Request the cheapest page, read the answer and repeat at once."""
    await _send(client, HEAD % b"/healthz")
    await _read_to_end(client)


async def pipelines(client: socket.socket) -> None:
    """Send requests without reading answers."""
    while True:
        await _send(client, HEAD % b"/metrics" * 200)


async def connects(client: socket.socket) -> None:
    """Connect and disconnect repeatedly."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


async def says_nothing(client: socket.socket) -> None:
    """Connect, send nothing, and stay until closed."""
    await _read_to_end(client)


KINDS: dict[str, Behaviour] = {
    each.__name__: each
    for each in (
        streams_a_body,
        drips_a_head,
        drips_a_body,
        scrapes,
        checks_health,
        pipelines,
        connects,
        says_nothing,
    )
}


async def _send(client: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client, data)


async def _read_to_end(client: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(client, 65536):
        pass


@contextlib.contextmanager
def attack(kind: str, attackers: int, port: int, source: str = "127.0.0.1") -> Iterator[None]:
    """Run this many attackers of a kind from the address `source` until the end of the `with`."""
    arguments = (kind, attackers, port, source)
    process = multiprocessing.get_context("spawn").Process(target=_attack, args=arguments, daemon=True)
    process.start()
    try:
        yield
        assert process.is_alive(), "the attackers have come to harm"
    finally:
        process.kill()
        process.join()
        process.close()


def _attack(kind: str, attackers: int, port: int, source: str) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_all(KINDS[kind], attackers, port, source))


async def _all(behave: Behaviour, attackers: int, port: int, source: str) -> None:
    await asyncio.gather(*(_again_and_again(behave, port, source) for _ in range(attackers)))


async def _again_and_again(behave: Behaviour, port: int, source: str) -> None:
    loop = asyncio.get_running_loop()
    while True:
        with socket.socket() as client, contextlib.suppress(OSError):
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            client.bind((source, 0))
            await loop.sock_connect(client, ("127.0.0.1", port))
            await behave(client)
        await asyncio.sleep(0)
