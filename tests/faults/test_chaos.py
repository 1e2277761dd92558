"""Valid and invalid reloads, signals, clients of every kind and a stop, all at once, chosen by a seed."""

import asyncio
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.hostile import HOSTILE, POLITE, Behaviour, Crowd, Rules
from tests.faults.measurements import Figures, assert_adds_up, scene
from tests.support.clients import Pipeliner, pipeline
from tests.support.daemon import DEADLINE_S, Daemon

SECONDS = 20
"""Time before the stop, in seconds."""

CLIENTS = 30
PIPELINERS = 2
"""Clients that send from the beginning to the stop, on TCP and on a Unix socket that reloads add and remove."""

LINE_BYTES = (1000, 20_000, 65_536)
IDLE_S = (3, 5)
SHORT_S = (1, 2)
REJECTIONS = ("too many connections", "too many connections from your address")

FAULTS = {
    "": "cannot be read: No such file",
    "limits.conections = 1": "unknown key",
    "limits.connections_per_address =": "not valid TOML",
    "limits.connections_per_address = 'many'": "expected int",
    "timeouts.drain_quiet = -1": "expected number >= 0",
    "listen 127.0.0.1:{taken}": "address already in use",
    "listen 192.0.2.1:9": "not an address of this machine",
    "listen unix:{directory}/in-the-way": "the file exists and is not a socket",
    "log.file = '/no/such/directory/log'": "no such file or directory",
}
"""Invalid configurations ("": the file is missing), and their errors."""


@dataclass(slots=True)
class Operator:
    """Changes the configuration file and sends signals at random."""

    rng: random.Random
    directory: Path
    extra_port: int
    taken_port: int
    log_levels: Sequence[str]
    send: Callable[[signal.Signals], None] = lambda _: None
    acts: Counter[str] = field(default_factory=Counter)

    @property
    def file(self) -> Path:
        return self.directory / "echod.toml"

    @property
    def extras(self) -> list[str]:
        """The addresses that reloads add and remove."""
        return [f"127.0.0.1:{self.extra_port}", f"unix:{self.directory}/visitors", f"unix:{self.directory}/pipeliners"]

    def play(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(self.rng.choice([1, 1, 1, 10])):
                self.rng.choice([self.reload_well, self.reload_badly, self.dump])()
            time.sleep(self.rng.uniform(0, 0.4))  # the pace of the test

    def dump(self) -> None:
        self.acts["USR1"] += 1
        self.send(signal.SIGUSR1)

    def reload_well(self) -> None:
        self.acts["HUP"] += 1
        self.write()
        self.send(signal.SIGHUP)

    def reload_badly(self) -> None:
        self.acts["HUP, bad"] += 1
        fault = self.rng.choice([*FAULTS]).format(taken=self.taken_port, directory=self.directory)
        self.write(fault)
        if not fault:
            self.file.unlink()
        self.send(signal.SIGHUP)

    def write(self, fault: str = "", *, log_level: str = "") -> None:
        """Write a configuration atomically, because a partial file would be another configuration."""
        choose = self.rng.choice
        listen = [extra for extra in self.extras if choose([True, False])]
        lines = [
            f"limits.connections = {choose([60, 120, 600])}",
            f"limits.line_bytes = {choose(LINE_BYTES)}",
            f"timeouts.idle = {choose(IDLE_S)}",
            f"timeouts.line = {choose(SHORT_S)}",
            f"timeouts.write = {choose(SHORT_S)}",
            f"timeouts.drain = {choose(SHORT_S)}",
            "" if fault.startswith("timeouts.") else f"timeouts.drain_quiet = {choose([0, 0.1, 0.5])}",
            f"log.level = '{log_level or choose(self.log_levels)}'",
        ]
        if fault.startswith("listen "):
            listen.append(fault.removeprefix("listen "))
        else:
            lines.append(fault)
        if not fault.startswith("limits.connections_per_address"):
            lines.append(f"limits.connections_per_address = {choose([0, 50, 100])}")
        lines += [f"[[listen]]\naddress = '{address}'" for address in ("127.0.0.1:0", *listen)]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("\n".join(lines))
        os.replace(fresh, self.file)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("company", ["polite", "hostile"])
def test_random_operations_lose_no_reply(
    company: str, seed: str, tmp_path: Path, report: Callable[[Figures], None]
) -> None:
    """Under random reloads, signals and a stop, each client gets what it is owed, and every count is right."""
    is_polite = company == "polite"
    rules = Rules(LINE_BYTES, IDLE_S, SHORT_S, SHORT_S, REJECTIONS, may_refuse=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        operator = Operator(
            random.Random(f"{seed}: operator"),
            tmp_path,
            _port_below_the_ephemeral(),
            taken.getsockname()[1],
            ("debug",) if is_polite else ("debug", "info", "warning", "error"),
        )
        _begin(operator)
        with Daemon("-c", str(operator.file)) as echod, ThreadPoolExecutor(1) as stage:
            operator.send = echod.send
            crowd = _crowd(seed, rules, POLITE if is_polite else HOSTILE, f"127.0.0.1:{echod.port}", operator.extras)
            pipeliners: list[Pipeliner] = []
            are_talking = threading.Event()
            clients = stage.submit(asyncio.run, _clients(crowd, operator.extras[2], pipeliners, are_talking))
            assert are_talking.wait(DEADLINE_S)
            try:
                with scene(f"chaos among {company} clients, seed {seed}", echod) as it:
                    operator.play(SECONDS)
                rules.is_over = True
                _stop(operator, echod)
                status = echod.exit_status()
            finally:
                rules.is_over = True
                crowd.leave()
            clients.result(2 * DEADLINE_S)
        it.notes |= _notes(operator, crowd, pipeliners, echod)
        report(it.row())
        assert not crowd.complaints, "\n".join(crowd.complaints)
        for pipeliner in pipeliners:
            pipeliner.check()
        _check_counts(echod, operator, status, is_all_logged=is_polite)
        if is_polite:
            _check_lines(echod, crowd, pipeliners)
        assert not [address for address in operator.extras if Path(address.removeprefix("unix:")).exists()]
        it.assert_bystander_unaffected(slack_ms=250)


def _begin(operator: Operator) -> None:
    (operator.directory / "in-the-way").touch()
    addresses = ("127.0.0.1:0", *operator.extras)
    operator.file.write_text("".join(f"[[listen]]\naddress = '{address}'\n" for address in addresses))


def _port_below_the_ephemeral() -> int:
    """Return a free port below the ephemeral range, so that no client is assigned it."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def _crowd(seed: str, rules: Rules, behaviours: Sequence[Behaviour], address: str, extras: Sequence[str]) -> Crowd:
    return Crowd(seed, rules, [address, address, *extras[:2]], behaviours)


async def _clients(crowd: Crowd, unix: str, pipeliners: list[Pipeliner], are_talking: threading.Event) -> None:
    """Run the crowd, and pipelining clients until their streams end."""
    for address in (crowd.addresses[0], unix):
        pipeliners += await pipeline(address, PIPELINERS)
    are_talking.set()
    await crowd.play(CLIENTS)
    await asyncio.wait([pipeliner.ended for pipeliner in pipeliners], timeout=DEADLINE_S)


def _stop(operator: Operator, echod: Daemon) -> None:
    """Send TERM during a reload, with more signals behind it."""
    for _ in range(2):  # the first result may be that of an earlier file
        operator.write(log_level="debug")
        echod.reload("reload applied")
    operator.write(log_level="debug")
    for number in operator.rng.choices([signal.SIGHUP, signal.SIGUSR1], k=5):
        operator.send(number)
    operator.send(signal.SIGTERM)
    for number in operator.rng.choices([signal.SIGHUP, signal.SIGUSR1], k=5):
        operator.send(number)
    echod.wait_for("drain started")
    operator.send(signal.SIGUSR1)


def _check_counts(echod: Daemon, operator: Operator, status: int, *, is_all_logged: bool) -> None:
    applied = refused = 0
    for event in echod.events:
        match event["event"]:
            case "reload applied":
                applied += 1
            case "reload refused":
                refused += 1
                reasons = [*FAULTS.values(), "draining"]
                assert all(any(reason in error for reason in reasons) for error in event["errors"]), event
            case "stats":
                assert_adds_up(event)
                reloads = event["reloads"]
                assert reloads["refused"] == refused, "told in the turn in which it is counted, whatever the level"
                assert reloads["applied"] >= applied, event
                assert event["config_generation"] == reloads["applied"] + 1
                assert reloads["applied"] <= applied + 1 or not is_all_logged, "told once its listeners have closed"
                assert event["log_dropped"] == 0
    assert operator.acts.total() > 100
    assert applied > 10
    assert refused > 10
    drained = echod.wait_for("drain finished")
    assert status == (3 if drained["cut"] else 0)
    assert echod.wait_for("stopped")["exit_status"] == status
    began = echod.events.index(echod.wait_for("drain started"))
    ended = Counter(event["reason"] for event in echod.events[began:] if event["event"] == "connection closed")
    assert drained["cut"] == ended["cut"] + ended["write timeout"]
    assert drained["clean"] == ended.total() - drained["cut"]


def _check_lines(echod: Daemon, crowd: Crowd, pipeliners: Sequence[Pipeliner]) -> None:
    """Assert that the daemon counted as many lines for each accepted client as that got replies."""
    heard = Counter(crowd.heard)
    for each in pipeliners:
        name = "unix" if isinstance(each.sockname, str) else "{}:{}".format(*each.sockname)
        heard[name, each.received.count(b"\n")] += 1
    closed = echod.events_named("connection closed")
    counted = Counter((event["peer"], event["lines"]) for event in closed)
    cut = sum(event["reason"] in ("cut", "write timeout") for event in closed)
    bystander = 1
    assert (counted - heard).total() <= bystander + cut, (counted - heard, heard - counted)
    assert (heard - counted).total() <= cut, (counted - heard, heard - counted)


def _notes(operator: Operator, crowd: Crowd, pipeliners: Sequence[Pipeliner], echod: Daemon) -> Figures:
    drained = echod.wait_for("drain finished")
    return {
        "signals": dict(operator.acts),
        "reloads": (echod.events_named("stats") or [{}])[-1].get("reloads"),
        "visits": crowd.visits.total(),
        "refused": crowd.refused,
        "pipelined": sum(pipeliner.received.count(b"\n") for pipeliner in pipeliners),
        "drained": f"{drained['clean']} clean, {drained['cut']} cut",
    }
