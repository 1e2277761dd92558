"""Misbehaving clients, chosen by a seed; each checks what it received against what it was owed.

The same seed gives the same clients and choices; the number of visits depends on the machine. A visit is identified by
the seed, the number of its client and its own number.
"""

import asyncio
import contextlib
import random
import re
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tests.support.daemon import DEADLINE_S

GONE_WITH_A_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with a timeout of 0: close(2) sends RST."""

IP_MINTTL = 21  # linux/in.h
ERROR = re.compile(rb"ERROR [a-z]")
"""The beginning of an error line, which no reply can have."""

LATE_S = 10.0
"""How late a timeout may be seen by a client on a busy machine, in seconds."""

WORDS = "straße ŉ ΐ ﬃ ς ǆ i̇ 𐐨 😀 plain words, many \0 \x1c \x85 \u2028 \r \t ERROR error".split(" ")  # noqa: SIM905


@dataclass(slots=True)
class Rules:
    """Every value that a setting of the daemon may have during the test."""

    line_bytes: Sequence[int]
    idle_s: Sequence[float]
    line_s: Sequence[float]
    write_s: Sequence[float]
    rejections: Sequence[str] = ("too many connections",)
    may_refuse: bool = False
    """Whether listeners come and go."""
    is_over: bool = False
    """A drain may have begun: a client may receive fewer replies from now on."""

    def allow(self, error: bytes, line: bytes, *, is_whole: bool, is_first: bool) -> bool:
        """Return whether this error is allowed in place of a reply to `line`, or to a partial line."""
        words = error.decode().removeprefix("ERROR ")
        if words == "invalid utf-8":
            return is_whole and reply(line) is None
        if words in {f"line longer than {limit} bytes" for limit in self.line_bytes}:
            return len(line) > int(words.split()[3])
        if words in {f"line not finished within {limit:g} s" for limit in self.line_s}:
            return is_whole or line != b""
        return words in {f"idle for {limit:g} s" for limit in self.idle_s} or (is_first and words in self.rejections)


def reply(line: bytes) -> bytes | None:
    """Return the reply to a line without the LF; None if the line is invalid."""
    try:
        return line.decode().strip().upper().encode()
    except UnicodeDecodeError:
        return None


class Client:
    """A connection that controls its socket itself; at the end, `complaint` describes what was wrong."""

    def __init__(self, rng: random.Random, rules: Rules) -> None:
        self.rng = rng
        self.rules = rules
        self.sent = bytearray()
        self.received = bytearray()
        self.ending = ""
        """`eof` or `reset`, once the stream has ended."""
        self.peer = ""
        """Its name in the log of the daemon."""
        self.is_well_behaved = False
        """The client has ended its stream and read everything, so every line must have been answered."""
        self.is_cut = False
        """The client has been or may be aborted, so the last reply may be torn."""
        self._has_ended = False
        self._listening: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def connect(self, address: str, *, receive_buffer: int | None = None) -> None:
        """Connect; raises OSError."""
        self.began = self._loop.time()
        path = address.removeprefix("unix:")
        self.is_tcp = path == address
        self.socket = socket.socket(socket.AF_INET if self.is_tcp else socket.AF_UNIX)
        self.socket.setblocking(False)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if self.is_tcp:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            host, _, port = address.rpartition(":")
            await self._loop.sock_connect(self.socket, (host, int(port)))
            self.peer = "{}:{}".format(*self.socket.getsockname())
        else:
            await self._loop.sock_connect(self.socket, path)
            self.peer = "unix"

    async def send(self, data: bytes, *, chunk_bytes: int = 16_384) -> None:
        """Send, in 200 chunks at most, until the daemon has closed the connection."""
        chunk_bytes = max(chunk_bytes, len(data) // 200)
        for start in range(0, len(data), chunk_bytes):
            if self.ending:
                return
            chunk = data[start : start + chunk_bytes]
            self.sent += chunk
            try:
                await self._loop.sock_sendall(self.socket, chunk)
            except OSError:
                self.is_cut = True  # the error is reported only once, here; reading ends normally
                return
            await asyncio.sleep(0)  # sock_sendall doesn't yield while the kernel accepts everything

    def listen(self, *, pause_s: float = 0.0, chunk_bytes: int = 65_536) -> None:
        """Read in the background from now on."""
        self._listening = self._loop.create_task(self._listen(pause_s, chunk_bytes))

    async def _listen(self, pause_s: float, chunk_bytes: int) -> None:
        while not self.ending:
            try:
                chunk = await self._loop.sock_recv(self.socket, chunk_bytes)
            except OSError:
                self.ending = "reset"
            else:
                self.received += chunk
                self.ending = "" if chunk else "eof"
            self._heard.set()
            await asyncio.sleep(pause_s)

    def shut(self, how: int) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(how)

    async def finish(self) -> None:
        """End the stream, and read to the end of the daemon's."""
        self._has_ended = self.is_well_behaved = True
        self.shut(socket.SHUT_WR)
        await self.end()

    async def end(self, *, within_s: float = DEADLINE_S) -> float:
        """Wait for the end of the stream, and return the time it took. Raises TimeoutError."""
        if not self._listening:
            self.listen()
        assert self._listening
        began = self._loop.time()
        await asyncio.wait_for(asyncio.shield(self._listening), within_s)
        return self._loop.time() - began

    async def hear(self, count: int) -> None:
        """Wait until this many bytes have been received, or the stream has ended."""
        while len(self.received) < count and not self.ending:
            self._heard.clear()
            await self._heard.wait()

    def vanish(self) -> None:
        """Drop all packets from now on, as if the cable was cut: those with a TTL below 255 are ignored."""
        if self.is_tcp:
            self.socket.setsockopt(socket.IPPROTO_IP, IP_MINTTL, 255)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, GONE_WITH_A_RESET)

    async def close(self) -> None:
        if self._listening:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        self.socket.close()

    # -- afterwards ------------------------------------------------------------------------------------------------

    @property
    def replies(self) -> int:
        """The number of complete replies, without error lines."""
        return sum(not ERROR.match(line) for line in bytes(self.received).split(b"\n")[:-1])

    def complaint(self) -> str:
        """Return what was wrong with the received data; "" if nothing was."""
        *lines, rest = bytes(self.sent).split(b"\n")
        if rest and self._has_ended:
            lines.append(rest)
        *answers, torn = bytes(self.received).split(b"\n")
        for number, answer in enumerate(answers):
            is_whole = number < len(lines)
            line = lines[number] if is_whole else rest
            if ERROR.match(answer):
                if (number, torn) != (len(answers) - 1, b""):
                    return f"more after {answer!r}: {answers[number + 1 :]} {torn!r}"
                is_allowed = self.rules.allow(answer, line, is_whole=is_whole, is_first=number == 0)
                return "" if is_allowed else f"{answer!r} to {line!r:.200}"
            if not is_whole or answer != reply(line):
                return f"{answer!r:.200} to {line!r:.200}, answer {number + 1} to {len(lines)} lines"
            if len(line) > max(self.rules.line_bytes):
                return f"a line of {len(line)} bytes was answered"
        return self._complaint_about_the_end(lines, answers, torn)

    def _complaint_about_the_end(self, lines: list[bytes], answers: list[bytes], torn: bytes) -> str:
        if torn and self.ending == "eof" and not self.is_cut and not self.rules.is_over:
            return f"torn reply {torn!r:.200} before the end of the stream"
        if torn and (len(answers) >= len(lines) or not (reply(lines[len(answers)]) or b"").startswith(torn)):
            return "" if ERROR.match(torn) else f"{torn!r:.200} begins no reply"
        if self.is_well_behaved and not self.rules.is_over and (self.ending, len(answers)) != ("eof", len(lines)):
            return f"{self.ending or 'hanging'} after {len(answers)} replies to {len(lines)} lines"
        return ""


# -- behaviours --------------------------------------------------------------------------------------------------------


LONG_LINE = b"so long that the kernel's buffers are full before there are many" * 15 + b"\n"


def text(rng: random.Random, words: int) -> bytes:
    return " ".join(rng.choices(WORDS, k=words)).encode()


def lines(rng: random.Random, count: int) -> bytes:
    return b"".join(text(rng, rng.randrange(8)) + b"\n" for _ in range(count))


async def asks_politely(client: Client) -> None:
    """Pipeline lines in random chunks, the last one perhaps unterminated: all are answered."""
    client.listen()
    for _ in range(client.rng.randint(1, 6)):
        await client.send(lines(client.rng, client.rng.randint(1, 200)), chunk_bytes=client.rng.randint(1, 2000))
    await client.send(text(client.rng, client.rng.randint(0, 5)))
    await client.finish()


async def asks_and_waits(client: Client) -> None:
    """Send a line, read its reply, and send the next one."""
    client.listen()
    for _ in range(client.rng.randint(1, 30)):
        line = text(client.rng, 6)
        await client.send(line + b"\n")
        await client.hear(len(client.received) + len(line.decode().strip().upper().encode()) + 1)
    await client.finish()


async def reads_slowly(client: Client) -> None:
    """Read slowly but steadily: all replies arrive."""
    client.listen(pause_s=0.005, chunk_bytes=client.rng.randint(2000, 20_000))
    await client.send(lines(client.rng, 20) * client.rng.randint(1, 100))
    await client.finish()


async def sends_noise(client: Client) -> None:
    """Send binary data, or text with a few invalid bytes."""
    if client.rng.random() < 0.5:
        noise = bytearray(client.rng.randbytes(client.rng.randint(1, 100_000)))
    else:
        noise = bytearray(lines(client.rng, 500))
        for _ in range(client.rng.randint(1, 3)):
            noise[client.rng.randrange(len(noise))] = client.rng.randrange(256)
    client.listen()
    await client.send(bytes(noise), chunk_bytes=client.rng.randint(1, 1 + len(noise)))
    await client.finish()


async def cuts_a_character(client: Client) -> None:
    """Truncate a multi-byte character before LF or the end of the stream, split over two writes."""
    whole = client.rng.choice("éß€ΐ😀𐐨").encode()
    torn = b"before " + whole[: client.rng.randint(1, len(whole))]
    place = client.rng.randint(0, len(torn))
    client.listen()
    await client.send(lines(client.rng, 3) + torn[:place])
    await asyncio.sleep(client.rng.uniform(0, 0.05))
    await client.send(torn[place:] + client.rng.choice([b"", b"\n"]))
    await client.finish()


async def never_ends_a_line(client: Client) -> None:
    """Send a line longer than any limit, and continue after the error."""
    client.listen()
    longest = max(client.rules.line_bytes)
    await client.send(lines(client.rng, 2) + b"z" * longest, chunk_bytes=client.rng.randint(1000, longest))
    end = client._loop.time() + client.rng.uniform(0, 2)
    while not client.ending and client._loop.time() < end:
        await client.send(b"z" * 5000)
        await asyncio.sleep(0.02)


async def drips(client: Client) -> None:
    """Send a line byte by byte: the timeout is reported, never early."""
    client.listen()
    while not client.received and not client.ending:
        await client.send(b"z")
        await asyncio.sleep(client.rng.uniform(0.05, 0.3))
    _assert_in_time(client, b"line not finished", client.rules.line_s)


async def falls_silent(client: Client) -> None:
    """Fall silent, at once or after a few lines: the timeout is reported, never early. Then stay connected."""
    client.listen()
    await client.send(lines(client.rng, client.rng.randint(0, 3)))
    with contextlib.suppress(TimeoutError):
        await client.end(within_s=max(client.rules.idle_s) + LATE_S)
    _assert_in_time(client, b"idle for", client.rules.idle_s)
    await asyncio.sleep(client.rng.uniform(0, 1.5))


async def leaves_a_line_unfinished(client: Client) -> None:
    """Send a partial line and nothing more."""
    client.listen()
    await client.send(lines(client.rng, 2) + b"half a line")
    with contextlib.suppress(TimeoutError):
        await client.end(within_s=max(client.rules.line_s) + LATE_S)
    _assert_in_time(client, b"line not finished", client.rules.line_s)


def _assert_in_time(client: Client, words: bytes, limits_s: Sequence[float]) -> None:
    """Assert that the client got this error not too early, unless it was rejected or the test is over."""
    seconds = client._loop.time() - client.began
    told = bytes(client.received).split(b"\n")[-2:-1]
    if client.rules.is_over or told in [[f"ERROR {each}".encode()] for each in client.rules.rejections]:
        return
    what = f"{told} after {seconds:.2f} s, {client.ending}"
    assert told, what
    assert told[0].startswith((b"ERROR " + words, b"ERROR idle for")), what  # or this process was slow to send at all
    assert float(told[0].split()[-2]) <= seconds < max(limits_s) + LATE_S, what


async def resets_at_once(client: Client) -> None:
    if client.rng.random() < 0.5:
        await client.send(b"a line that nobody hears the reply to\n")
    client.reset()


async def resets_while_written_to(client: Client) -> None:
    client.listen(pause_s=0.01, chunk_bytes=client.rng.randint(100, 5000))
    await client.send(lines(client.rng, client.rng.randint(1, 100)))
    await client.hear(client.rng.randint(0, 200))
    client.reset()


async def leaves_while_written_to(client: Client) -> None:
    """Close with unread replies, which resets the connection."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(client.rng.uniform(0.05, 0.3)):
            await client.send(lines(client.rng, 50) * 200)


async def never_reads(client: Client) -> None:
    """Send until the kernel accepts no more: the client is aborted, and what it received is right."""
    client.is_cut = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(client.rules.write_s) + client.rng.uniform(0, 2)):
            await client.send(LONG_LINE * 12_000)
    with contextlib.suppress(TimeoutError):
        await client.end(within_s=1)


async def vanishes(client: Client) -> None:
    """Cut the cable: with nothing, a partial line, or replies in flight."""
    client.listen()
    await client.send(lines(client.rng, client.rng.randint(0, 3)))
    client.vanish()
    await client.send(client.rng.choice([b"", b"half a line", lines(client.rng, 100)]))
    await asyncio.sleep(client.rng.uniform(0, 4))


async def is_deaf(client: Client) -> None:
    """Shut the socket for reading, unseen by the daemon; the kernel accepts and drops the replies."""
    client.shut(socket.SHUT_RD)
    for _ in range(client.rng.randint(1, 10)):
        await client.send(lines(client.rng, 20))
        await asyncio.sleep(0.02)


async def is_urgent(client: Client) -> None:
    """Send one byte out of band, which is not part of the stream."""
    client.listen()
    await client.send(lines(client.rng, 3))
    if client.is_tcp:
        with contextlib.suppress(ConnectionError):
            client.socket.send(b"!", socket.MSG_OOB)
    await client.send(lines(client.rng, 3))
    await client.finish()


async def speaks_after_the_farewell(client: Client) -> None:
    """Send an invalid line, then valid ones, which are not answered."""
    client.listen()
    await client.send(lines(client.rng, 2) + b"\xff\n" + lines(client.rng, 2))
    with contextlib.suppress(TimeoutError):
        await client.end(within_s=0.5)
    for _ in range(client.rng.randint(0, 20)):
        await client.send(lines(client.rng, 1))
        await asyncio.sleep(0.1)


# -- all of them -------------------------------------------------------------------------------------------------------

Behaviour = Callable[[Client], Awaitable[None]]

POLITE: Sequence[Behaviour] = (asks_politely, asks_and_waits, reads_slowly)
HOSTILE: Sequence[Behaviour] = (
    *POLITE,
    sends_noise,
    cuts_a_character,
    never_ends_a_line,
    drips,
    falls_silent,
    leaves_a_line_unfinished,
    resets_at_once,
    resets_while_written_to,
    leaves_while_written_to,
    never_reads,
    vanishes,
    is_deaf,
    is_urgent,
    speaks_after_the_farewell,
)
HURRIED = (asks_politely, asks_and_waits, resets_at_once, sends_noise)
"""The behaviours that occur in bursts."""


@dataclass(slots=True)
class Crowd:
    """Clients that connect repeatedly, each with its own choices; the fields are the results."""

    seed: str
    rules: Rules
    addresses: Sequence[str]
    behaviours: Sequence[Behaviour] = HOSTILE
    visits: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    connected: int = 0
    refused: int = 0
    heard: list[tuple[str, int]] = field(default_factory=list)
    """For each accepted client: its name in the log, and the number of its replies."""
    _is_over: bool = False

    async def play(self, clients: int) -> None:
        """Run this many clients at once until `leave`."""
        await asyncio.gather(*(self._come_and_go(number) for number in range(clients)))

    def leave(self) -> None:
        """Let each client finish its current visit, and start no other."""
        self._is_over = True

    async def _come_and_go(self, number: int) -> None:
        rng = random.Random(f"{self.seed}: client {number}")
        visit = 0
        while not self._is_over:
            visit += 1
            behaviour, is_burst = rng.choice(self.behaviours), rng.random() < 0.05
            address, pause_s, count = rng.choice(self.addresses), rng.uniform(0, 0.1), rng.randint(10, 40)
            if is_burst:
                behaviour = rng.choice([each for each in self.behaviours if each in HURRIED])
            name = f"seed {self.seed}, client {number}, visit {visit}: {behaviour.__name__}"
            programs = [random.Random(f"{name} {each}") for each in range(count if is_burst else 1)]
            await asyncio.gather(*(self._visit(name, behaviour, address, program) for program in programs))
            await asyncio.sleep(pause_s)

    async def _visit(self, name: str, behaviour: Behaviour, address: str, rng: random.Random) -> None:
        client = Client(rng, self.rules)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await client.connect(address, receive_buffer=rng.choice([None, 4096]))
                self.connected += 1
                self.visits[behaviour.__name__] += 1
                await behaviour(client)
        except (ConnectionRefusedError, FileNotFoundError):
            self.refused += 1
            self._complain(name, "" if self.rules.may_refuse or self.rules.is_over else "refused")
            return
        except (AssertionError, OSError) as error:  # TimeoutError is one of the latter
            self._complain(name, repr(error))
        finally:
            await client.close()
        self._complain(name, client.complaint())
        if not any(client.received == f"ERROR {words}\n".encode() for words in self.rules.rejections):
            self.heard.append((client.peer, client.replies))

    def _complain(self, name: str, complaint: str) -> None:
        if complaint:
            self.complaints.append(f"{name}: {complaint}")
