"""The statistics as metrics, in the text format that Prometheus reads.

Nothing is counted here: each scrape reads one snapshot. prometheus-client knows the format; it takes 30 ms to import,
so this room is imported by the first scrape, aside.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE_LATEST", "exposition"]

_COUNTERS = {
    "lines": ("echod_lines", "Messages answered."),
    "bytes_in": ("echod_bytes_in", "Bytes received from clients."),
    "bytes_out": ("echod_bytes_out", "Bytes of replies, less those that clients were cut off from."),
    "upgrades": ("echod_upgrades", "Live upgrades."),
    "log_dropped": ("echod_log_dropped", "Log events lost because the log's reader or disk took none."),
}

_GAUGES = {
    "uptime_s": ("echod_uptime_seconds", "Since the start, upgrades included."),
    "config_generation": ("echod_config_generation", "Configurations put in force so far."),
    "held_bytes": ("echod_held_bytes", "Memory of lines begun and of replies that the kernel has not taken."),
    "rss_bytes": ("echod_resident_memory_bytes", "Resident memory."),
    "open_files": ("echod_open_files", "Descriptors in use."),
}


def exposition(stats: Mapping[str, Any]) -> bytes:
    """A snapshot as text; what is unknown in it is left out."""
    return generate_latest(_Snapshot(stats))


class _Snapshot(Collector):
    def __init__(self, stats: Mapping[str, Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Each metric (prometheus_client.registry.Collector)."""
        stats = self._stats
        yield InfoMetricFamily("echod", "What runs.", value={"version": stats["version"]})
        yield from _connections(stats["connections"])
        for key, (name, words) in _COUNTERS.items():
            if stats[key] is not None:
                yield CounterMetricFamily(name, words, value=stats[key])
        reloads = CounterMetricFamily("echod_reloads", "Reloads, by what came of them.", labels=["verdict"])
        for verdict in ("applied", "refused"):
            reloads.add_metric([verdict], stats["reloads"][verdict])
        yield reloads
        for key, (name, words) in _GAUGES.items():
            if stats[key] is not None:
                yield GaugeMetricFamily(name, words, value=stats[key])
        lag = "How late the event loop was at worst, forgotten by and by."
        yield GaugeMetricFamily("echod_loop_lag_seconds", lag, value=stats["loop_lag_ms"] / 1000)
        leaving = "1 from the signal to stop on, else 0."
        yield GaugeMetricFamily("echod_draining", leaving, value=stats["state"] == "draining")


def _connections(counts: Mapping[str, Any]) -> Iterator[Metric]:
    yield GaugeMetricFamily("echod_connections_open", "Clients connected.", value=counts["open"])
    words = "Clients let in: those that are open and those that were closed."
    yield CounterMetricFamily("echod_connections_accepted", words, value=counts["accepted"])
    for key, words in (("rejected", "Clients turned away, by reason."), ("closed", "Connections closed, by reason.")):
        family = CounterMetricFamily(f"echod_connections_{key}", words, labels=["reason"])
        for reason, count in counts[key].items():
            family.add_metric([reason], count)
        yield family
