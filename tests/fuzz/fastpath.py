"""Compare the compiled fast path with the reference for SECONDS on random chunks.

Each chunk is either answered as the reference answers it, or handed on unchanged with nothing sent.
"""

import random
import socket
import sys
import time

from echod.server import fastpath
from tests.support.reference import CASED, OTHERS, SPACES, reference

LIMITS = (1, 2, 12, 100, fastpath.CHUNK_BYTES)
ASCII = [word.encode() for word in (*SPACES, *OTHERS) if word.isascii()]
NOT_ASCII = [word.encode() for word in CASED] + [b"\xff"]


class Client(fastpath.HotPath):
    """A connection that records what the fast path hands on."""

    __slots__ = ("pending", "received")

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.is_hot = True
        self.begin(line_bytes=0)

    def begin(self, line_bytes: int) -> None:
        """Reset the records and counters."""
        self.line_bytes = line_bytes
        self.hot_lines = self.bytes_in = self.bytes_out = 0
        self.received: bytes | None = None
        self.pending = b""

    def _receive(self, chunk: bytes) -> None:
        self.received = chunk

    def _keep_pending(self, replies: bytes) -> None:
        self.pending = replies


def random_chunk(source: random.Random) -> bytes:
    """Return lines of random length, mostly ASCII and mostly terminated."""
    words = source.choice((ASCII, [b"a"], [b" "], [b"\n"], ASCII + NOT_ASCII))
    feeds = source.choice((0, 1, 8, 64)) * [b"\n"]
    (count,) = source.choices((2, 8, 32, 256, 4096, fastpath.CHUNK_BYTES), weights=(200, 200, 200, 50, 10, 2))
    chunk = b"".join(source.choices([*words, *feeds], k=source.randint(1, count)))
    return chunk[: fastpath.CHUNK_BYTES - 1] + source.choice((b"\n", b"\n", b"\n", b"x"))


def is_ordinary(chunk: bytes, line_bytes: int) -> bool:
    """Return whether the fast path should answer the chunk."""
    return chunk.isascii() and chunk.endswith(b"\n") and max(map(len, chunk.split(b"\n"))) <= line_bytes


def everything(sock: socket.socket) -> bytes:
    """Return everything that can be read now."""
    parts = []
    try:
        while part := sock.recv(1 << 20):
            parts.append(part)
    except BlockingIOError:
        pass
    return b"".join(parts)


def check(client: Client, peer: socket.socket, chunk: bytes, line_bytes: int) -> bool:
    """Send a chunk, let it be read, and check the result; return whether it was answered."""
    client.begin(line_bytes)
    peer.sendall(chunk)
    client.read_now()
    replies = everything(peer) + client.pending
    counted = (client.bytes_in, client.bytes_out, client.hot_lines)
    if not is_ordinary(chunk, line_bytes):
        assert (client.received, replies, counted) == (chunk, b"", (0, 0, 0))
        return False
    assert client.received is None
    lines = chunk.split(b"\n")[:-1]  # one by one: the reference is quadratic in the number of lines
    assert replies == b"".join(reference(line + b"\n", line_bytes, is_ended=False) for line in lines)
    assert counted == (len(chunk), len(replies), chunk.count(b"\n"))
    return True


def main(seconds: float) -> None:
    """Try chunks until the time is over, and print their number."""
    assert fastpath.IS_COMPILED, fastpath.WHY_NOT
    seed = random.randrange(1 << 32)
    print(f"fast path: fuzzing for {seconds:g} s, seed {seed}")
    source = random.Random(seed)
    tried = answered = cut_short = 0
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for sock in (ours, theirs):
            sock.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * fastpath.CHUNK_BYTES)
        client = Client(ours.fileno())
        # So small that the kernel does not accept long replies at once.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        assert check(client, theirs, b"a" * (fastpath.CHUNK_BYTES - 1) + b"\n", fastpath.CHUNK_BYTES)
        assert client.pending
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, source.choice((1, 4 * fastpath.CHUNK_BYTES)))
            client = Client(ours.fileno())  # the size of a chunk bounds the next read
            answered += check(client, theirs, random_chunk(source), source.choice(LIMITS))
            cut_short += bool(client.pending)
            tried += 1
    print(f"fast path: {tried} chunks, {answered} answered, {cut_short} of them with replies pending; nothing found")


if __name__ == "__main__":
    main(float(sys.argv[1]))
