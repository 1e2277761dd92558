"""Round trips as arithmetic: what to say, whether the reply is right, and what many of them come to.

A reply is held against the promise itself, upper-casing, not against echod's own code. Sockets and clocks are not known
here.
"""

from collections import Counter
from collections.abc import Mapping
from math import ceil
from typing import Any, NamedTuple

from echod.net.address import TcpAddress, UnixAddress

LETTERS = "abcdßefgéhijλklmжnopñqrsþtuvwπxyz"
"""What a text is made of: upper-cased byte for byte as long, and no two beside each other that are not ASCII."""

ERROR = b"ERROR "
"""How a server's complaint begins, which goes on in lower case; no reply can."""

SHOWN = 60
"""How much of a reply is shown."""


class Plan(NamedTuple):
    """Whom to ask, how often and how much: `rounds` None is without an end, `text_bytes` is without the LF."""

    target: TcpAddress | UnixAddress
    rounds: int | None
    interval_s: float
    wait_s: float
    text_bytes: int


def text(sequence: int, size: int) -> str:
    """What to say in that round trip, in `size` bytes of UTF-8: something else than in those before and after it."""
    number = f"{sequence} "
    start = sequence % len(LETTERS)
    letters = LETTERS[start:] + LETTERS[:start]
    whole = (number if len(number) < size // 2 else "") + letters * (size // len(LETTERS) + 1)
    cut = whole.encode()[:size].decode(errors="ignore")
    return cut + "." * (size - len(cut.encode()))


def mismatch(said: str, reply: bytes) -> str | None:
    """What is wrong with a reply, with all that came along with it; None if it is right."""
    right = f"{said.upper()}\n".encode()
    if reply == right:
        return None
    if is_error(reply):
        return f"told: {shown(reply)}"
    if reply.startswith(right):
        return f"more than the reply: {shown(reply[len(right) :])}"
    begin = 0 if max(len(reply), len(right)) <= SHOWN else max(_same(reply, right) - SHOWN // 4, 0)
    where = f", from byte {begin + 1} on" if begin else ""
    return f"wrong reply: {shown(reply[begin:])} instead of {shown(right[begin:])}{where}"


def _same(one: bytes, other: bytes) -> int:
    """How many bytes of the two are the same at their beginnings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (here, there) in pairs if here != there), min(len(one), len(other)))


def is_error(said: bytes) -> bool:
    """Whether it is a server's complaint."""
    return said.startswith(ERROR) and said[len(ERROR) :].islower()


def shown(data: bytes) -> str:
    """The beginning of what a server said, fit for a terminal."""
    said = data.decode(errors="backslashreplace").removesuffix("\n")
    return repr(said if len(said) <= SHOWN else f"{said[:SHOWN]}...")


class Tally:
    """What round trips come to; of endless many no more is kept than how often each time, to four digits, was seen."""

    def __init__(self) -> None:
        self.total = self.right = 0
        self._sum_ns = self._least_ns = self._most_ns = 0
        self._times: Counter[int] = Counter()

    @property
    def is_all_right(self) -> bool:
        """Whether there were any, and each was answered right."""
        return 0 < self.total == self.right

    @property
    def loss_percent(self) -> float:
        """How many of a hundred were not answered right."""
        return 100 * (self.total - self.right) / self.total if self.total else 0.0

    def add(self, time_ns: int | None) -> None:
        """Count one that was answered right and took so long, or None if it wasn't."""
        self.total += 1
        if time_ns is None:
            return
        self._least_ns = min(time_ns, self._least_ns) if self.right else time_ns
        self._most_ns = max(time_ns, self._most_ns)
        self._sum_ns += time_ns
        self._times[int(float(f"{time_ns:.3e}"))] += 1
        self.right += 1

    def times_ms(self) -> Mapping[str, float]:
        """The least, the average, the most, and what half and 99 of a hundred took at most; empty if none was right."""
        if not self.right:
            return {}
        figures = {
            "min": self._least_ns,
            "avg": self._sum_ns / self.right,
            "max": self._most_ns,
            "p50": self._percentile(50),
            "p99": self._percentile(99),
        }
        return {name: round(time_ns / 1e6, 3) for name, time_ns in figures.items()}

    def _percentile(self, percent: int) -> int:
        left = ceil(self.right * percent / 100)
        if left == self.right:
            return self._most_ns
        for time_ns in sorted(self._times):
            left -= self._times[time_ns]
            if left <= 0:
                break
        return min(max(time_ns, self._least_ns), self._most_ns)

    def as_text(self, target: object, elapsed_s: float) -> str:
        """The last lines, as ping(8) has them."""
        trips = "1 round trip" if self.total == 1 else f"{self.total} round trips"
        loss = f"{self.right} answered right, {self.loss_percent:.6g}% loss, time {elapsed_s * 1000:.0f} ms"
        lines = ["", f"--- {target} echod ping statistics ---", f"{trips}, {loss}"]
        if times := self.times_ms():
            figures = "/".join(f"{time:.3f}" for time in times.values())
            lines.append(f"round trip {'/'.join(times)} = {figures} ms")
        return "\n".join(lines)

    def as_fields(self, target: object, elapsed_s: float) -> Mapping[str, Any]:
        """The same for programs."""
        return {
            "target": str(target),
            "round_trips": self.total,
            "answered_right": self.right,
            "loss_percent": round(self.loss_percent, 3),
            "elapsed_ms": round(elapsed_s * 1000, 3),
            "time_ms": self.times_ms() or None,
        }
