"""The load generator for TLS and the servers of special kinds."""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.bench import report
from tests.bench.harness import Figures, Harness
from tests.bench.peers import CHECKED, Peer, certificate, echod, echod_checked, echod_tls
from tests.bench.results import Results
from tests.bench.workloads import RATES, TLS, WORKLOADS, Workload
from tests.support.daemon import DEADLINE_S

LINE, CHURN = TLS


@pytest.fixture
def program(harness: Harness) -> str:
    if not shutil.which("go"):
        pytest.skip("no `go` command: apt-get install golang-go")
    return harness.tls_program


def test_a_line_and_a_connection_are_measured(harness: Harness, program: str, tmp_path: Path) -> None:
    """A connection costs echod more than a line."""
    assert program
    with harness.serving(echod_tls(tmp_path)) as server:
        line, connection = (harness.measure(server, workload, 0.2) for workload in TLS)
    assert 0 < line.cpu_us < connection.cpu_us
    assert line.p50_us <= line.p99_us


@contextmanager
def _answering(directory: Path, change: bytes) -> Iterator[int]:
    """Run a TLS server that answers one client's lines with their upper case and a change; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate(directory))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True) as client:
                while data := client.recv(1 << 16):
                    client.sendall(data.upper().replace(b"A", change))

        thread = threading.Thread(target=serve)
        thread.start()
        yield int(listener.getsockname()[1])
        thread.join(DEADLINE_S)


@pytest.mark.parametrize(("change", "status"), [(b"A", 0), (b"B", 1)], ids=["right", "wrong"])
def test_a_wrong_byte_is_noticed(program: str, tmp_path: Path, change: bytes, status: int) -> None:
    request, reply = Workload("one", "1 connection", 1).write(tmp_path)
    with _answering(tmp_path, change) as port:
        arguments = [str(port), "1", "blocks", "1", str(request), str(reply), "0", "0.1"]
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == status, done.stderr
    assert ("a reply was wrong" in done.stderr) == bool(status)


def test_a_special_server_takes_only_its_workloads(tmp_path: Path) -> None:
    """No plain server gets a TLS client, and the reverse."""
    special, plain = echod_tls(tmp_path), echod()
    assert [each.name for each in (*WORKLOADS, *RATES, *TLS) if special.takes(each)] == ["tls", "tls-churn"]
    assert not [each.name for each in TLS if plain.takes(each)]
    assert [each.name for each in WORKLOADS if echod_checked().takes(each)] == ["churn"]


def test_special_servers_have_a_table_of_their_own(tmp_path: Path) -> None:
    results = Results()
    peers: list[Peer] = [echod(), echod_checked(), echod_tls(tmp_path)]
    for workload, name, cpu_us in (("churn", "echod", 40.0), ("churn", CHECKED, 44.0), ("tls", "echod, TLS", 18.0)):
        figures = Figures(cpu_us=cpu_us, lines_per_s=1, p50_us=1, p99_us=1, p999_us=1, server_share=1)
        results.figures[workload, name].append(figures)
    plain, special = report.tables(results, peers, is_brief=True).split("### Over TLS")
    assert "| workload | echod |\n" in plain
    assert "| workload | echod | echod, checks | echod, TLS |\n" in special
    assert "| 40 (40–40) | 44 (44–44) | – |" in special
    assert "over TLS | – | – | 18 (18–18) |" in special
