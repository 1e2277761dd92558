"""The load generator: it counts what came back, notices a wrong byte, and accounts the server's time, not its own."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bench.harness import Harness
from tests.bench.peers import bare, echod
from tests.bench.workloads import WORKLOADS, Workload
from tests.daemon import DEADLINE_S, serving

FEW = Workload("few", "3 connections, 4 lines at a time", 3, depth=4)
COMING = Workload("coming", "3 at a time", 3, mode="churn")


def _run(
    harness: Harness, tmp_path: Path, port: int, pid: int, workload: Workload
) -> "subprocess.CompletedProcess[str]":
    request, reply = workload.write(tmp_path)
    arguments = [str(port), str(pid), workload.mode, str(workload.connections), str(request), str(reply), "0", "0.2"]
    return subprocess.run([harness.program, *arguments], capture_output=True, text=True, timeout=DEADLINE_S)


@contextlib.contextmanager
def _answering(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """A server that does this with each client; its port."""
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


@pytest.mark.parametrize("workload", [FEW, COMING], ids=lambda workload: workload.name)
def test_it_counts_what_was_answered(harness: Harness, tmp_path: Path, workload: Workload) -> None:
    """What it says was answered, the server answered, but for what was under way in the end."""
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
def test_it_notices(
    harness: Harness, tmp_path: Path, answer: Callable[[socket.socket], object], complaint: str
) -> None:
    """A server that isn't right has no figures."""
    with _answering(answer) as port:
        done = _run(harness, tmp_path, port, 1, Workload("one", "", 1))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"load: {complaint}")


def test_it_misses_a_reply_among_many(harness: Harness, tmp_path: Path) -> None:
    """A client that is never answered isn't hidden by another one that is."""

    def answer_all(client: socket.socket) -> None:
        while line := client.recv(65536):
            client.sendall(line.upper())

    with _answering(answer_all) as port:  # one client after the other
        done = _run(harness, tmp_path, port, 1, Workload("two", "", 2))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "load: 1 replies never came\n")


def test_it_says_that_it_may_open_no_more_files(harness: Harness, tmp_path: Path) -> None:
    """Where the hard limit of descriptors is too low for the idle connections, the complaint says so."""
    request, reply = Workload("files", "", 20).write(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        command = [
            "prlimit",
            "--nofile=16",
            harness.program,
            port,
            "1",
            "blocks",
            "20",
            str(request),
            str(reply),
            "0",
            "1",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (1, "load: socket: Too many open files\n")


def test_it_accounts_the_time_of_the_server(harness: Harness) -> None:
    """The kernel's own account of the process from outside says the same, and neither counts the load."""
    workload = next(each for each in WORKLOADS if each.name == "50")
    with harness.serving(bare()) as server:
        clock = ~server.process.pid << 3 | 2  # the CPU-time clock of a process: clock_getcpuclockid(3)
        before = time.clock_gettime(clock)
        figures = harness.measure(server, workload, 0.5)
        spent = time.clock_gettime(clock) - before
    accounted = figures.cpu_us * figures.lines_per_s * 0.5 / 1e6
    assert accounted < spent, "it warmed up, too"
    assert accounted > 0.3 * spent


def test_every_server_of_ours_takes_every_workload(harness: Harness) -> None:
    """All of them compare right with what is sent, mixed UTF-8 too."""
    with harness.serving(echod()) as server:
        for workload in WORKLOADS:
            figures = harness.measure(server, workload, 0.1)
            assert figures.cpu_us > 0
            assert figures.p50_us <= figures.p99_us
