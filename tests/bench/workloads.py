"""What the servers are asked to do: the lines, how many connections send them, and how many before they wait."""

import string
from dataclasses import dataclass
from pathlib import Path

_MIXED = ("grün, öl, straw, ", "привет мир, ", "καλημέρα κόσμε, ", "plain ascii too, ", "日本語 ", "🙂 ")
"""Nothing that Unicode's special casing treats: every peer must agree on the answer."""


@dataclass(frozen=True, slots=True)
class Workload:
    """`depth` lines of `line_bytes`, LF included, in one piece; then the client waits for all of the replies."""

    name: str
    about: str
    connections: int
    depth: int = 1
    line_bytes: int = 64
    mode: str = "blocks"
    is_mixed: bool = False
    limit_goal: float | None = None
    """How many times the C limit's CPU time echod may need a line."""

    @property
    def request(self) -> str:
        """A block of lines, no two alike."""
        make = _mixed_line if self.is_mixed else _ascii_line
        return "".join(make(number, self.line_bytes - 1) + "\n" for number in range(self.depth))

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Put the request and the reply to it into files."""
        request, reply = folder / f"{self.name}.request", folder / f"{self.name}.reply"
        text = self.request
        request.write_bytes(text.encode())
        reply.write_bytes(text.upper().encode())
        return request, reply


def _ascii_line(number: int, length: int) -> str:
    letters = string.ascii_lowercase + string.digits
    return "".join(letters[(number * 7 + place) % len(letters)] for place in range(length))


def _mixed_line(number: int, length: int) -> str:
    """As many of the words as fit, from another one on each time, and at least a letter to fill it up."""
    line = ""
    while len((line + (word := _MIXED[number % len(_MIXED)])).encode()) < length:
        line += word
        number += 1
    return line + "x" * (length - len(line.encode()))


WORKLOADS = (
    Workload("1", "1 connection, ping-pong", 1),
    Workload("50", "50 connections, ping-pong", 50, limit_goal=1.45),
    Workload("500", "500 connections, ping-pong", 500, limit_goal=1.45),
    Workload("50x16", "50 connections, 16 lines at a time", 50, depth=16, limit_goal=1.75),
    Workload("8x64x1K", "8 connections, 64 lines of 1 KB at a time", 8, depth=64, line_bytes=1024, limit_goal=4.5),
    Workload("utf-8", "50 connections, 16 lines of mixed UTF-8 at a time", 50, depth=16, is_mixed=True),
    Workload("churn", "connect, one line, close; 50 at a time", 50, mode="churn", limit_goal=1.5),
    Workload("churn-reset", "the same, closed with a reset", 50, mode="churn-reset", limit_goal=1.5),
)

IDLE = Workload("idle", "10 000 idle connections", 10_000, mode="idle")
"""Each has had one line answered."""
