"""The load generator: it counts replies, notices a wrong byte, keeps its rate, and accounts the server's CPU time."""

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.harness import Harness
from tests.bench.peers import bare, everyone
from tests.bench.workloads import IDLE, RATES, WORKLOADS, Workload
from tests.support.daemon import CONSOLE_SCRIPT, DEADLINE_S, serving

FEW = Workload("few", "3 connections, 4 lines at a time", 3, depth=4)
COMING = Workload("coming", "3 at a time", 3, mode="churn")
STEADY = Workload("steady", "1000 lines a second", 3, mode="rate", per_s=1000)


def _run(
    harness: Harness, tmp_path: Path, port: int, pid: int, workload: Workload, *options: str, seconds: float = 0.2
) -> "subprocess.CompletedProcess[str]":
    request, reply = workload.write(tmp_path)
    timed = ["0", str(seconds), *([str(workload.per_s)] if workload.per_s else ())]
    what = [workload.mode, str(workload.connections), str(request), str(reply), *timed]
    command = [harness.program, *options, str(port), str(pid), *what]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)


@contextlib.contextmanager
def _answering(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """Run a server that does this with one client after the other; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # it is shut down
                while True:
                    client, _ = listener.accept()
                    with client, contextlib.suppress(OSError):
                        answer(client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE_S)


def _answer_all(client: socket.socket) -> None:
    while data := client.recv(1 << 16):
        client.sendall(data.upper())


@pytest.mark.parametrize("workload", [FEW, COMING], ids=lambda workload: workload.name)
def test_it_counts_what_was_answered(harness: Harness, tmp_path: Path, workload: Workload) -> None:
    """It counts the replies that the server counts, except for those that were under way in the end."""
    with serving() as server:
        done = _run(harness, tmp_path, server.port, server.pid, workload)
        assert (done.returncode, done.stderr) == (0, "")
        counted = int(done.stdout.partition('"blocks": ')[2].partition(",")[0])
        answered = server.stats()["lines"] / workload.depth
        assert counted > 0
        assert counted <= answered <= counted + 2 * workload.connections


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda client: client.sendall(client.recv(65536).upper().replace(b"Z", b"z")), "a reply was wrong"),
        (lambda client: client.sendall(client.recv(65536).upper() + b"\nMORE\n"), "a reply was wrong"),
        (lambda client: client.recv(1), "a connection was ended: "),
        (lambda client: client.sendall(client.recv(65536)[:5].upper()), "a connection was ended: "),
    ],
    ids=["one letter", "more than that", "no reply", "half a reply"],
)
def test_a_wrong_server_is_noticed(
    harness: Harness, tmp_path: Path, answer: Callable[[socket.socket], object], complaint: str
) -> None:
    """The measurement of a server with wrong replies fails."""
    with _answering(answer) as port:
        done = _run(harness, tmp_path, port, 1, Workload("one", "", 1))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"load: {complaint}")


@pytest.mark.parametrize("workload", [Workload("two", "", 2), replace(STEADY, connections=2)], ids=["blocks", "rate"])
def test_one_missing_reply_among_many_is_noticed(harness: Harness, tmp_path: Path, workload: Workload) -> None:
    """A client that is never answered fails the measurement, although another one is answered."""
    with _answering(_answer_all) as port:  # one client after the other
        done = _run(harness, tmp_path, port, 1, workload)
    missing = 1 if workload.mode == "blocks" else 100
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"load: {missing} replies never came\n")


def test_at_a_fixed_rate_every_line_is_sent(harness: Harness, tmp_path: Path) -> None:
    """As many as the rate asks for in the time, no matter how slow server and load are."""
    with serving() as server:
        done = _run(harness, tmp_path, server.port, server.pid, STEADY)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["blocks"] == 200
        assert server.stats()["lines"] == 200


def test_at_a_fixed_rate_a_stall_delays_every_line_that_is_due_meanwhile(harness: Harness, tmp_path: Path) -> None:
    """Latency counts from the moment when a line is due, not from when a stalled server lets it be sent."""

    def stall_once(client: socket.socket) -> None:
        lines = 0
        while data := client.recv(1 << 16):
            before, lines = lines, lines + data.count(b"\n")
            if before < 50 <= lines:
                time.sleep(0.2)
            client.sendall(data.upper())

    with _answering(stall_once) as port:
        done = _run(harness, tmp_path, port, 1, replace(STEADY, connections=1), seconds=0.3)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    # A line is due each millisecond. Line 50 waits for at least 200 ms, line 51 for 199, ..., so 161 of 300 for 40 or
    # more. The buckets of the histogram are 1.6 % wide.
    assert found["blocks"] == 300
    assert found["p50_us"] >= 39_000
    assert found["p99_us"] >= 190_000
    assert found["p999_us"] >= 196_000


def test_at_a_fixed_rate_it_keeps_what_the_kernel_does_not_take(harness: Harness, tmp_path: Path) -> None:
    """Lines wait in the load while a server doesn't read, and none is lost or cut."""

    def read_late(client: socket.socket) -> None:
        time.sleep(0.3)
        _answer_all(client)

    large = replace(STEADY, connections=1, line_bytes=60_000)
    with _answering(read_late) as port:
        done = _run(harness, tmp_path, port, 1, large)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["blocks"] == 200


def test_at_a_fixed_rate_replies_come_in_any_pieces(harness: Harness, tmp_path: Path) -> None:
    """Where one reply ends and the next begins isn't where a chunk ends."""

    def answer_in_pieces(client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := client.recv(1 << 16):
            for start in range(0, len(data), 7):
                client.sendall(data[start : start + 7].upper())

    with _answering(answer_in_pieces) as port:
        done = _run(harness, tmp_path, port, 1, replace(STEADY, connections=1))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "workload", [Workload("one", "", 1), replace(STEADY, connections=1, per_s=100)], ids=["blocks", "rate"]
)
def test_it_sleeps_only_if_it_is_told_to(harness: Harness, tmp_path: Path, workload: Workload) -> None:
    """Otherwise it spins, or a slow server would pay for waking it."""

    def answer_slowly(client: socket.socket) -> None:
        while data := client.recv(1 << 16):
            time.sleep(0.01)
            client.sendall(data.upper())

    spent = []
    for options in ((), ("-s",)):
        with _answering(answer_slowly) as port:
            done = _run(harness, tmp_path, port, 1, workload, *options, seconds=0.5)
        assert (done.returncode, done.stderr) == (0, "")
        spent.append(json.loads(done.stdout)["load_cpu_s"])
    spinning, sleeping = spent
    assert sleeping < spinning / 4


def test_it_says_that_it_may_open_no_more_files(harness: Harness, tmp_path: Path) -> None:
    """Where the hard limit of descriptors is too low for the idle connections, the complaint says so."""
    request, reply = Workload("files", "", 20).write(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        whom = [str(listener.getsockname()[1]), "1"]
        command = ["prlimit", "--nofile=16", harness.program, *whom, "blocks", "20", str(request), str(reply), "0", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (1, "load: socket: Too many open files\n")


def test_it_accounts_the_time_of_the_server(harness: Harness) -> None:
    """The kernel's own account of the process from outside says the same, and neither counts the load."""
    workload = next(each for each in WORKLOADS if each.name == "50")
    with harness.serving(bare()) as server:
        before = server.cpu_s
        figures = harness.measure(server, workload, 0.5)
        spent = server.cpu_s - before
    accounted = figures.cpu_us * figures.lines_per_s * 0.5 / 1e6
    assert accounted < spent, "it warmed up, too"
    assert accounted > 0.3 * spent


@pytest.mark.parametrize("key", ["c", "bare", "echod", "echod-python", "memcached", "redis"])
def test_every_server_takes_its_workloads(harness: Harness, tmp_path: Path, key: str) -> None:
    """Each server answers every byte of what it takes part in as the load expects it."""
    found, missing = everyone(tmp_path, (CONSOLE_SCRIPT,), [key])
    if missing:
        pytest.skip(next(iter(missing.values())))
    (peer,) = found
    with harness.serving(peer) as server:
        for workload in filter(peer.takes, (*WORKLOADS, *RATES)):
            figures = harness.measure(server, workload, 0.1)
            assert figures.lines_per_s > 0
            assert figures.p50_us <= figures.p99_us <= figures.p999_us


def test_an_idle_server_is_told_by_memory_and_cpu(harness: Harness) -> None:
    """With connections open the bare protocol needs more memory and next to no CPU time."""
    with harness.serving(bare()) as server:
        before = server.rss_bytes
        idle = harness.idle(server, replace(IDLE, connections=500), seconds=0.5)
    assert idle.rss_bytes > before
    assert 0 <= idle.share < 0.2
