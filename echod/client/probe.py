"""Round trips without I/O: the text to send, the check of the reply, and the statistics of many round trips.

A reply is compared with `str.upper` itself, not with echod's own code.
"""

from collections import Counter
from collections.abc import Mapping
from math import ceil
from typing import Any, NamedTuple

from echod.net.address import TcpAddress, UnixAddress

LETTERS = "abcdßefgéhijλklmжnopñqrsþtuvwπxyz"
"""The letters of a text. In upper case each has as many bytes, and no two adjacent ones are non-ASCII."""

ERROR = b"ERROR "
"""The start of an error line, which continues in lower case; no reply can look like that."""

SHOWN = 60
"""How many characters of a reply are shown."""


class TlsOptions(NamedTuple):
    """How to use TLS; a path or name is "" if it is not given, and the default CAs are those of the system."""

    ca: str = ""
    certificate: str = ""
    key: str = ""
    server_name: str = ""
    is_insecure: bool = False


class Plan(NamedTuple):
    """What to ping and how: `rounds` is None for no end, `text_bytes` does not include the LF."""

    target: TcpAddress | UnixAddress
    rounds: int | None
    interval_s: float
    wait_s: float
    text_bytes: int
    tls: TlsOptions | None = None


def text(sequence: int, size: int) -> str:
    """Return the text to send in a round trip: `size` bytes of UTF-8, different from the texts before and after it."""
    number = f"{sequence} "
    start = sequence % len(LETTERS)
    letters = LETTERS[start:] + LETTERS[:start]
    whole = (number if len(number) < size // 2 else "") + letters * (size // len(LETTERS) + 1)
    cut = whole.encode()[:size].decode(errors="ignore")
    return cut + "." * (size - len(cut.encode()))


def mismatch(sent: str, reply: bytes) -> str | None:
    """Say what is wrong with everything received for a text; return None if it is the correct reply."""
    right = f"{sent.upper()}\n".encode()
    if reply == right:
        return None
    if is_error(reply):
        return f"error line: {shown(reply)}"
    if is_tls(reply):
        return "the server speaks TLS: use --tls"
    if reply.startswith(right):
        return f"unexpected data after the reply: {shown(reply[len(right) :])}"
    begin = 0 if max(len(reply), len(right)) <= SHOWN else max(_same(reply, right) - SHOWN // 4, 0)
    where = f", from byte {begin + 1} on" if begin else ""
    return f"wrong reply: {shown(reply[begin:])} instead of {shown(right[begin:])}{where}"


def _same(one: bytes, other: bytes) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (here, there) in pairs if here != there), min(len(one), len(other)))


def is_error(received: bytes) -> bool:
    """Whether this is an error line of a server."""
    return received.startswith(ERROR) and received[len(ERROR) :].islower()


def is_tls(received: bytes | bytearray) -> bool:
    """Whether this is the begin of a TLS record: an alert or a handshake message (RFC 8446, 5.1)."""
    return received[:2] in (b"\x15\x03", b"\x16\x03")


def shown(data: bytes) -> str:
    """Return the start of received data, quoted for a terminal."""
    text = data.decode(errors="backslashreplace").removesuffix("\n")
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


class Tally:
    """The statistics of round trips; its memory is bounded, because times are counted to four significant digits."""

    def __init__(self) -> None:
        self.total = self.right = 0
        self._sum_ns = self._least_ns = self._most_ns = 0
        self._times: Counter[int] = Counter()

    @property
    def is_all_right(self) -> bool:
        """Whether there was a round trip, and every one had the correct reply."""
        return 0 < self.total == self.right

    @property
    def loss_percent(self) -> float:
        """The percentage of round trips without the correct reply."""
        return 100 * (self.total - self.right) / self.total if self.total else 0.0

    def add(self, time_ns: int | None) -> None:
        """Count a round trip: its time if the reply was correct, else None."""
        self.total += 1
        if time_ns is None:
            return
        self._least_ns = min(time_ns, self._least_ns) if self.right else time_ns
        self._most_ns = max(time_ns, self._most_ns)
        self._sum_ns += time_ns
        self._times[int(float(f"{time_ns:.3e}"))] += 1
        self.right += 1

    def times_ms(self) -> Mapping[str, float]:
        """Return minimum, average, maximum, median and 99th percentile in ms; empty without a correct reply."""
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
        """Return the summary in the format of ping(8)."""
        trips = "1 round trip" if self.total == 1 else f"{self.total} round trips"
        loss = f"{self.right} answered correctly, {self.loss_percent:.6g}% loss, time {elapsed_s * 1000:.0f} ms"
        lines = ["", f"--- {target} echod ping statistics ---", f"{trips}, {loss}"]
        if times := self.times_ms():
            figures = "/".join(f"{time:.3f}" for time in times.values())
            lines.append(f"round trip {'/'.join(times)} = {figures} ms")
        return "\n".join(lines)

    def as_fields(self, target: object, elapsed_s: float) -> Mapping[str, Any]:
        """Return the summary for `--json`."""
        return {
            "target": str(target),
            "round_trips": self.total,
            "answered_right": self.right,
            "loss_percent": round(self.loss_percent, 3),
            "elapsed_ms": round(elapsed_s * 1000, 3),
            "time_ms": self.times_ms() or None,
        }
