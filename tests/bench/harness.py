"""Run one server on one core and the load on another, and take the figures of one measurement.

CPU time is what the kernel accounted to the server's process, all threads of it, while the load counted replies.
"""

import contextlib
import functools
import json
import os
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.bench.peers import BACKEND, FILE, PORT, Peer, built, compiled
from tests.bench.workloads import IDLE, Workload
from tests.support.daemon import DEADLINE_S, free_port

_WARM_S = 0.2
_SETTLE_S = 1.0
_IDLE_S = 4.0
_PAGE_BYTES = resource.getpagesize()


@dataclass(frozen=True, slots=True)
class Cores:
    """The core that a server runs on, and the core of the load."""

    server: int
    load: int

    @property
    def are_one(self) -> bool:
        """Whether there is only one core, so that only CPU time can be compared."""
        return self.server == self.load


def cores() -> Cores:
    """The first and the last core that this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(allowed[0], allowed[-1])


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement."""

    cpu_us: float
    """CPU time of the server for one line, in microseconds; for churn, for one connection."""
    lines_per_s: float
    p50_us: float
    p99_us: float
    p999_us: float
    """Latency: of a round trip, or from the moment at which the line was due where the rate is fixed."""
    server_share: float
    """The part of its core that the server used. Under a fixed load the rest is spare."""


@dataclass(frozen=True, slots=True)
class Idle:
    """The cost of idle connections."""

    rss_bytes: int
    share: float
    """The part of a core."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    peer: Peer
    process: "subprocess.Popen[bytes]"
    port: int
    first_reply_s: float
    """Time from its start to its first reply, in seconds."""
    behind: "subprocess.Popen[bytes] | None" = None
    """The server that it passes its clients to."""

    @property
    def pids(self) -> str:
        """The processes whose CPU time counts, separated by commas."""
        return ",".join(str(process.pid) for process in (self.process, self.behind) if process)

    @property
    def cpu_s(self) -> float:
        """The CPU time of all its threads so far."""
        return time.clock_gettime(~self.process.pid << 3 | 2)  # as clock_getcpuclockid(3) makes it

    @property
    def has_fastpath(self) -> bool:
        """Whether echod's compiled fast path is mapped into the process."""
        return "_fastpath." in Path(f"/proc/{self.process.pid}/maps").read_text()

    @property
    def rss_bytes(self) -> int:
        """Its resident memory now."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * _PAGE_BYTES


class Harness:
    """Runs servers and puts loads on them."""

    def __init__(self, directory: Path) -> None:
        """Build the load generator in the directory; raises MissingError."""
        self.cores = cores()
        self._folder = directory
        self.program = compiled(Path(__file__).with_name("load.c"), directory)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # inherited by the servers

    @contextlib.contextmanager
    def serving(self, peer: Peer) -> Iterator[Running]:
        """Start the server on its core, with a log that is read through a pipe on the other core."""
        port, backend = free_port(), free_port()
        file = self._folder / f"{peer.key}.conf"

        def filled(text: str) -> str:
            return text.replace(PORT, str(port)).replace(BACKEND, str(backend)).replace(FILE, str(file))

        if peer.file:
            file.write_text(filled(peer.file))
        with (
            self._pinned(self.cores.load, ["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as log,
            log.stdin or contextlib.nullcontext() as pipe,
            contextlib.ExitStack() as stack,
        ):
            environment = {**_environment(), **peer.environment}
            began_at = time.monotonic()
            behind = None
            if peer.behind:
                behind = stack.enter_context(self._server([*map(filled, peer.behind)], pipe, environment))
                _await_reply(peer, behind, backend, is_tls=False)
            process = stack.enter_context(self._server([*map(filled, peer.command)], pipe, environment))
            _await_reply(peer, process, port, is_tls=peer.is_tls)
            yield Running(peer, process, port, time.monotonic() - began_at, behind)

    @contextlib.contextmanager
    def _server(
        self, command: list[str], log: object, environment: Mapping[str, str]
    ) -> "Iterator[subprocess.Popen[bytes]]":
        """Run a server on its core, and stop it."""
        nothing = subprocess.DEVNULL
        options = {"stdin": nothing, "stdout": nothing, "stderr": log, "env": environment}
        with self._pinned(self.cores.server, command, **options) as process:
            try:
                yield process
            finally:
                process.terminate()
                _end(process)

    @functools.cached_property
    def tls_program(self) -> str:
        """The load generator for TLS; raises MissingError without Go."""
        return built(Path(__file__).with_name("load_tls.go"), self._folder)

    def measure(self, server: Running, workload: Workload, seconds: float) -> Figures:
        """Put the workload on the server."""
        timed = [str(_WARM_S), str(seconds), *([str(workload.per_s)] if workload.per_s else ())]
        with self._loading(server, workload, *timed) as load:
            found = json.loads(load.communicate(timeout=DEADLINE_S + seconds)[0] or "{}")
        if load.returncode:
            raise RuntimeError(f"{server.peer.name}: the load failed with {workload.about}")
        lines = found["blocks"] * workload.depth
        return Figures(
            cpu_us=found["server_cpu_s"] * 1e6 / lines,
            lines_per_s=lines / found["seconds"],
            p50_us=found["p50_us"],
            p99_us=found["p99_us"],
            p999_us=found["p999_us"],
            server_share=found["server_cpu_s"] / found["seconds"],
        )

    def idle(self, server: Running, workload: Workload = IDLE, seconds: float = _IDLE_S) -> Idle:
        """Open connections, and measure the idle server."""
        with self._loading(server, workload) as load:
            assert load.stdout
            assert load.stdin
            if not load.stdout.readline():
                raise RuntimeError(f"{server.peer.name}: the load failed with {workload.about}")
            time.sleep(_SETTLE_S)
            began_at, before_s = time.monotonic(), server.cpu_s
            time.sleep(seconds)
            share = (server.cpu_s - before_s) / (time.monotonic() - began_at)
            found = Idle(server.rss_bytes, share)
            load.stdin.close()
            load.wait(DEADLINE_S)
        return found

    @contextlib.contextmanager
    def _loading(self, server: Running, workload: Workload, *timed: str) -> "Iterator[subprocess.Popen[bytes]]":
        request, reply = workload.write(self._folder, server.peer.dialect)
        how = ["-s"] if self.cores.are_one and not server.peer.is_tls else []
        whom = [str(server.port), server.pids]
        command = [
            *(self.tls_program if server.peer.is_tls else self.program, *how, *whom),
            *(workload.mode, str(workload.connections), str(request), str(reply), *timed),
        ]
        with self._pinned(self.cores.load, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as load:
            yield load

    @contextlib.contextmanager
    def _pinned(self, core: int, command: list[str], **options: object) -> "Iterator[subprocess.Popen[bytes]]":
        """Run a process on this core from its first instruction on, and end it."""
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})
        try:
            process = subprocess.Popen(command, **options)  # type: ignore[call-overload]
        finally:
            os.sched_setaffinity(0, allowed)
        with process:
            try:
                yield process
            except BaseException:
                process.kill()
                raise


def _environment() -> Mapping[str, str]:
    """Return the environment of this process without what changes a default of echod."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("ECHOD_", "PYTHON"))}


def _await_reply(peer: Peer, process: "subprocess.Popen[bytes]", port: int, *, is_tls: bool) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            client = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
            break
        except ConnectionRefusedError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.0005)
    request, reply = peer.dialect.ask("ready?")
    with _secured(client) if is_tls else client as client:
        client.sendall(request)
        if client.recv(64) != reply:
            raise RuntimeError(f"{peer.name}: a wrong reply")


def _secured(client: socket.socket) -> socket.socket:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(client)


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
