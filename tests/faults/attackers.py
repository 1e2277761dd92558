"""Attackers of one kind in a separate process, at a fixed number and rate, until standard input ends.

Run as a module with an Attack as JSON. Prints the results as JSON at the end: a wrong reply is a complaint; being
rejected, reset or timed out is not.
"""

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Self

from tests.faults.hostile import GONE_WITH_A_RESET, HOSTILE, POLITE, Crowd, Rules, never_reads
from tests.support.daemon import DEADLINE_S, UNMEASURED, clean_environment

BURST = 10
"""Signals that are sent in one step."""

IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h
BUFFER_BYTES = 262_144
"""Size of the kernel buffers of each attacker's socket, because the memory for TCP is shared by all."""

LEAVE_S = 5.0
"""Time for clients to notice that the daemon has ended."""

BEGIN_S = 1.0
"""Longest time for the first connections, after which the attack counts as begun."""

GREEDY_ADDRESS = "127.0.0.66"
HELD_AT_ONCE = 10_000
"""Connections that an attacker keeps open before it closes the oldest."""

LINE_BYTES = 65_536
IDLE_S, LINE_S, WRITE_S = 10.0, 5.0, 5.0
"""The daemon's timeouts."""

REJECTIONS = ("too many connections", "too many connections from your address")


@dataclass(frozen=True, slots=True)
class Target:
    """The addresses of the daemon."""

    pid: int
    port: int
    proxy_port: int
    admin_port: int


@dataclass(frozen=True, slots=True)
class Attack:
    """The kind and number of attackers, and their steps per second together (0: no limit)."""

    kind: str
    number: int
    rate: float
    seed: str

    def __str__(self) -> str:
        return f"{self.kind} x {self.number}" + (f" at {self.rate:g}/s" if self.rate else "")


class WrongReplyError(Exception):
    """A client received a reply that is wrong."""


@dataclass
class Assault:
    """The state that the attackers of a running attack share."""

    attack: Attack
    target: Target
    connected: int = 0
    complaints: list[str] = field(default_factory=list)
    _opened: int = 0
    _next_at: float = 0.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.attack.seed)
        self.is_under_way = asyncio.Event()

    async def pace(self) -> None:
        """Wait until the rate allows the next step."""
        if not self.attack.rate:
            await asyncio.sleep(0)
            return
        now = asyncio.get_running_loop().time()
        self._next_at = max(self._next_at, now - 0.1) + 1 / self.attack.rate
        await asyncio.sleep(max(0.0, self._next_at - now))

    async def connect(self, port: int, *, source: str = "", receive_buffer: int = BUFFER_BYTES) -> socket.socket:
        """Connect from a separate address, so that no limit per address applies."""
        self._opened += 1
        number = self._opened % 60_000
        own = f"127.{1 + KINDS.index(self.attack.kind)}.{number // 250}.{1 + number % 250}"
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.bind((source or own, 0))
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        except BaseException:
            sock.close()
            raise
        self.connected += 1
        if self.connected >= self.attack.number:
            self.is_under_way.set()
        return sock

    @contextlib.asynccontextmanager
    async def connected_to(self, port: int, *, receive_buffer: int = BUFFER_BYTES) -> AsyncIterator[socket.socket]:
        with await self.connect(port, receive_buffer=receive_buffer) as sock:
            yield sock


async def _send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def _receive(sock: socket.socket, count: int = 65_536) -> bytes:
    return await asyncio.get_running_loop().sock_recv(sock, count)


async def _read_to_end(sock: socket.socket) -> bytes:
    received = b""
    while chunk := await _receive(sock):
        received += chunk
    return received


# -- kinds: each function is one visit of one attacker -----------------------------------------------------------------


async def _pipeline(it: Assault, text: bytes, reply: bytes, *, pause_s: float = 0.0) -> None:
    """Send the text repeatedly, and check every reply."""
    async with it.connected_to(it.target.port) as sock:
        reading = asyncio.ensure_future(_read_replies(sock, reply, pause_s))
        try:
            while not reading.done():
                await it.pace()
                await _send(sock, text)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if not reading.cancelled() and isinstance(error := reading.exception(), WrongReplyError):
            raise error


async def _read_replies(sock: socket.socket, reply: bytes, pause_s: float) -> None:
    chunk_bytes = 1000 if pause_s else 65_536
    expected = reply * (2 + chunk_bytes // len(reply))
    place = 0
    while chunk := await _receive(sock, chunk_bytes):
        if chunk != expected[place : place + len(chunk)]:
            if b"ERROR " in chunk:
                return
            raise WrongReplyError(f"{chunk[:100]!r} where {expected[place : place + 100]!r} was due")
        place = (place + len(chunk)) % len(reply)
        await asyncio.sleep(pause_s)


async def bare_lf(it: Assault) -> None:
    """Pipeline empty lines: one reply for each byte."""
    await _pipeline(it, b"\n" * 65_536, b"\n")


async def whitespace(it: Assault) -> None:
    """Pipeline lines of white space."""
    await _pipeline(it, b" \n" * 32_768, b"\n")


async def trebling(it: Assault) -> None:
    """Pipeline long lines whose upper case is three times as long."""
    line = "ΐ" * (LINE_BYTES // 2)
    await _pipeline(it, line.encode() + b"\n", line.upper().encode() + b"\n")


async def pipelines(it: Assault) -> None:
    """Pipeline ordinary lines without a pause."""
    await _pipeline(it, b"an ordinary line\n" * 1000, b"AN ORDINARY LINE\n")


async def slow_reader(it: Assault) -> None:
    """Read the replies slowly."""
    await _pipeline(it, b"a line that is read slowly\n" * 100, b"A LINE THAT IS READ SLOWLY\n", pause_s=0.02)


async def never_reader(it: Assault) -> None:
    """Send long lines whose upper case is three times as long, and never read."""
    async with it.connected_to(it.target.port, receive_buffer=4096) as sock:
        while True:
            await it.pace()
            await _send(sock, "ΐ".encode() * (LINE_BYTES // 2) + b"\n")


async def bytewise(it: Assault) -> None:
    """Sends a byte at a time."""
    async with it.connected_to(it.target.port) as sock:
        for _ in range(20):
            for byte in "straße ΐ\n".encode():
                await it.pace()
                await _send(sock, bytes([byte]))
            reply = "straße ΐ\n".upper().encode()
            received = b""
            while len(received) < len(reply):
                if not (chunk := await _receive(sock)):
                    return
                received += chunk
            if received != reply and not received.startswith(b"ERROR "):
                raise WrongReplyError(repr(received))


async def too_long(it: Assault) -> None:
    """Send lines that are too long, one per connection."""
    await _told(it, b"x\n" * 100 + b"z" * (LINE_BYTES + 1), b"X\n" * 100 + b"ERROR line longer than 65536 bytes\n")


async def invalid(it: Assault) -> None:
    """Send invalid UTF-8, once per connection."""
    await _told(it, b"x\n" * 100 + b"\xff\n" + b"y\n" * 100, b"X\n" * 100 + b"ERROR invalid utf-8\n")


async def _told(it: Assault, text: bytes, due: bytes) -> None:
    await it.pace()
    async with it.connected_to(it.target.port) as sock:
        await _send(sock, text)
        received = await _read_to_end(sock)
    if received != due and not any(f"ERROR {each}\n".encode() == received for each in REJECTIONS):
        raise WrongReplyError(f"{received[-200:]!r} where {due[-200:]!r} was due")


async def shut_out(it: Assault) -> None:
    """Exceed the limit of connections from one address, and never close one."""
    held: list[socket.socket] = []
    try:
        while True:
            await it.pace()
            held.append(await it.connect(it.target.port, source=GREEDY_ADDRESS, receive_buffer=4096))
            if len(held) > HELD_AT_ONCE // it.attack.number:
                held.pop(0).close()
    finally:
        for sock in held:
            sock.close()


async def churn(it: Assault) -> None:
    """Connect, perhaps send a line, and reset or close at once."""
    await it.pace()
    async with it.connected_to(it.target.port) as sock:
        if it.rng.random() < 0.5:
            await _send(sock, b"a line that nobody reads the reply to\n")
        if it.rng.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, GONE_WITH_A_RESET)


async def lingers(it: Assault) -> None:
    """End the stream or send a bad line, and stay connected."""
    await it.pace()
    async with it.connected_to(it.target.port) as sock:
        await _send(sock, it.rng.choice([b"a line\n", b"\xff\n", b"half a line"]))
        if it.rng.random() < 0.7:
            sock.shutdown(socket.SHUT_WR)
        await asyncio.sleep(3)


async def proxy_bytewise(it: Assault) -> None:
    """Send a PROXY header byte by byte, and perhaps a line behind it."""
    header = it.rng.choice(
        [
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 2000\r\n",
            b"\r\n\r\n\0\r\nQUIT\n!\x11\0\x0c\xc0\0\x02\1\xc0\0\x02\2\3\xe8\x07\xd0",
            b"PROXY UNKNOWN\r\n",
        ]
    )
    async with it.connected_to(it.target.proxy_port) as sock:
        for byte in header[: it.rng.choice([len(header), 10])]:
            await it.pace()
            await _send(sock, bytes([byte]))
        await _send(sock, b"hello\n")
        received = await _receive(sock)
        if received not in (b"", b"HELLO\n") and not received.startswith(b"ERROR "):
            raise WrongReplyError(repr(received))


async def proxy_garbage(it: Assault) -> None:
    """Send an invalid PROXY header; echod must close without a byte."""
    await it.pace()
    async with it.connected_to(it.target.proxy_port) as sock:
        await _send(
            sock, it.rng.choice([b"GET / HTTP/1.1\r\n\r\n", b"PROXY TCP9 \r\n", b"\r\n\r\n\0\r\nQUIT\nXXXX", b"\xff"])
        )
        if it.rng.random() < 0.5:
            sock.shutdown(socket.SHUT_WR)
        if received := await _read_to_end(sock):
            raise WrongReplyError(repr(received))


async def admin_slow_head(it: Assault) -> None:
    """Send the admin endpoint a request whose head never ends."""
    async with it.connected_to(it.target.admin_port) as sock:
        await _send(sock, b"GET /stats HTTP/1.1\r\nHost: x\r\nX: ")
        while True:
            await it.pace()
            await _send(sock, b"x")


async def admin_body(it: Assault) -> None:
    """Stream an endless body to the admin endpoint."""
    async with it.connected_to(it.target.admin_port) as sock:
        await _send(sock, b"POST /reload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n")
        while True:
            await it.pace()
            await _send(sock, b"x" * 16_384)


async def admin_requests(it: Assault) -> None:
    """Send the admin endpoint one request after the other."""
    await it.pace()
    async with it.connected_to(it.target.admin_port) as sock:
        await _send(sock, b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n")
        await _read_to_end(sock)


async def admin_connects(it: Assault) -> None:
    """Connect to the admin endpoint and send nothing."""
    await it.pace()
    async with it.connected_to(it.target.admin_port) as sock:
        await _receive(sock)


async def usr1_storm(it: Assault) -> None:
    """Send SIGUSR1 repeatedly."""
    await _storm(it, signal.SIGUSR1)


async def hup_storm(it: Assault) -> None:
    """Send SIGHUP repeatedly."""
    await _storm(it, signal.SIGHUP)


async def _storm(it: Assault, number: signal.Signals) -> None:
    """Send a burst of signals in each step."""
    await it.pace()
    for _ in range(BURST):
        os.kill(it.target.pid, number)


Visit = Callable[[Assault], Awaitable[None]]

VISITS: dict[str, Visit] = {
    visit.__name__: visit
    for visit in (
        bare_lf,
        whitespace,
        trebling,
        pipelines,
        slow_reader,
        never_reader,
        bytewise,
        too_long,
        invalid,
        shut_out,
        churn,
        lingers,
        proxy_bytewise,
        proxy_garbage,
        admin_slow_head,
        admin_body,
        admin_requests,
        admin_connects,
        usr1_storm,
        hup_storm,
    )
}

CROWDS = {"hostile": [each for each in HOSTILE if each is not never_reads], "polite": POLITE}
"""Kinds whose clients are those of hostile.py, which check everything that they receive."""

KINDS = (*VISITS, "hostile")


# -- a process of attackers --------------------------------------------------------------------------------------------


class Attackers:
    """The process of the attackers, which runs on one core."""

    def __init__(self, attack: Attack, target: Target, core: int) -> None:
        self.attack = attack
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.attackers", json.dumps([asdict(attack), asdict(target), core])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment() | UNMEASURED,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def await_begin(self) -> None:
        """Wait until the attack is under way."""
        assert self._process.stdout
        self._process.stdout.readline()

    def announce_stop(self) -> None:
        """Tell the attackers that the daemon may end connections from now on."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            self._process.stdout.readline()

    def end(self) -> list[str]:
        """End the attack; return its complaints."""
        try:
            output = self._process.communicate(timeout=DEADLINE_S)[0]
        except subprocess.TimeoutExpired:
            return ["the attackers don't end"]
        if self._process.returncode:
            return ["the attackers failed: see their traceback"]
        result = json.loads(output)
        self.connected: int = result["connected"]
        complaints: list[str] = result["complaints"]
        return complaints


async def _visit_again_and_again(it: Assault, visit: Visit) -> None:
    while True:
        try:
            await visit(it)
        except OSError:
            await asyncio.sleep(0.02)  # rejected, reset or refused, or no port or descriptor is left
        except WrongReplyError as error:
            it.complaints.append(str(error))


async def _attack(it: Assault, visit: Visit) -> None:
    visiting = [asyncio.ensure_future(_visit_again_and_again(it, visit)) for _ in range(it.attack.number)]
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(it.is_under_way.wait(), BEGIN_S)
    await _until_told()
    for each in visiting:
        each.cancel()
    await asyncio.gather(*visiting, return_exceptions=True)


async def _until_told(rules: Rules | None = None) -> None:
    """Report that the attack is under way, and later that a stop is announced; return at the end of input."""
    os.write(1, b"\n")
    if await asyncio.to_thread(sys.stdin.buffer.readline):
        if rules:
            rules.is_over = rules.may_refuse = True
        os.write(1, b"\n")
        await asyncio.to_thread(sys.stdin.buffer.read)


async def _play(it: Assault) -> None:
    rules = Rules([LINE_BYTES], [IDLE_S], [LINE_S], [WRITE_S], REJECTIONS)
    crowd = Crowd(it.attack.seed, rules, [f"127.0.0.1:{it.target.port}"], CROWDS[it.attack.kind])
    playing = asyncio.ensure_future(crowd.play(it.attack.number))
    await _until_told(rules)
    crowd.leave()
    await asyncio.wait([playing], timeout=LEAVE_S)
    playing.cancel()
    await asyncio.gather(playing, return_exceptions=True)
    it.connected, it.complaints = crowd.connected, crowd.complaints


def main(argument: str) -> None:
    """Attack until standard input ends."""
    attack, target, core = json.loads(argument)
    it = Assault(Attack(**attack), Target(**target))
    os.sched_setaffinity(0, {core})
    is_crowd = it.attack.kind in CROWDS
    if is_crowd:  # it measures too
        with contextlib.suppress(PermissionError):
            os.nice(-10)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_play(it) if is_crowd else _attack(it, VISITS[it.attack.kind]))
    json.dump({"connected": it.connected, "complaints": it.complaints[:10]}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
