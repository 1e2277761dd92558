"""`/metrics`: the statistics in the text format that Prometheus reads.

Importing prometheus-client takes 30 ms, so the first scrape imports this module, in a worker thread.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from echod.telemetry.stats import Figure, figures

__all__ = ["CONTENT_TYPE_LATEST", "exposition"]


def exposition(stats: Mapping[str, Any]) -> bytes:
    """Render a snapshot of the statistics; a value that is unknown (None) is left out."""
    return generate_latest(_Snapshot(stats))


class _Snapshot(Collector):
    def __init__(self, stats: Mapping[str, Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield each metric (prometheus_client.registry.Collector)."""
        for name, figure in figures().items():
            value: Any = self._stats
            for key in name.split("."):
                value = value[key]
            if figure.metric and value is not None:
                yield _metric(name, figure, value)


def _metric(name: str, figure: Figure, value: Any) -> Metric:
    if figure.kind == "info":
        return InfoMetricFamily(figure.metric.removesuffix("_info"), figure.help, value={name: value})
    new_family = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
    if figure.label:
        family = new_family(figure.metric, figure.help, labels=[figure.label])
        for key, count in value.items():
            if isinstance(count, int | float):  # not the text of the last error
                family.add_metric([key], count)
        return family
    if name == "state":
        value = value == "draining"
    return new_family(figure.metric, figure.help, value=value / 1000 if figure.unit == "milliseconds" else value)
