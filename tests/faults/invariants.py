"""Continuous checks from outside of what a daemon must do under any attack.

Each check runs in its own thread, at a real-time priority where that is allowed. The time in which that thread or the
daemon waited for a CPU is subtracted.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.faults.attackers import IP_BIND_ADDRESS_NO_PORT
from tests.faults.measurements import assert_adds_up
from tests.support.daemon import Daemon

FED_S = 2.0
"""Longest time without a keep-alive for the watchdog, in seconds."""

WATCHDOG_S = 3.0
"""The watchdog interval; the daemon sends a keep-alive every third of it."""

ANSWER_S = 1.0
"""Longest time of a line, a visit, a health check or a signal, in seconds."""

HELD_BYTES = 16 * 1024 * 1024
"""`limits.held_bytes` of the daemon."""

GROWTH_BYTES = HELD_BYTES + HELD_BYTES // 2 + 32 * 1024 * 1024
"""Allowed growth of memory: the bound, the waste of the allocator, connections and events."""

GIVE_UP_S = 60.0
POLL_S = 0.1
PAUSE_S = 0.002
TALKER, VISITOR = "127.0.0.2", "127.0.0.3"
"""Addresses of the clients, which no limit per address applies to."""


@dataclass(slots=True)
class Waits:
    """The durations of one kind of operation."""

    name: str
    limit_s: float
    seconds: list[float] = field(default_factory=list)

    @property
    def worst_s(self) -> float:
        return max(self.seconds, default=0.0)

    def share_s(self, share: float) -> float:
        """Return the quantile of the durations for this share."""
        ordered = sorted(self.seconds) or [0.0]
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


class WrongError(Exception):
    """An answer was wrong."""


class InvariantMonitor:
    """Checks a daemon from `begin` to `end`; `findings` lists what was wrong."""

    def __init__(self, echod: Daemon, notifications: socket.socket, admin: str, port: int, admin_port: int) -> None:
        self.talk = Waits("a reply", ANSWER_S)
        self.visit = Waits("a visit", ANSWER_S)
        self.health = Waits("a health check", ANSWER_S)
        self.local_health = Waits("a health check by the Unix socket", ANSWER_S)
        self.dump = Waits("a dump of the statistics", ANSWER_S)
        self.reload = Waits("a reload", ANSWER_S)
        self.fed = Waits("a sign of life", FED_S)
        self.findings: list[str] = []
        """What was wrong."""
        self.late: list[str] = []
        """Correct answers that came too late."""
        self.growth_bytes = 0
        self._echod = echod
        self._notifications = notifications
        self._admin, self._port, self._admin_port = admin, port, admin_port
        self._is_over = threading.Event()
        self._open: set[socket.socket] = set()
        self._rss_bytes = _rss_bytes(echod.pid)
        checks = (self._talk, self._visit, self._ask_health, self._ask_health_here, self._signal, self._count_beats)
        self._threads = [threading.Thread(target=self._run, args=(check,), daemon=True) for check in checks]
        self._threads.append(threading.Thread(target=self._weigh, daemon=True))

    @property
    def waits(self) -> list[Waits]:
        return [self.talk, self.visit, self.health, self.local_health, self.dump, self.reload, self.fed]

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def forget(self) -> None:
        """Discard the durations measured until now."""
        for waits in self.waits:
            waits.seconds.clear()

    def end(self) -> None:
        """End the checks; operations in progress count with the time until now."""
        self._is_over.set()
        while any(thread.is_alive() for thread in self._threads):
            for sock in [*self._open]:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # wakes up the thread that waits for it
            for thread in self._threads:
                thread.join(POLL_S)
        for waits in self.waits:
            late = [each for each in waits.seconds if each > waits.limit_s]
            if late:
                self.late.append(f"{waits.name} took {max(late):.2f} s ({len(late)} of {len(waits.seconds)} late)")
        if self.growth_bytes > GROWTH_BYTES:
            self.findings.append(f"memory grew by {self.growth_bytes / 1e6:.0f} MB")

    def check_log(self) -> None:
        """Check the complete log."""
        for event in self._echod.events:
            if "exception" in event or event.get("logger"):
                self.findings.append(f"logged: {json.dumps(event)}")
            if event["event"] == "stop overdue":
                self.late.append("stop overdue, says the log")
            if event["event"] == "stats":
                try:
                    assert_adds_up(event)
                except AssertionError as error:
                    self.findings.append(f"counted wrong: {error}")
        self.findings += [f"logged: {line}" for line in self._echod.other_lines]

    # -- checks ----------------------------------------------------------------------------------------------------

    def _run(self, check: Callable[[], None]) -> None:
        hurry(threading.get_native_id())
        while not self._is_over.is_set():
            try:
                check()
            except (WrongError, OSError) as error:
                if not self._is_over.is_set():
                    self.findings.append(f"{check.__name__.strip('_')}: {error!r}")
            self._is_over.wait(POLL_S)

    def _talk(self) -> None:
        """Send lines and check replies on one connection."""
        with self._connected(TALKER, self._port) as client:
            number = 0
            while not self._is_over.wait(PAUSE_S):
                number += 1
                with self._timed(self.talk):
                    client.sendall(b"bystander %d\n" % number)
                    self._expect(client, b"BYSTANDER %d\n" % number)

    def _visit(self) -> None:
        """Connect, send a line, read the reply and disconnect."""
        with self._timed(self.visit), self._connected(VISITOR, self._port) as client:
            client.sendall("ist da wer, Straße?\n".encode())
            client.shutdown(socket.SHUT_WR)
            self._expect(client, b"IST DA WER, STRASSE?\n")
            if client.recv(1):
                raise WrongError("more than the reply")

    def _ask_health(self) -> None:
        """Make a health check over TCP, repeated if it is closed without an answer, as a balancer does."""
        for page in ("healthz", "readyz"):
            with self._timed(self.health):
                while not self._get(partial(self._connected, VISITOR, self._admin_port), page):
                    self._raise_if_over()
                    self._is_over.wait(0.01)

    def _ask_health_here(self) -> None:
        for page in ("healthz", "readyz"):
            with self._timed(self.local_health):
                while not self._get(self._connected_here, page):
                    self._raise_if_over()
                    self._is_over.wait(0.01)

    def _get(self, connected: Callable[[], "contextlib.AbstractContextManager[socket.socket]"], page: str) -> bool:
        received = b""
        with contextlib.suppress(ConnectionError), connected() as client:
            client.sendall(f"GET /{page} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            while chunk := client.recv(65_536):
                received += chunk
        if received and not received.startswith(b"HTTP/1.1 200 "):
            raise WrongError(repr(received))
        return bool(received)

    def _signal(self) -> None:
        for number, event, waits in (
            (signal.SIGUSR1, "stats", self.dump),
            (signal.SIGHUP, "reload applied", self.reload),
        ):
            known = len(self._echod.events)
            with self._timed(waits):
                self._echod.send(number)
                self._await_event(event, known)
            self._is_over.wait(POLL_S)

    def _await_event(self, name: str, seen: int) -> None:
        events = self._echod.events
        while True:
            count = len(events)
            if any(event["event"] == name for event in events[seen:count]):
                return
            seen = count
            self._is_over.wait(0.001)
            self._raise_if_over()

    def _count_beats(self) -> None:
        with self._timed(self.fed):
            while not self._is_over.is_set():
                with contextlib.suppress(TimeoutError):
                    if b"WATCHDOG=1" in self._notifications.recv(4096):
                        return

    def _weigh(self) -> None:
        while not self._is_over.wait(0.02):
            self.growth_bytes = max(self.growth_bytes, _rss_bytes(self._echod.pid) - self._rss_bytes)

    # -- what checks are made of -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _timed(self, waits: Waits) -> Iterator[None]:
        began = Instant.now(self._echod.pid)
        try:
            yield
        finally:
            waits.seconds.append(began.waited_s())

    @contextlib.contextmanager
    def _connected(self, source: str, port: int) -> Iterator[socket.socket]:
        with self._registered(socket.AF_INET) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            client.bind((source, 0))
            client.connect(("127.0.0.1", port))
            yield client

    @contextlib.contextmanager
    def _connected_here(self) -> Iterator[socket.socket]:
        with self._registered(socket.AF_UNIX) as client:
            client.connect(self._admin)
            yield client

    @contextlib.contextmanager
    def _registered(self, family: socket.AddressFamily) -> Iterator[socket.socket]:
        with socket.socket(family) as client:
            client.settimeout(GIVE_UP_S)
            self._open.add(client)
            try:
                yield client
            finally:
                self._open.discard(client)

    def _expect(self, client: socket.socket, due: bytes) -> None:
        received = b""
        while len(received) < len(due):
            if not (chunk := client.recv(65_536)):
                raise WrongError(f"the stream ended after {received!r}, {due!r} was due")
            received += chunk
        if received != due:
            raise WrongError(f"{received!r} where {due!r} was due")

    def _raise_if_over(self) -> None:
        if self._is_over.is_set():
            raise WrongError("interrupted")


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment, from which the time that the daemon took is measured, without the time waiting for a CPU."""

    pid: int
    at: float
    starved_s: tuple[float, float]

    @classmethod
    def now(cls, pid: int) -> "Instant":
        return cls(pid, time.monotonic(), _starved_s(pid))

    @property
    def passed_s(self) -> float:
        return time.monotonic() - self.at

    def waited_s(self) -> float:
        try:
            starved_s = max(now - then for now, then in zip(_starved_s(self.pid), self.starved_s, strict=True))
        except OSError:  # the process has ended
            starved_s = 0.0
        return max(0.0, self.passed_s - starved_s)


def _starved_s(pid: int) -> tuple[float, float]:
    """Return how long the daemon's main thread and this thread have waited for a CPU (sched-stats.rst)."""
    daemon, own = (int(Path(f"/proc/{which}/schedstat").read_text().split()[1]) / 1e9 for which in (pid, "thread-self"))
    return daemon, own


def hurry(thread_id: int) -> None:
    """Give a thread real-time priority, if that is permitted."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(thread_id, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:  # the process has ended
        return 0
