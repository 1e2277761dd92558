"""What has been counted, and one consistent picture of it.

Connections count for themselves, so that nothing is counted twice on the way of a line; a snapshot adds the live ones
to the sum of the closed ones. Who counts and who prints is not known here.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from msgspec import Struct, field

from echod import __version__

State = Literal["serving", "draining"]

CLOSE_REASONS = (
    "client",
    "reset",
    "idle",
    "line timeout",
    "write timeout",
    "line too long",
    "invalid utf-8",
    "drained",
    "cut",
)
REJECT_REASONS = ("limit", "address", "proxy")


class Traffic(Protocol):
    """What one connection has carried so far."""

    @property
    def lines(self) -> int:
        """Messages answered."""

    @property
    def held_bytes(self) -> int:
        """Memory that its lines and replies take at present."""

    bytes_in: int
    bytes_out: int


class Stats(Struct):
    """The counters of one process; only a snapshot of them goes anywhere."""

    gauges: Mapping[str, Callable[[], int]]
    """What is asked at the moment of a snapshot, under its name: log_dropped, rss_bytes, open_files."""

    is_fast_path: bool = False

    started_at: float = field(default_factory=time.monotonic)
    config_generation: int = 1
    accepted: int = 0
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REJECT_REASONS, 0))
    closed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLOSE_REASONS, 0))
    lines: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    reloads_applied: int = 0
    reloads_refused: int = 0
    reload_error: str = ""
    upgrades: int = 0
    loop_lag_s: float = 0.0

    def past(self) -> dict[str, Any]:
        """The counts, for a program that goes on with them: see `resume`."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name not in ("gauges", "is_fast_path")}

    def resume(self, past: Mapping[str, Any]) -> None:
        """Go on counting where another has left off; a reason that is no more keeps its count."""
        for name in self.__struct_fields__:
            if isinstance(ours := getattr(self, name), dict):
                ours.update(past.get(name, {}))
            elif name in past:
                setattr(self, name, past[name])

    def close(self, reason: str, traffic: Traffic) -> None:
        """Count a connection as closed and add what it carried."""
        self.closed[reason] += 1
        self.lines += traffic.lines
        self.bytes_in += traffic.bytes_in
        self.bytes_out += traffic.bytes_out

    def snapshot(self, state: State, live: Iterable[Traffic]) -> dict[str, Any]:
        """Every count at this moment, with the `live` connections; accepted = open + closed holds in it."""
        live_lines = live_in = live_out = live_connections = held = 0
        for traffic in live:
            live_connections += 1
            live_lines += traffic.lines
            live_in += traffic.bytes_in
            live_out += traffic.bytes_out
            held += traffic.held_bytes
        return {
            "pid": os.getpid(),
            "version": __version__,
            "fast_path": self.is_fast_path,
            "state": state,
            "uptime_s": round(time.monotonic() - self.started_at, 3),
            "upgrades": self.upgrades,
            "config_generation": self.config_generation,
            "connections": {
                "open": live_connections,
                "accepted": self.accepted,
                "rejected": dict(self.rejected),
                "closed": dict(self.closed),
            },
            "lines": self.lines + live_lines,
            "bytes_in": self.bytes_in + live_in,
            "bytes_out": self.bytes_out + live_out,
            "reloads": {
                "applied": self.reloads_applied,
                "refused": self.reloads_refused,
                "last_error": self.reload_error,
            },
            "held_bytes": held,
            "loop_lag_ms": round(self.loop_lag_s * 1000, 3),
            **{name: _value(ask) for name, ask in self.gauges.items()},
        }


def _value(ask: Callable[[], int]) -> int | None:
    """A gauge that can't be read is unknown; a question must never end what it asks about."""
    try:
        return ask()
    except OSError:
        return None
