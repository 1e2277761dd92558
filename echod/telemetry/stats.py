"""The statistics: what is counted, and what each figure means.

`Statistics` is the one list of them. `/stats`, the log event, `/metrics`, the table of `echod stats` and the
documentation derive from its fields and their metadata (see `figures`).

Each connection counts for itself, so that the hot path counts nothing twice. A snapshot adds the open connections to
the sum of the closed ones.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin

import msgspec
from msgspec import Struct, field

from echod import __version__
from echod.telemetry.reasons import CloseReason, RejectReason

State = Literal["serving", "draining"]

CLOSE_REASONS = tuple(reason.value for reason in CloseReason)
REJECT_REASONS = tuple(reason.value for reason in RejectReason)


class Figure(Struct, frozen=True):
    """What one statistic means, and how `/metrics` and the table of `echod stats` show it."""

    help: str
    """One sentence, the `# HELP` text of the metric."""
    kind: Literal["counter", "gauge", "info"] = "gauge"
    unit: Literal["", "bytes", "seconds", "milliseconds"] = ""
    """The unit of the statistic; the metric of one in milliseconds is in seconds."""
    metric: str = ""
    """The name of the metric; "" if there is none."""
    label: str = ""
    """The label of the metric that has a value for each key, if the statistic is a mapping."""
    section: str = ""
    """The section of the table that shows it; "" if the table's first or last lines do."""
    row: str = ""
    """The name in the table."""
    warn_from: float = float("inf")
    """The value from which an operator should look at it."""
    bad_from: float = float("inf")
    """The value from which clients suffer."""


class Connections(Struct, frozen=True, kw_only=True):
    """The statistics of clients; accepted = open + closed."""

    open: Annotated[
        int,
        Figure("Clients connected now.", metric="echod_connections_open", section="connections", row="open"),
    ]
    accepted: Annotated[
        int,
        Figure(
            "Clients admitted, whether still connected or not.",
            kind="counter",
            metric="echod_connections_accepted_total",
            section="connections",
            row="accepted",
        ),
    ]
    closed: Annotated[
        dict[str, int],
        Figure(
            "Connections closed, by reason.",
            kind="counter",
            metric="echod_connections_closed_total",
            label="reason",
            section="connections",
            row="closed",
        ),
    ]
    rejected: Annotated[
        dict[str, int],
        Figure(
            "Clients rejected, by reason; they are neither accepted nor closed.",
            kind="counter",
            metric="echod_connections_rejected_total",
            label="reason",
            section="connections",
            row="rejected",
            warn_from=1,
        ),
    ]


class Reloads(Struct, frozen=True, kw_only=True):
    """The statistics of configuration reloads."""

    applied: Annotated[int, Figure("Reloads whose configuration was put in force.", kind="counter")]
    refused: Annotated[int, Figure("Reloads refused; the old configuration stayed in force.", kind="counter")]
    last_error: Annotated[str, Figure("The errors of the last reload if it was refused, else empty.", kind="info")]


class TlsStatistics(Struct, frozen=True, kw_only=True):
    """The statistics of TLS."""

    handshakes: Annotated[
        dict[str, int],
        Figure(
            "TLS handshakes, by the negotiated version, or failed.",
            kind="counter",
            metric="echod_tls_handshakes_total",
            label="result",
            section="connections",
            row="TLS handshakes",
        ),
    ]
    certificate_ends: Annotated[
        dict[str, float],
        Figure(
            "When the certificate of each TLS listener ends, in seconds since the epoch.",
            unit="seconds",
            metric="echod_tls_certificate_expiry_timestamp_seconds",
            label="address",
            section="connections",
            row="TLS certificate",
        ),
    ]


class Statistics(Struct, frozen=True, kw_only=True):
    """Every statistic at one moment, in the order of the table of `echod stats`."""

    version: Annotated[str, Figure("The version of the running program.", kind="info", metric="echod_info")]
    pid: Annotated[int, Figure("The process id; an upgrade keeps it.", kind="info")]
    state: Annotated[
        State, Figure("Serving (0), or draining (1) from the first signal to stop on.", metric="echod_draining")
    ]
    uptime_s: Annotated[
        float,
        Figure(
            "Seconds since the start; an upgrade does not reset it.",
            unit="seconds",
            metric="echod_uptime_seconds",
        ),
    ]
    fast_path: Annotated[bool, Figure("Whether the compiled fast path is in use.", kind="info")]
    connections: Connections
    tls: TlsStatistics
    lines: Annotated[
        int,
        Figure("Messages answered.", kind="counter", metric="echod_lines_total", section="traffic", row="lines"),
    ]
    bytes_in: Annotated[
        int,
        Figure(
            "Bytes received from clients.",
            kind="counter",
            unit="bytes",
            metric="echod_bytes_in_total",
            section="traffic",
            row="in",
        ),
    ]
    bytes_out: Annotated[
        int,
        Figure(
            "Bytes of replies, without those that an abort discarded.",
            kind="counter",
            unit="bytes",
            metric="echod_bytes_out_total",
            section="traffic",
            row="out",
        ),
    ]
    loop_lag_ms: Annotated[
        float,
        Figure(
            "The largest recent delay of the event loop; it decays.",
            unit="milliseconds",
            metric="echod_loop_lag_seconds",
            section="process",
            row="loop lag",
            warn_from=100,
            bad_from=1000,
        ),
    ]
    rss_bytes: Annotated[
        int | None,
        Figure(
            "Resident memory; unknown without /proc.",
            unit="bytes",
            metric="echod_resident_memory_bytes",
            section="process",
            row="memory",
        ),
    ]
    held_bytes: Annotated[
        int,
        Figure(
            "Memory of partial lines, unanswered lines and pending replies, of all clients together.",
            unit="bytes",
            metric="echod_held_bytes",
            section="process",
            row="held for clients",
        ),
    ]
    open_files: Annotated[
        int | None,
        Figure(
            "Open descriptors; unknown without /proc.", metric="echod_open_files", section="process", row="open files"
        ),
    ]
    log_dropped: Annotated[
        int | None,
        Figure(
            "Log events lost because the log's reader or disk accepted none.",
            kind="counter",
            metric="echod_log_dropped_total",
            section="process",
            row="log dropped",
            warn_from=1,
        ),
    ]
    config_generation: Annotated[
        int,
        Figure(
            "Configurations put in force, the first one included.",
            metric="echod_config_generation",
            section="process",
            row="configuration",
        ),
    ]
    reloads: Annotated[
        Reloads,
        Figure(
            "Reloads, by result.",
            kind="counter",
            metric="echod_reloads_total",
            label="verdict",
            section="process",
            row="reloads",
        ),
    ]
    upgrades: Annotated[
        int,
        Figure(
            "Live upgrades since the start.",
            kind="counter",
            metric="echod_upgrades_total",
            section="process",
            row="upgrades",
        ),
    ]


TLS_RESULTS = ("TLSv1.2", "TLSv1.3", "failed")
NO_CERTIFICATES: Mapping[str, float] = {}


@cache
def figures() -> dict[str, Figure]:
    """Return the metadata of each statistic by its name, in the order of the table; inner names follow a dot."""
    return dict(_figures(Statistics, ""))


def _figures(struct: type[Struct], prefix: str) -> Iterator[tuple[str, Figure]]:
    for each in msgspec.structs.fields(struct):
        kind = each.type
        if get_origin(kind) is Annotated:
            kind, figure = get_args(kind)
            yield prefix + each.name, figure
        if isinstance(kind, type) and issubclass(kind, Struct):
            yield from _figures(kind, f"{prefix}{each.name}.")


class Traffic(Protocol):
    """What one connection has counted so far."""

    @property
    def lines(self) -> int:
        """Messages answered."""

    @property
    def held_bytes(self) -> int:
        """Memory that its lines and pending replies use now."""

    bytes_in: int
    bytes_out: int


class Stats(Struct):
    """The counters of one process, without those of its open connections."""

    gauges: Mapping[str, Callable[[], int]]
    """Functions that a snapshot calls, by the statistic's name: log_dropped, rss_bytes, open_files."""

    is_fast_path: bool = False

    started_at: float = field(default_factory=time.monotonic)
    config_generation: int = 1
    accepted: int = 0
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REJECT_REASONS, 0))
    closed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLOSE_REASONS, 0))
    lines: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    tls_handshakes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TLS_RESULTS, 0))
    reloads_applied: int = 0
    reloads_refused: int = 0
    reload_error: str = ""
    upgrades: int = 0
    loop_lag_s: float = 0.0

    def save(self) -> dict[str, Any]:
        """Return the counters for the next program in a live upgrade, which passes them to `restore`."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name not in ("gauges", "is_fast_path")}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue with the counters of the predecessor; a reason that no longer exists keeps its count."""
        for name in self.__struct_fields__:
            if isinstance(ours := getattr(self, name), dict):
                ours.update(saved.get(name, {}))
            elif name in saved:
                setattr(self, name, saved[name])

    def count_handshake(self, version: str) -> None:
        """Count a TLS handshake by its negotiated version; "" means that it failed."""
        self.tls_handshakes[version or "failed"] += 1

    def close(self, reason: CloseReason, traffic: Traffic) -> None:
        """Count a connection as closed and add what it has counted."""
        self.closed[reason.value] += 1
        self.lines += traffic.lines
        self.bytes_in += traffic.bytes_in
        self.bytes_out += traffic.bytes_out

    def snapshot(
        self, state: State, live: Iterable[Traffic], certificate_ends: Mapping[str, float] = NO_CERTIFICATES
    ) -> dict[str, Any]:
        """Return the statistics at this moment, those of the `live` connections included, in the shape of `Statistics`.

        `certificate_ends` says when the certificate of each TLS listener ends, in seconds since the epoch.

        They are consistent: accepted = open + closed.
        """
        live_lines = live_in = live_out = live_connections = held = 0
        for traffic in live:
            live_connections += 1
            live_lines += traffic.lines
            live_in += traffic.bytes_in
            live_out += traffic.bytes_out
            held += traffic.held_bytes
        statistics = Statistics(
            version=__version__,
            pid=os.getpid(),
            state=state,
            uptime_s=round(time.monotonic() - self.started_at, 3),
            fast_path=self.is_fast_path,
            connections=Connections(
                open=live_connections, accepted=self.accepted, closed=self.closed, rejected=self.rejected
            ),
            tls=TlsStatistics(handshakes=self.tls_handshakes, certificate_ends=dict(certificate_ends)),
            lines=self.lines + live_lines,
            bytes_in=self.bytes_in + live_in,
            bytes_out=self.bytes_out + live_out,
            loop_lag_ms=round(self.loop_lag_s * 1000, 3),
            held_bytes=held,
            config_generation=self.config_generation,
            reloads=Reloads(applied=self.reloads_applied, refused=self.reloads_refused, last_error=self.reload_error),
            upgrades=self.upgrades,
            **{name: _value(ask) for name, ask in self.gauges.items()},
        )
        found: dict[str, Any] = msgspec.to_builtins(statistics)
        return found


def _value(ask: Callable[[], int]) -> int | None:
    """Return None for a gauge that cannot be read, because a snapshot must not fail."""
    try:
        return ask()
    except OSError:
        return None
