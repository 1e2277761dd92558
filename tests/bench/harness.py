"""Runs one server on one core and the load on another, and takes the figures of one measurement.

CPU time is what the kernel accounted to the server's process, all threads of it, while the load counted replies.
"""

import contextlib
import json
import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.bench.peers import PORT, Peer, compiled
from tests.bench.workloads import IDLE, Workload
from tests.daemon import DEADLINE_S, free_port

_WARM_S = 0.2
_PAGE_BYTES = resource.getpagesize()


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core a server runs on, and which one the load."""

    server: int
    load: int

    @property
    def are_one(self) -> bool:
        """Whether there is only one: then they take turns, and only CPU time can be compared."""
        return self.server == self.load


def cores() -> Cores:
    """The first and the last one that we may use."""
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
    server_share: float
    """How busy the server was, as a part of its core: one that often sleeps shares no wake-up among several lines."""
    load_share: float
    """How busy the load was: near 1 it is the load that was measured."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    name: str
    process: "subprocess.Popen[bytes]"
    port: int
    first_reply_s: float
    """From its start to its first reply."""

    @property
    def rss_bytes(self) -> int:
        """Its resident memory now."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * _PAGE_BYTES


class Harness:
    """The load generator, built, with the files that it sends."""

    def __init__(self, folder: Path) -> None:
        """Build it in the folder; raises MissingError."""
        self.cores = cores()
        self._folder = folder
        self.program = compiled(Path(__file__).with_name("load.c"), folder)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for the servers, which inherit it

    @contextlib.contextmanager
    def serving(self, peer: Peer) -> Iterator[Running]:
        """The server, started on its core; what it logs goes through a pipe that is read on the other one."""
        port = free_port()
        with (
            self._pinned(self.cores.load, ["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as log,
            log.stdin or contextlib.nullcontext() as pipe,
        ):
            command = [part.replace(PORT, str(port)) for part in peer.command]
            began_at = time.monotonic()
            environment = {**_environment(), **peer.environment}
            with self._pinned(
                self.cores.server, command, stdin=subprocess.DEVNULL, stderr=pipe, env=environment
            ) as process:
                try:
                    _await_reply(process, port)
                    yield Running(peer.name, process, port, time.monotonic() - began_at)
                finally:
                    process.terminate()
                    _end(process)

    def measure(self, server: Running, workload: Workload, seconds: float) -> Figures:
        """Put the workload on it."""
        request, reply = workload.write(self._folder)
        arguments: list[str | Path] = [
            workload.mode,
            str(workload.connections),
            request,
            reply,
            str(_WARM_S),
            str(seconds),
        ]
        with self._loading(server, *arguments) as load:
            found = json.loads(load.communicate(timeout=DEADLINE_S + seconds)[0] or "{}")
        if load.returncode:
            raise RuntimeError(f"{server.name}: the load failed with {workload.about}")
        lines = found["blocks"] * workload.depth
        return Figures(
            cpu_us=found["server_cpu_s"] * 1e6 / lines,
            lines_per_s=lines / found["seconds"],
            p50_us=found["p50_us"],
            p99_us=found["p99_us"],
            server_share=found["server_cpu_s"] / found["seconds"],
            load_share=found["load_cpu_s"] / found["seconds"],
        )

    def idle_bytes(self, server: Running) -> int:
        """Its resident memory with the connections of IDLE open."""
        request, reply = IDLE.write(self._folder)
        with self._loading(server, IDLE.mode, str(IDLE.connections), request, reply) as load:
            assert load.stdout
            assert load.stdin
            if not load.stdout.readline():
                raise RuntimeError(f"{server.name}: the load failed with {IDLE.about}")
            held = server.rss_bytes
            load.stdin.close()
            load.wait(DEADLINE_S)
        return held

    @contextlib.contextmanager
    def _loading(self, server: Running, *arguments: "str | Path") -> "Iterator[subprocess.Popen[bytes]]":
        command = [self.program, str(server.port), str(server.process.pid), *arguments]
        with self._pinned(self.cores.load, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as load:
            yield load

    @contextlib.contextmanager
    def _pinned(
        self, core: int, command: "list[str | Path] | list[str]", **options: object
    ) -> "Iterator[subprocess.Popen[bytes]]":
        """A process on that core, from its first moment on, and gone in the end."""
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
    """Ours, but nothing that changes a default of echod."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("ECHOD_", "PYTHON"))}


def _await_reply(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            client = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
            break
        except ConnectionRefusedError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.0005)
    with client:
        client.sendall(b"ready?\n")
        if client.recv(64) != b"READY?\n":
            raise RuntimeError("a server that doesn't upper-case")


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
