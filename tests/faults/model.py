"""A running daemon compared with a small model: clients, reloads, upgrades and signals in any order.

Hypothesis chooses the order. The model is what the documentation says: which replies a client gets, and what is
counted. Each step waits until the statistics agree with it. `python -m tests.faults.model --minutes 60` looks for an
order in which they don't, and prints the shortest one that it finds. A further kind of step is a further rule.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support.daemon import DEADLINE_S, UNMEASURED, Daemon, Event, read_to_end
from tests.support.reference import BROKEN, CASED, OTHERS, SPACES, reference

STEPS = 40
EXAMPLES_AT_ONCE = 5
DRAIN_S, QUIET_S = 0.5, 0.05
AGREE_S = 5.0
"""Longest time until the statistics agree with the model, while they are polled."""

CLIENTS = 12
"""The most clients that one step connects."""

GONE_WITH_A_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with a timeout of 0: close(2) sends RST."""

LIMITS = {"connections": (100, 6), "connections_per_address": (3, 0), "line_bytes": (64, 40)}
"""The keys that a reload changes, and their values."""

BAD = {
    "conections = 1": "unknown key",
    "connections_per_address = 'many'": "expected int",
    "connections_per_address = -1": "expected int >= 0",
    "connections_per_address =": "not valid TOML",
    "MISSING": "cannot be read",
    "LISTEN 127.0.0.1:{taken}": "already in use",
    "LISTEN unix:{directory}/in-the-way": "the file exists and is not a socket",
}
"""Invalid configurations, and their errors."""

HOSTS = ("127.0.0.1", "127.0.0.2")
WAYS = ("TCP", "unix", "PROXY, version 1", "PROXY, version 2")

PHASES = (hypothesis.Phase.generate, hypothesis.Phase.shrink)

ERRORS = {b"ERROR line longer": "line too long", b"ERROR invalid utf-8": "invalid utf-8"}
"""The beginning of each error line, and the reason it is counted as."""

pieces = st.sampled_from([each.encode() for each in (*CASED, *SPACES, *OTHERS, "word")])
texts = st.lists(pieces | st.just(b"\n"), max_size=12).map(b"".join)
indexes = st.integers(0, CLIENTS)
limits = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in LIMITS.items()})


@dataclass(slots=True, eq=False)
class Client:
    """A client, and what the daemon should know about it."""

    socket: socket.socket
    host: str
    """The address of the client, "" if it has none."""
    unfinished: bytes = b""
    lines: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def traffic(self) -> tuple[int, int, int]:
        return self.lines, self.bytes_in, self.bytes_out


@dataclass(slots=True)
class Counts:
    """The expected statistics of a daemon, without the traffic of open connections."""

    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    closed: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    applied: int = 0
    refused: int = 0
    upgrades: int = 0

    def expected(self, clients: list[Client]) -> Event:
        lines, bytes_in, bytes_out = (
            sum(each) for each in zip((0, 0, 0), *(c.traffic() for c in clients), strict=True)
        )
        return {
            "open": len(clients),
            "accepted": self.accepted,
            "rejected": dict(self.rejected),
            "closed": dict(self.closed),
            "lines": self.lines + lines,
            "bytes_in": self.bytes_in + bytes_in,
            "bytes_out": self.bytes_out + bytes_out,
            "applied": self.applied,
            "refused": self.refused,
            "config_generation": 1 + self.applied + self.upgrades,
            "upgrades": self.upgrades,
            "held_bytes": sum(len(client.unfinished) for client in clients),
        }

    @staticmethod
    def found(stats: Event) -> Event:
        """Extract the same counts from the statistics of the daemon; reasons with 0 are left out."""
        connections, reloads = stats["connections"], stats["reloads"]
        return {
            "open": connections["open"],
            "accepted": connections["accepted"],
            "rejected": {reason: count for reason, count in connections["rejected"].items() if count},
            "closed": {reason: count for reason, count in connections["closed"].items() if count},
            **{name: stats[name] for name in ("lines", "bytes_in", "bytes_out")},
            **{name: reloads[name] for name in ("applied", "refused")},
            **{name: stats[name] for name in ("config_generation", "upgrades", "held_bytes")},
        }


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=DEADLINE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(self._path)


while_running = precondition(lambda self: not self.is_stopped)
with_clients = precondition(lambda self: self.clients)


class Model(RuleBasedStateMachine):
    """The model of a daemon, which starts another one after each stop."""

    @initialize()
    def begin(self) -> None:
        """Start the first daemon."""
        self._start()

    @precondition(lambda self: self.is_stopped)
    @rule()
    def start_again(self) -> None:
        """Start another daemon."""
        self._start()

    def _start(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="echod-"))
        self.at_end = contextlib.ExitStack()
        self.at_end.callback(shutil.rmtree, self.directory)
        taken = self.at_end.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.taken_port = taken.getsockname()[1]
        (self.directory / "in-the-way").touch()
        self.limits = {name: values[0] for name, values in LIMITS.items()}
        self.has_unix = self.is_good = True
        self._write()
        self.clients: list[Client] = []
        self.ended: Counter[tuple[str, int, int, int]] = Counter()
        self.counts = Counts()
        self.is_stopped = False
        environment = {"RUNTIME_DIRECTORY": str(self.directory)} | UNMEASURED
        self.echod = self.at_end.enter_context(Daemon("-c", str(self._file), environment=environment))
        self.port, self.proxy_port = self.echod.ports
        for way, host in zip(WAYS, HOSTS * 2, strict=True):
            self._connect(host, way)

    def teardown(self) -> None:
        try:
            if not self.is_stopped:
                self._stop()
        finally:
            for client in self.clients:
                client.socket.close()
            self.at_end.close()

    @invariant()
    def the_statistics_agree(self) -> None:
        if self.is_stopped:
            return
        expected, end = self.counts.expected(self.clients), time.monotonic() + AGREE_S
        while (found := Counts.found(self._get("/stats"))) != expected:
            assert time.monotonic() < end, f"{found}, but {expected} was expected"

    # -- clients ---------------------------------------------------------------------------------------------------

    @while_running
    @rule(arrivals=st.lists(st.tuples(st.sampled_from(HOSTS), st.sampled_from(WAYS)), min_size=1, max_size=4))
    def connect(self, arrivals: list[tuple[str, str]]) -> None:
        """Connect by TCP, by a Unix socket, or with a PROXY header."""
        for host, way in arrivals:
            self._connect(host, way)
            self.the_statistics_agree()  # a limit depends on the clients that are connected

    def _connect(self, host: str, way: str) -> None:
        if len(self.clients) >= CLIENTS or (way == "unix" and not self.has_unix):
            return
        sock = socket.socket(socket.AF_UNIX if way == "unix" else socket.AF_INET)
        sock.settimeout(DEADLINE_S)
        if way == "unix":
            host = ""
            sock.connect(str(self.directory / "clients"))
        else:
            sock.bind((host, 0))
            sock.connect(("127.0.0.1", self.port) if way == "TCP" else ("127.0.0.2", self.proxy_port))
            sock.sendall(_header(way, host))
        if rejection := self._rejection(host):
            reason, words = rejection
            self.counts.rejected[reason] += 1
            with sock:
                assert read_to_end(sock) == f"ERROR {words}\n".encode()
        else:
            self.counts.accepted += 1
            self.clients.append(Client(sock, host))

    def _rejection(self, host: str) -> tuple[str, str] | None:
        """Return why another client from this address is rejected: the counter and the error line."""
        if len(self.clients) >= self.limits["connections"]:
            return "limit", "too many connections"
        limit = self.limits["connections_per_address"]
        if host and 0 < limit <= sum(client.host == host for client in self.clients):
            return "address", "too many connections from your address"
        return None

    @while_running
    @rule(garbage=st.sampled_from([b"GET / HTTP/1.1\r\n\r\n", b"PROXY TCP9 \r\n", b"\xff"]))
    def connect_without_a_header(self, garbage: bytes) -> None:
        """Connect to a listener that expects a PROXY header, and send none."""
        if len(self.clients) >= self.limits["connections"]:
            return
        with socket.create_connection(("127.0.0.2", self.proxy_port), DEADLINE_S) as sock:
            sock.sendall(garbage)
            assert read_to_end(sock) == b""
        self.counts.rejected["proxy"] += 1

    @with_clients
    @rule(index=indexes, text=texts, end=st.sampled_from([b"\n", b""]))
    def send(self, index: int, text: bytes, end: bytes) -> None:
        """Send lines, the last one perhaps unterminated."""
        self._send(self._pick(index), [text + end])

    @with_clients
    @rule(index=indexes, texts=st.lists(texts, min_size=2, max_size=6))
    def send_in_parts(self, index: int, texts: list[bytes]) -> None:
        """Send lines in several writes, cut at random places."""
        self._send(self._pick(index), texts)

    @with_clients
    @rule(index=indexes, text=texts, character=st.sampled_from(["ß", "ΐ", "😀"]), place=st.integers(1, 3))
    def send_a_cut_character(self, index: int, text: bytes, character: str, place: int) -> None:
        """Split a character over two writes."""
        cut = character.encode()
        self._send(self._pick(index), [text + cut[:place], cut[place:] + b"\n"])

    @with_clients
    @rule(index=indexes, count=st.integers(100, 2000))
    def pipeline(self, index: int, count: int) -> None:
        """Send many lines at once."""
        self._send(self._pick(index), [b"\nstra\xc3\x9fe \n" * count])

    @with_clients
    @rule(index=indexes, excess=st.integers(0, 2), end=st.sampled_from([b"\n", b"", b"\nmore\n"]))
    def send_a_long_line(self, index: int, excess: int, end: bytes) -> None:
        """Send a line of exactly the limit, or longer."""
        self._send(self._pick(index), [b"\n" + b"z" * (self.limits["line_bytes"] + excess) + end])

    @with_clients
    @rule(index=indexes, before=texts, broken=st.sampled_from(BROKEN), more=st.booleans())
    def send_invalid_utf_8(self, index: int, before: bytes, broken: bytes, more: bool) -> None:
        """Send invalid UTF-8; lines after the half-close are not answered."""
        client = self._pick(index)
        self._send(client, [before + broken + b"\n"], afterwards=b"more\n" if more else b"")

    @with_clients
    @rule(index=indexes)
    def half_close(self, index: int) -> None:
        """End the stream; an unterminated last line is answered."""
        client = self._pick(index)
        client.socket.shutdown(socket.SHUT_WR)
        reply, reason = self._due(client, b"", is_ended=True)
        self._read(client, reply)
        assert client.socket.recv(1) == b""
        self._leave(client, reason or "client")

    @with_clients
    @rule(index=indexes)
    def reset(self, index: int) -> None:
        """Reset the connection; on a Unix socket, which has no reset, close it without reading."""
        client = self._pick(index)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, GONE_WITH_A_RESET)
        if client.host:
            self._leave(client, "reset")
        else:
            reply, reason = self._due(client, b"", is_ended=True)
            self._leave(client, reason or ("reset" if reply else "client"))

    # -- the operator ----------------------------------------------------------------------------------------------

    @while_running
    @rule(limits=limits, has_unix=st.booleans(), by_signal=st.booleans())
    def reload(self, limits: dict[str, int], has_unix: bool, by_signal: bool) -> None:
        """Change limits and listeners by a reload, requested by signal or at the admin endpoint."""
        due = {f"limits.{name}" for name, value in limits.items() if value != self.limits[name]}
        due |= {"listen"} if has_unix != self.has_unix else set()
        self.limits, self.has_unix, self.is_good = limits, has_unix, True
        self._write()
        self.counts.applied += 1
        answer = self._reload("reload applied", self.counts.applied, 200, by_signal=by_signal)
        assert {*answer["changed"]} == due

    @while_running
    @rule(fault=st.sampled_from(sorted(BAD)), by_signal=st.booleans())
    def reload_badly(self, fault: str, by_signal: bool) -> None:
        """Reload an invalid configuration: only the counters change."""
        self.is_good = False
        self._write(fault)
        self.counts.refused += 1
        answer = self._reload("reload refused", self.counts.refused, 409, by_signal=by_signal)
        assert BAD[fault] in str(answer["errors"]), answer

    @while_running
    @rule()
    def upgrade(self) -> None:
        """Upgrade the program, which is refused while the configuration is invalid."""
        known = len(self.echod.events)
        self.echod.send(signal.SIGUSR2)
        if self.is_good:
            assert self.echod.wait_for("upgrade done", after=known)["pid"] == self.echod.pid
            self.counts.upgrades += 1
        else:
            self.echod.wait_for("upgrade refused", after=known)

    @while_running
    @rule()
    def dump(self) -> None:
        """Request a stats dump by signal: it agrees with the admin endpoint."""
        assert Counts.found(self.echod.stats()) == self.counts.expected(self.clients)

    @while_running
    @rule(page=st.sampled_from(["/healthz", "/readyz", "/metrics"]))
    def check_health(self, page: str) -> None:
        """Request a page from the admin endpoint."""
        self._get(page)

    @while_running
    @rule()
    def stop(self) -> None:
        """Stop it."""
        self._stop()
        self.at_end.close()

    # -- what steps are made of ------------------------------------------------------------------------------------

    def _pick(self, index: int) -> Client:
        return self.clients[index % len(self.clients)]

    def _due(self, client: Client, chunk: bytes, *, is_ended: bool = False) -> tuple[bytes, str]:
        """Count and return what a client is owed for a chunk, and why it is closed after it, if it is."""
        text = client.unfinished + chunk
        reply = reference(text, self.limits["line_bytes"], is_ended=is_ended)
        last = reply.rpartition(b"\n")[0].rpartition(b"\n")[2]
        reason = next((reason for words, reason in ERRORS.items() if last.startswith(words)), "")
        client.lines += reply.count(b"\n") - bool(reason)
        client.bytes_in += len(chunk)
        client.bytes_out += len(reply)
        client.unfinished = b"" if reason or is_ended else text.rpartition(b"\n")[2]
        return reply, reason

    def _send(self, client: Client, chunks: list[bytes], *, afterwards: bytes = b"") -> None:
        """Send each chunk after the replies to the previous one, until the client is closed for an error."""
        for chunk in chunks:
            client.socket.sendall(chunk)
            reply, reason = self._due(client, chunk)
            self._read(client, reply)
            if reason:
                assert client.socket.recv(1) == b""
                client.socket.sendall(afterwards)
                self._leave(client, reason)
                return

    def _read(self, client: Client, due: bytes) -> None:
        received = b""
        while len(received) < len(due) and (chunk := client.socket.recv(len(due) - len(received))):
            received += chunk
        assert received == due

    def _leave(self, client: Client, reason: str) -> None:
        client.socket.close()
        self.clients.remove(client)
        self._count(client, reason)

    def _count(self, client: Client, reason: str) -> None:
        self.counts.closed[reason] += 1
        self.counts.lines += client.lines
        self.counts.bytes_in += client.bytes_in
        self.counts.bytes_out += client.bytes_out
        self.ended[reason, *client.traffic()] += 1

    def _stop(self) -> None:
        """Stop the daemon; assert that lines are answered, streams end cleanly, and all counts are right."""
        self.is_stopped = True
        for client in self.clients:
            if not client.unfinished:
                client.socket.sendall(b"the last line\n")
        self.echod.send(signal.SIGTERM)
        for client in self.clients:
            self._read(client, b"" if client.unfinished else self._due(client, b"the last line\n")[0])
        open_clients = len(self.clients)
        for client in self.clients:
            assert client.socket.recv(1) == b""
            client.socket.close()
            self._count(client, "drained")
        self.clients.clear()
        assert self.echod.exit_status() == 0
        drained = self.echod.wait_for("drain finished")
        assert (drained["clean"], drained["cut"]) == (open_clients, 0)
        ended = (
            (event["reason"], event["lines"], event["bytes_in"], event["bytes_out"])
            for event in self.echod.events_named("connection closed")
        )
        assert Counter(ended) == self.ended

    @property
    def _file(self) -> Path:
        return self.directory / "echod.toml"

    def _write(self, fault: str = "") -> None:
        """Write a configuration atomically, because a partial file would be another configuration."""
        addresses = ["127.0.0.1:0", *([f"unix:{self.directory}/clients"] if self.has_unix else [])]
        fault = fault.format(taken=self.taken_port, directory=self.directory)
        if fault.startswith("LISTEN "):
            addresses.append(fault.removeprefix("LISTEN "))
        given = fault.partition(" =")[0]
        limits = [f"{name} = {value}" for name, value in self.limits.items() if name != given]
        lines = [
            "[limits]",
            *limits,
            "" if fault.startswith("LISTEN ") else fault,
            f"[timeouts]\ndrain = {DRAIN_S}\ndrain_quiet = {QUIET_S}\n[log]\nlevel = 'debug'",
            *(f"[[listen]]\naddress = '{address}'" for address in addresses),
            "[[listen]]\naddress = '127.0.0.2:0'\nproxy_protocol = true",
        ]
        fresh = self._file.with_suffix(".new")
        fresh.write_text("\n".join(lines))
        os.replace(fresh, self._file)
        if fault == "MISSING":
            self._file.unlink()

    def _reload(self, event: str, count: int, status: int, *, by_signal: bool) -> Event:
        """Reload and return the event with this name, which occurs for the `count`th time."""
        answer: Event = {}
        if by_signal:
            self.echod.send(signal.SIGHUP)
        else:
            told, answer = self._ask("POST", "/reload")
            assert told == status, answer
        logged = self.echod.wait_until(
            lambda: next(iter(self.echod.events_named(event)[count - 1 :]), None), f"no event {event!r}"
        )
        return answer or logged

    def _get(self, page: str) -> Event:
        status, answer = self._ask("GET", page)
        assert status == 200, answer
        return answer

    def _ask(self, method: str, page: str) -> tuple[int, Event]:
        with contextlib.closing(UnixConnection(str(self.directory / "admin"))) as connection:
            connection.request(method, page)
            response = connection.getresponse()
            body = response.read()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(body) if is_json else {"text": body.decode()}


def _header(way: str, host: str) -> bytes:
    """Return a PROXY header (haproxy.org/download/2.6/doc/proxy-protocol.txt)."""
    match way:
        case "PROXY, version 1":
            return f"PROXY TCP4 {host} 127.0.0.1 1000 2000\r\n".encode()
        case "PROXY, version 2":
            addresses = socket.inet_aton(host) + socket.inet_aton("127.0.0.1") + struct.pack(">HH", 1000, 2000)
            return b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack(">H", len(addresses)) + addresses
        case _:
            return b""


def explore(seconds: float, seed: str, phases: Sequence[hypothesis.Phase] = PHASES) -> int:
    """Try orders of steps for this long, and return their number. Raises the error; hypothesis prints the steps."""
    end, examples = time.monotonic() + seconds, 0
    rng = random.Random(seed)
    settings = hypothesis.settings(
        max_examples=EXAMPLES_AT_ONCE,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    while time.monotonic() < end:
        chosen = hypothesis.seed(rng.getrandbits(64))(Model)
        run_state_machine_as_test(chosen, settings=settings)
        examples += EXAMPLES_AT_ONCE
    return examples


def main() -> None:
    """Explore for the time that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.model", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", default="1", help="any text")
    options = parser.parse_args()
    examples = explore(60 * options.minutes, options.seed)
    sys.stdout.write(f"{examples} orders of {STEPS} steps, nothing found\n")


if __name__ == "__main__":
    main()
