"""`/metrics`, read with prometheus-client's parser, agrees with the statistics."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from echod.admin.metrics import exposition
from echod.telemetry.stats import Stats
from tests.integration.test_admin_endpoint import get
from tests.support.daemon import UNMEASURED, ask, clean_environment, connect, read_line, serving, settings, settled

Samples = dict[tuple[str, str], float]


def samples(text: str) -> Samples:
    """Every value, by name and the one label that there may be."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in families
        for sample in family.samples
    }


def expected(stats: dict[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """The values of the statistics by the names of the metrics."""
    for name in ("lines", "bytes_in", "bytes_out", "upgrades", "log_dropped"):
        yield (f"echod_{name}_total", ""), stats[name]
    yield ("echod_connections_accepted_total", ""), stats["connections"]["accepted"]
    yield ("echod_connections_open", ""), stats["connections"]["open"]
    for kind in ("rejected", "closed"):
        for reason, count in stats["connections"][kind].items():
            yield (f"echod_connections_{kind}_total", reason), count
    for result in ("applied", "refused"):
        yield ("echod_reloads_total", result), stats["reloads"][result]
    yield ("echod_config_generation", ""), stats["config_generation"]
    yield ("echod_held_bytes", ""), stats["held_bytes"]
    yield ("echod_draining", ""), stats["state"] == "draining"
    yield ("echod_info", stats["version"]), 1


def test_metrics_agree_with_the_statistics_after_a_known_load() -> None:
    """Every counter is exact: lines, bytes, clients by reason, reloads."""
    with serving(*settings(limits_connections=2, admin_listen="127.0.0.1:0")) as echod:
        admin = echod.wait_for("admin endpoint")["listen"][0]
        with connect(echod.port) as client, connect(echod.port) as faulty, connect(echod.port) as refused:
            assert ask(client, b"one\ntwo\nthr") == b"ONE\n"
            assert read_line(refused) == b"ERROR too many connections\n"
            faulty.sendall(b"\xff\n")
            assert read_line(faulty) == b"ERROR invalid utf-8\n"
            faulty.close()
            settled(echod, 1)
            echod.reload("reload applied")
            found = samples(get(admin, "/metrics").body.decode())
            stats = json.loads(get(admin, "/stats").body)
            wanted = dict(expected(stats))
            assert {name: found[name] for name in wanted} == wanted
            assert (stats["lines"], stats["connections"]["rejected"]["limit"]) == (2, 1)
            assert found["echod_uptime_seconds", ""] <= stats["uptime_s"]
            assert found["echod_resident_memory_bytes", ""] > 1e6
            assert found["echod_open_files", ""] > 3
            client.close()


def test_metrics_are_text_of_prometheus() -> None:
    """The content type is that of Prometheus, HEAD is answered, and a second scrape has the same metrics."""
    with serving(*settings(admin_listen="127.0.0.1:0")) as echod:
        admin = echod.wait_for("admin endpoint")["listen"][0]
        first, second = get(admin, "/metrics"), get(admin, "/metrics")
        assert first.headers["content-type"].startswith("text/plain; version=")
        assert samples(first.body.decode()).keys() == samples(second.body.decode()).keys()


def test_what_is_unknown_is_left_out() -> None:
    """A gauge that cannot be read is left out and is no error."""

    def fail() -> int:
        raise OSError

    stats = Stats({"log_dropped": lambda: 3, "rss_bytes": fail, "open_files": fail}).snapshot("draining", ())
    found = samples(exposition(stats).decode())
    assert found["echod_log_dropped_total", ""] == 3
    assert found["echod_draining", ""] == 1
    assert ("echod_open_files", "") not in found


COST = """
import statistics, time
from echod.admin.metrics import exposition
from echod.telemetry.stats import Stats

stats = Stats(dict.fromkeys(("log_dropped", "rss_bytes", "open_files"), lambda: 1))
costs = []
for _ in range(100):
    began = time.thread_time()
    exposition(stats.snapshot("serving", ()))
    costs.append(time.thread_time() - began)
print(statistics.median(costs))
"""


def test_a_scrape_costs_less_than_a_millisecond_of_the_loop() -> None:
    """The median CPU time of a hundred scrapes, in a process without coverage measurement."""
    said = subprocess.run([sys.executable, "-c", COST], env=clean_environment() | UNMEASURED, capture_output=True)
    assert float(said.stdout) < 0.001, said
