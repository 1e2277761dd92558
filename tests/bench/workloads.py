"""The workloads: the lines, the number of connections, and the lines in flight."""

import string
from dataclasses import dataclass
from pathlib import Path

from tests.bench.dialects import UPPER, Dialect

_MIXED = ("grün, öl, straw, ", "привет мир, ", "καλημέρα κόσμε, ", "plain ascii too, ", "日本語 ", "🙂 ")
"""No letter that Unicode's special casing treats: every peer must agree on the reply."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A client sends `depth` lines of `line_bytes` (LF included) in one piece, then waits for all the replies."""

    name: str
    about: str
    connections: int
    depth: int = 1
    line_bytes: int = 64
    mode: str = "blocks"
    """See load.c."""
    per_s: int = 0
    """Lines a second, in the mode `rate`."""
    is_mixed: bool = False
    """The lines are UTF-8 beyond ASCII."""
    is_for_other_work: bool = False
    """Daemons that do other work than ours (memcached, Redis) take part."""

    @property
    def lines(self) -> list[str]:
        """The lines of one block without their LF, no two alike."""
        make = _mixed_line if self.is_mixed else _ascii_line
        return [make(number, self.line_bytes - 1) for number in range(self.depth)]

    def write(self, directory: Path, dialect: Dialect = UPPER) -> tuple[Path, Path]:
        """Write the requests of one block, and the replies to them, into two files."""
        request, reply = (directory / f"{self.name}.{dialect.name}.{kind}" for kind in ("request", "reply"))
        pairs = [dialect.ask(line) for line in self.lines]
        request.write_bytes(b"".join(asked for asked, _ in pairs))
        reply.write_bytes(b"".join(answered for _, answered in pairs))
        return request, reply


def _ascii_line(number: int, length: int) -> str:
    letters = string.ascii_lowercase + string.digits
    return "".join(letters[(number * 7 + place) % len(letters)] for place in range(length))


def _mixed_line(number: int, length: int) -> str:
    """As many words as fit, beginning with another one for each number, and at least one letter to fill the line."""
    line = ""
    while len((line + (word := _MIXED[number % len(_MIXED)])).encode()) < length:
        line += word
        number += 1
    return line + "x" * (length - len(line.encode()))


WORKLOADS = (
    Workload("1", "1 connection, ping-pong", 1),
    Workload("50", "50 connections, ping-pong", 50, is_for_other_work=True),
    Workload("500", "500 connections, ping-pong", 500, is_for_other_work=True),
    Workload("50x16", "50 connections, 16 lines at a time", 50, depth=16, is_for_other_work=True),
    Workload("8x64x1K", "8 connections, 64 lines of 1 KB at a time", 8, depth=64, line_bytes=1024),
    Workload("utf-8", "50 connections, 16 lines of mixed UTF-8 at a time", 50, depth=16, is_mixed=True),
    # Closed with a reset: without, seconds of it fill the kernel's table of sockets in TIME_WAIT (tcp_max_tw_buckets),
    # and then some handshakes take seconds.
    Workload("churn", "connect, one line, close with a reset; 50 at a time", 50, mode="churn-reset"),
)

TLS = (
    Workload("tls", "50 connections, ping-pong, over TLS", 50),
    Workload("tls-churn", "connect, TLS handshake, one line, close with a reset; 50 at a time", 50, mode="churn-reset"),
)
"""Over TLS 1.3 with an ECDSA key; no session is resumed."""

RATES = (
    Workload("rate-10k", "10 000 lines a second", 50, mode="rate", per_s=10_000, is_for_other_work=True),
    Workload("rate-50k", "50 000 lines a second", 50, mode="rate", per_s=50_000, is_for_other_work=True),
)
"""Open loop: lines leave on a clock, evenly over the connections, whether replies come or not."""

IDLE = Workload("idle", "10 000 idle connections", 10_000, mode="idle")
"""Each has had one line answered."""
