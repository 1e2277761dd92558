"""Clients that run on the machine under test, and need only its python3.

`python3 -m tests.system.systemd.load VERB ...` prints one JSON document a line. Verbs that continue print the next
document for each line on standard input, and end with it.
"""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field

from tests.support.clients import pipeline
from tests.support.daemon import DEADLINE_S, ask, read_to_end, send_until_stuck

PAUSE_S = 0.005
"""Pause between two clients of a stream, and between two attempts, in seconds."""


def say(document: object) -> None:
    print(json.dumps(document), flush=True)


def connected(address: str) -> socket.socket:
    """Connect with a deadline for every operation; `address` is host:port or a path."""
    client = socket.socket(socket.AF_UNIX if address.startswith("/") else socket.AF_INET)
    client.settimeout(DEADLINE_S)
    host, _, port = address.rpartition(":")
    try:
        client.connect(address if address.startswith("/") else (host, int(port)))
    except OSError:
        client.close()
        raise
    return client


async def told() -> bool:
    """Wait for a line on standard input; return False at its end."""
    return bool(await asyncio.to_thread(sys.stdin.readline))


# -- one question ------------------------------------------------------------------------------------------------------


def say_line(address: str, length: str) -> None:
    """Send a line of this many bytes, and print the beginning of the reply."""
    with connected(address) as client:
        say({"reply": ask(client, b"x" * int(length) + b"\n")[:60].decode()})


def start_and_ask(unit: str, address: str) -> None:
    """Start the unit and connect at once."""
    began = time.monotonic()
    subprocess.run(["systemctl", "start", unit], check=True)
    started = time.monotonic()
    with connected(address) as client:
        reply = ask(client, b"hello\n").decode()
    say({"reply": reply, "start_ms": _ms(started - began), "ask_ms": _ms(time.monotonic() - started)})


def until_served(address: str) -> None:
    """Try until a reply comes, and print the time it took."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(OSError), connected(address) as client:
            client.settimeout(1)
            if ask(client, b"hello\n") == b"HELLO\n":
                break
        assert time.monotonic() < began + 2 * DEADLINE_S
        time.sleep(PAUSE_S)
    say({"seconds": round(time.monotonic() - began, 2)})


def freeze(address: str) -> None:
    """Block the event loop, then wait until clients are served again."""
    with connected(address) as client:
        client.sendall("freeze ü\n".encode())  # not ASCII, so the Python code answers it
        until_served(address)


# -- clients that stay -------------------------------------------------------------------------------------------------


def hold(address: str) -> None:
    """Hold a port until standard input ends."""
    host, _, port = address.rpartition(":")
    with socket.create_server((host, int(port))):
        say("held")
        sys.stdin.read()


def never_read(address: str) -> None:
    """Send until the kernel accepts no more, and never read, until standard input ends."""
    with connected(address) as client:
        send_until_stuck(client)
        say("stuck")
        sys.stdin.read()


def unfinished(address: str) -> None:
    """Send a partial line and read to the end of the stream; a line of input completes it."""
    with connected(address) as client:
        client.sendall(b"first\nseco")
        assert client.recv(100) == b"FIRST\n"
        say("begun")
        if sys.stdin.readline():
            client.sendall(b"nd\n")
        say({"received": read_to_end(client).decode()})


async def busy(address: str, count: str) -> None:
    """Run pipelining clients; print how many have ended, the number of replies, and errors."""
    clients = await pipeline(address, int(count))
    while True:
        ended = [client for client in clients if client.ended.done()]
        complaints = []
        for client in ended:
            try:
                client.check()
            except AssertionError as error:
                complaints.append(str(error))
        answered = [client.received.count(b"\n") for client in clients]
        say({"ended": len(ended), "answered": answered, "complaints": complaints})
        if not await told():
            return


async def owed(address: str, count: str, lines: str) -> None:
    """Run clients that send everything at once and read later; print what each has received."""
    text = b"".join(
        b"%08d is owed to me, and not a byte of it may be missing\n" % number for number in range(int(lines))
    )

    async def one() -> Callable[[], Awaitable[str]]:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(text)
        await asyncio.sleep(0.3)  # the kernel buffers fill up

        async def rest() -> str:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    received = await reader.read()
            except OSError as error:
                return repr(error)
            writer.close()
            return "all" if received == text.upper() else f"{len(received)} of {len(text)} bytes"

        return rest

    clients = await asyncio.gather(*(one() for _ in range(int(count))))
    say("sent")
    await told()
    say({"got": await asyncio.gather(*(rest() for rest in clients)), "bytes": len(text) * int(count)})


# -- a stream of short connections -------------------------------------------------------------------------------------


@dataclass
class Stream:
    """Results of clients that connect, send one line and leave."""

    served: int = 0
    refused: int = 0
    reset: int = 0
    complaints: list[str] = field(default_factory=list)
    slowest_ms: float = 0.0
    windows_ms: list[float] = field(default_factory=list)
    """Times from a refusal after a served client to the next served client, in seconds."""
    is_over: bool = False
    shut_since: float = 0.0

    def refuse(self) -> None:
        self.refused += 1
        self.shut_since = self.shut_since or time.monotonic()

    def serve(self, seconds: float) -> None:
        self.served += 1
        self.slowest_ms = max(self.slowest_ms, _ms(seconds))
        if self.shut_since:
            self.windows_ms.append(_ms(time.monotonic() - self.shut_since))
            self.shut_since = 0.0


async def stream(address: str, workers: str) -> None:
    """Run short-lived clients, this many at once, until standard input ends."""
    it = Stream()
    going = asyncio.gather(*(_come_and_go(address, it) for _ in range(int(workers))))
    say("streaming")
    while await told():
        pass
    it.is_over = True
    await going
    say({name: value for name, value in asdict(it).items() if name not in ("is_over", "shut_since")})


async def _come_and_go(address: str, it: Stream) -> None:
    host, _, port = address.rpartition(":")
    while not it.is_over:
        began = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            it.refuse()
            await asyncio.sleep(PAUSE_S)
            continue
        try:
            writer.write(b"quick\n")
            async with asyncio.timeout(DEADLINE_S):
                reply = await reader.readline()
                writer.write_eof()
                rest = await reader.read()
        except ConnectionError:
            it.reset += 1
        except OSError as error:
            it.complaints.append(repr(error))
        else:
            if (reply, rest) == (b"QUICK\n", b""):
                it.serve(time.monotonic() - began)
            else:
                it.complaints.append(f"got {reply!r} then {rest!r}")
        writer.close()
        await asyncio.sleep(PAUSE_S)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


VERBS: dict[str, Callable[..., object]] = {
    verb.__name__: verb
    for verb in (say_line, start_and_ask, until_served, freeze, hold, never_read, unfinished, busy, owed, stream)
}

if __name__ == "__main__":
    result = VERBS[sys.argv[1]](*sys.argv[2:])
    if asyncio.iscoroutine(result):
        asyncio.run(result)
