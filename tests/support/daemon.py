"""A real echod process under test, observed through its log and always ended."""

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

DEADLINE_S = 20.0
"""Deadline of every wait in a test, in seconds; generous, for busy machines."""

CONSOLE_SCRIPT = str(Path(sys.executable).with_name("echod"))

UNMEASURED = {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}
"""Environment that turns off coverage in a process whose time is tested."""

Event = dict[str, Any]


class Daemon:
    """An `echod serve` process, and its log events as they arrive.

    `through` is a process that standard error is piped through, such as `cat`.
    """

    def __init__(
        self,
        *arguments: str,
        command: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        descriptors: tuple[int, ...] = (),
        through: "subprocess.Popen[bytes] | None" = None,
    ) -> None:
        self.events: list[Event] = []
        self.other_lines: list[str] = []
        self._news = threading.Condition()
        self._is_ended = False
        self.process = subprocess.Popen(
            [*(command or (sys.executable, "-m", "echod")), "serve", *arguments],
            stdin=subprocess.DEVNULL,
            stderr=through.stdin if through else subprocess.PIPE,
            env=clean_environment() | dict(environment or {}),
            pass_fds=descriptors,
        )
        if through and through.stdin:
            through.stdin.close()  # echod holds the only writing end now
        self._log = through.stdout if through else self.process.stderr
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self._log
        self._log.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ports(self) -> list[int]:
        """The TCP ports of the event `ready`, in its order."""
        listen = self.wait_for("ready")["listen"]
        return [int(address.rpartition(":")[2]) for address in listen if not address.startswith("unix:")]

    @property
    def port(self) -> int:
        return self.ports[0]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_for(self, event: str, *, after: int = 0, **fields: Any) -> Event:
        """Wait for the first event with this name and these fields, from index `after` on."""
        return self.wait_until(
            lambda: next((found for found in self.events[after:] if _matches(found, event, fields)), None),
            f"no event {event!r} {fields or ''}",
        )

    def wait_until(self, look: Callable[[], Event | None], complaint: str) -> Event:
        end = time.monotonic() + DEADLINE_S
        with self._news:
            while (found := look()) is None:
                left_s = end - time.monotonic()
                if left_s <= 0 or self._is_ended:
                    raise AssertionError(f"{complaint} in {self.events} {self.other_lines}")
                self._news.wait(left_s)
        return found

    def exit_status(self, deadline_s: float = DEADLINE_S) -> int:
        """Wait for the exit; assert that the log has only events, and none with an exception."""
        status = self.process.wait(deadline_s)
        self._reader.join(DEADLINE_S)
        assert not self.other_lines, self.other_lines
        assert not [event for event in self.events if "exception" in event or event.get("logger")], self.events
        return status

    def stop(self) -> int:
        self.send(signal.SIGTERM)
        return self.exit_status()

    def stats(self) -> Event:
        """Request a stats dump and return it."""
        known = len(self.events)
        self.send(signal.SIGUSR1)
        return self.wait_for("stats", after=known)

    def reload(self, event: str) -> Event:
        """Request a reload and return the event `reload applied` or `reload refused`."""
        known = len(self.events)
        self.send(signal.SIGHUP)
        return self.wait_for(event, after=known)

    def events_named(self, name: str) -> list[Event]:
        return [event for event in self.events if event["event"] == name]

    def _read(self) -> None:
        assert self._log
        for line in self._log:
            with self._news:
                try:
                    self.events.append(json.loads(line))
                except ValueError:
                    self.other_lines.append(line.decode(errors="replace"))
                self._news.notify_all()
        with self._news:
            self._is_ended = True
            self._news.notify_all()


def _matches(found: Event, name: str, fields: Mapping[str, Any]) -> bool:
    return found["event"] == name and all(found.get(key) == value for key, value in fields.items())


def clean_environment() -> dict[str, str]:
    """Return the environment with warnings as errors and without echod's variables, except ECHOD_FASTPATH."""
    strange = ("ECHOD_", "RUNTIME_DIRECTORY")
    kept = {
        name: value for name, value in os.environ.items() if name == "ECHOD_FASTPATH" or not name.startswith(strange)
    }
    return kept | {"PYTHONWARNINGS": "error", "PYTHONDONTWRITEBYTECODE": ""}


@contextlib.contextmanager
def serving(*arguments: str, listen: bool = True, **options: Any) -> Iterator[Daemon]:
    """Run an echod on a free port, or where the arguments say; at the end, assert that it stops cleanly."""
    is_told = not listen or any(argument in ("-l", "-c") for argument in arguments)
    with Daemon(*(() if is_told else ("-l", "127.0.0.1:0")), *arguments, **options) as daemon:
        daemon.wait_for("ready")
        yield daemon
        if daemon.process.poll() is None:
            assert daemon.stop() in (0, 3)


def settings(**values: object) -> list[str]:
    """Return flags that set keys: `settings(timeouts_drain=1)` is `--set timeouts.drain=1`."""
    return [part for name, value in values.items() for part in ("--set", f"{name.replace('_', '.', 1)}={value}")]


def with_constants(*assignments: str) -> tuple[str, ...]:
    """Return a command that runs echod with other constants, such as `process.force_exit.STARTING_S = 1.0`."""
    changes = "".join(
        f"import echod.{line.partition(' = ')[0].rpartition('.')[0]}\nechod.{line}\n" for line in assignments
    )
    return (sys.executable, "-c", f"import sys\nfrom echod.__main__ import main\n{changes}sys.exit(main())")


def settled(echod: Daemon, open_connections: int) -> Event:
    """Return the statistics once at most this many connections are open."""
    while (stats := echod.stats())["connections"]["open"] > open_connections:
        pass
    return stats


def leave_descriptors(pid: int, count: int) -> tuple[int, int]:
    """Lower the soft limit so that the process can open `count` more files; return the previous limits."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + count, limits[1]))
    return limits


def free_port() -> int:
    """Return a free port below the ephemeral range, so that no client is assigned it before a test listens on it."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(lowest // 2, lowest), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def connect(port: int, *, receive_buffer: int | None = None) -> socket.socket:
    """Connect to 127.0.0.1 with a deadline for every operation."""
    client = socket.socket()
    client.settimeout(DEADLINE_S)
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        client.connect(("127.0.0.1", port))
    except OSError:
        client.close()
        raise
    return client


def connect_once_open(port: int) -> socket.socket:
    """Connect to a daemon that is starting or logs nothing, as soon as its port is open."""
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            return connect(port)
        except ConnectionRefusedError:
            assert time.monotonic() < end


def send_until_stuck(client: socket.socket) -> None:
    """Send lines without reading until the kernel accepts no more, or until the client is aborted."""
    client.settimeout(0.1)
    refusals = 0  # in a row: a single one may come from a busy machine
    text = rest = b"no reply is read\n" * 4096
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while refusals < 4:
            try:
                rest = rest[client.send(rest) :] or text  # continues in the middle of a line
                refusals = 0
            except TimeoutError:
                refusals += 1
    client.settimeout(DEADLINE_S)


def read_to_end(client: socket.socket) -> bytes:
    """Return everything up to the end of the stream; a reset raises ConnectionResetError."""
    received = bytearray()
    while chunk := client.recv(65536):
        received += chunk
    return bytes(received)


def read_line(client: socket.socket) -> bytes:
    """Return one line, read byte by byte, so that nothing behind it is consumed."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := client.recv(1)):
        line += byte
    return bytes(line)


def ask(client: socket.socket, line: bytes) -> bytes:
    """Send a line and return its reply."""
    client.sendall(line)
    return read_line(client)
