"""Random mixes of attackers, chosen by a seed, against the properties that echod must keep under attack.

`python -m tests.faults.mixes --seeds 1-10 --seconds 60` plays so long with each seed, in rounds of ten seconds: a
daemon, some kinds of attackers at once, and a stop amid them. `--only bare_lf --attackers 200` has one kind, and
`--table` the kinds that hurt most, in three sizes. Prints a line for each round and what it found, and exits with 1
if there is anything.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from echod.config.schema import Limits
from tests.bench.harness import cores
from tests.faults.attackers import IDLE_S, KINDS, LINE_S, VISITS, WRITE_S, Attack, Attackers, Target
from tests.faults.invariants import HELD_BYTES, POLL_S, WATCHDOG_S, Instant, InvariantMonitor, hurry
from tests.faults.measurements import Usage
from tests.support.daemon import UNMEASURED, Daemon, read_to_end
from tests.support.report import row

ROUND_S = 10.0
STOP_MARGIN_S = 1.5
"""Time that a stop may take beyond the lame duck and the drain, in seconds."""

PER_ADDRESS = 8
SIGNALS = ("usr1_storm", "hup_storm")
STARVED = 0.3
"""Above this share of time waiting for a CPU, lateness is attributed to the machine."""

LAST_CLIENTS = 5
LAST_CLIENT = "127.0.0.4"

TABLE = {
    "nobody": (0,),
    "bare_lf": (20, 200, 1000),
    "shut_out": (20, 200, 1000),
    "admin_body": (8, 20, 200, 1000),
    "never_reader": (20, 200, 1000),
    "usr1_storm": (20, 200, 1000),
}
"""Kinds and numbers of attackers. The admin endpoint serves eight at once, and closes the oldest for more."""


@dataclass(slots=True)
class Round:
    """A round: its attackers and its results."""

    name: str
    attacks: list[Attack]
    again: str = ""
    """The command that repeats the round."""
    open_files: int = 20_000
    is_pinned: bool = True
    """Whether the daemon has only one core; otherwise its threads also run on the core of the attackers."""
    drain_s: float = 3.0
    lame_duck_s: float = 0.0
    seconds: float = ROUND_S
    findings: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    """Findings about time, which count only if the daemon got enough CPU."""
    starved_share: float = 0.0
    figures: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        cores = "a core" if self.is_pinned else "any core"
        setting = f"{cores}, drain {self.drain_s:g} s, lame duck {self.lame_duck_s:g} s, {self.open_files} files"
        return f"{self.name}: {', '.join(map(str, self.attacks)) or 'nobody'}; {setting}"

    @property
    def outcome(self) -> str:
        """The results as lines: the figures, each finding, and the command that repeats the round."""
        lines = [row(self.figures, " "), *(f"FOUND {finding:.500}" for finding in self.counted)]
        if self.late and self.starved_share > STARVED:
            lines.append(f"not counted, for the machine was busy: {'; '.join(self.late)}")
        return "".join(f"    {line}\n" for line in [*lines, *([self.again] if self.counted and self.again else [])])

    @property
    def counted(self) -> list[str]:
        """Every finding that echod is responsible for."""
        return [*self.findings, *(self.late if self.starved_share <= STARVED else [])]


def drawn(seed: str, number: int, seconds: float = ROUND_S) -> Round:
    """Return the round with this number and seed."""
    rng = random.Random(f"{seed}: round {number}")
    attacks = []
    for kind in rng.sample(KINDS, rng.randint(2, 5)):
        count = 1 if kind in SIGNALS else rng.choice([1, 5, 20, 60])
        attacks.append(Attack(kind, count, rng.choice([0, 10, 100, 1000]), f"{seed}: {kind}"))
    return Round(
        name=f"seed {seed}, round {number}",
        attacks=attacks,
        again=f"again: python -m tests.faults.mixes --seeds {seed} --round {number} --round-seconds {seconds:g}",
        open_files=rng.choice([1024, 20_000]),
        is_pinned=rng.choice([True, True, False]),
        drain_s=rng.choice([1.0, 3.0]),
        lame_duck_s=rng.choice([0.0, 0.0, 1.0]),
        seconds=seconds,
    )


def alone(kind: str, number: int, rate: float | None = None, seconds: float = ROUND_S) -> Round:
    """Return a round with attackers of one kind; kinds with a rate take five steps a second each.

    A thousand senders of signals send as many as one can.
    """
    is_known_by_rate = kind == "shut_out" or (kind in SIGNALS and number < 1000)
    own_rate = (5.0 * number if is_known_by_rate else 0.0) if rate is None else rate
    attack = Attack(kind, 1 if kind in SIGNALS else number, own_rate, kind)
    open_files = 1024 if kind == "shut_out" else 20_000  # few, so that clients being rejected can fill them
    return Round(
        name=f"{kind} alone",
        attacks=[attack] if number else [],
        open_files=open_files,
        is_pinned=kind not in SIGNALS,
        seconds=seconds,
    )


def play(it: Round) -> Round:
    """Play the round, and fill in its findings and figures."""
    core = cores()
    with tempfile.TemporaryDirectory(prefix="echod-") as name, contextlib.ExitStack() as playing:
        directory = Path(name)
        notifications = playing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notifications.bind(str(directory / "notify"))
        notifications.settimeout(POLL_S)
        echod = playing.enter_context(_started(directory, it))
        admin_port = int(echod.wait_for("admin endpoint")["listen"][0].rpartition(":")[2])
        port, proxy_port = echod.ports
        target = Target(echod.pid, port, proxy_port, admin_port)
        monitor = InvariantMonitor(echod, notifications, str(directory / "admin"), target.port, admin_port)
        monitor.begin()
        honest = playing.enter_context(Attackers(Attack("polite", 3, 0, it.name), target, core.load))
        attackers = [playing.enter_context(Attackers(attack, target, core.load)) for attack in it.attacks]
        for each in [honest, *attackers]:
            each.await_begin()
        monitor.forget()
        usage, began_at = Usage.of(echod.pid), time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            echod.process.wait(it.seconds)
        monitor.end()
        spent, lasted_s = Usage.of(echod.pid), time.monotonic() - began_at
        it.starved_share = (spent.starved_s - usage.starved_s) / lasted_s
        everyone = [honest, *attackers]
        for each in everyone:
            each.announce_stop()
        stop_s = _stop(echod, target.port, it)
        for each in everyone:
            for complaint in each.end():
                what = it.late if "TimeoutError" in complaint else it.findings
                what.append(f"{each.attack.kind}: {complaint}")
        monitor.check_log()
        it.findings += monitor.findings
        it.late += monitor.late
    it.figures = {
        "talks": len(monitor.talk.seconds),
        "p50 ms": round(monitor.talk.share_s(0.5) * 1000, 1),
        "p99": round(monitor.talk.share_s(0.99) * 1000, 1),
        "max": round(monitor.talk.worst_s * 1000, 1),
        "visit max": round(monitor.visit.worst_s * 1000, 1),
        "health max": round(monitor.health.worst_s * 1000, 1),
        "USR1 max": round(monitor.dump.worst_s * 1000, 1),
        "HUP max": round(monitor.reload.worst_s * 1000, 1),
        "beat gap s": round(monitor.fed.worst_s, 2),
        "memory MB": f"+{monitor.growth_bytes / 1e6:.0f}",
        "CPU %": round(100 * (spent.cpu_s - usage.cpu_s) / lasted_s),
        "starved %": round(100 * it.starved_share),
        "stop s": round(stop_s, 2),
        "exit": echod.process.returncode,
        "connected": sum(each.connected for each in attackers),
    }
    return it


def _stop(echod: Daemon, port: int, it: Round) -> float:
    """Stop the daemon, and return the time it took. Lines sent before the stop must be answered."""
    with contextlib.ExitStack() as last:
        clients = [last.enter_context(socket.socket()) for _ in range(LAST_CLIENTS)]
        for client in clients:
            client.settimeout(60)
            client.bind((LAST_CLIENT, 0))
            try:
                client.connect(("127.0.0.1", port))
                client.sendall(b"last words\n")
            except OSError as error:
                it.findings.append(f"before the stop: {error!r}")
                clients.remove(client)
        began, limit_s = Instant.now(echod.pid), it.lame_duck_s + it.drain_s + STOP_MARGIN_S
        echod.send(signal.SIGTERM)
        took_s = passed_s = 0.0
        while echod.process.poll() is None:
            took_s, passed_s = began.waited_s(), began.passed_s
            if took_s > 3 * limit_s + 30:
                it.late.append("the stop doesn't come to its end")
                echod.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                echod.process.wait(0.01)
        if took_s > limit_s:
            it.late.append(f"the stop took {took_s:.2f} s, {limit_s:g} s are allowed")
        if echod.process.returncode not in (0, 3):
            it.findings.append(f"exit status {echod.process.returncode}")
        answers = [_rest(client) for client in clients]
        if wrong := [answer for answer in answers if answer != "b'LAST WORDS\\n'"]:
            it.late.append(f"{len(wrong)} of {LAST_CLIENTS} last clients got {wrong[0]}")
    return passed_s


def _rest(client: socket.socket) -> str:
    try:
        return repr(read_to_end(client))
    except OSError as error:
        return repr(error)


@contextlib.contextmanager
def _started(directory: Path, it: Round) -> Iterator[Daemon]:
    """Start the daemon on its core, without the log events that an attack would flood."""
    lines = [
        "[[listen]]\naddress = '127.0.0.1:0'",
        "[[listen]]\naddress = '127.0.0.1:0'\nproxy_protocol = true",
        f"[limits]\nconnections_per_address = {PER_ADDRESS}",
        f"held_bytes = {HELD_BYTES}" if "held_bytes" in Limits.__struct_fields__ else "",
        f"[timeouts]\nidle = {IDLE_S}\nline = {LINE_S}\nwrite = {WRITE_S}",
        f"drain = {it.drain_s}\nlame_duck = {it.lame_duck_s}",
        "[admin]\nlisten = '127.0.0.1:0'",
    ]
    (directory / "echod.toml").write_text("\n".join(lines))
    environment = {
        "NOTIFY_SOCKET": str(directory / "notify"),
        "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
        "RUNTIME_DIRECTORY": str(directory),
    }
    limited = ("sh", "-c", f'ulimit -n {it.open_files}; exec "$0" "$@"', sys.executable, "-m", "echod")
    core, allowed = cores(), os.sched_getaffinity(0)
    sieve = subprocess.Popen(
        ["grep", "--line-buffered", "--invert-match", '"event": *"connection closed"'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.sched_setaffinity(sieve.pid, {core.load})
    os.sched_setaffinity(0, {core.server} if it.is_pinned else allowed)
    try:
        echod = Daemon(
            "-c",
            str(directory / "echod.toml"),
            command=limited,
            environment=environment | UNMEASURED,
            through=sieve,
        )
    finally:
        os.sched_setaffinity(0, allowed)
    reader = echod._reader.native_id
    assert reader
    os.sched_setaffinity(reader, allowed)
    hurry(reader)
    hurry(sieve.pid)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, echod.pid, -10)  # with priority over other processes
    with echod, sieve:
        echod.wait_for("ready")
        yield echod


def _seeds(text: str) -> list[str]:
    first, _, last = text.partition("-")
    return [str(number) for number in range(int(first), int(last) + 1)] if last else text.split(",")


def _rounds(options: argparse.Namespace) -> Iterator[Round]:
    if options.table:
        for kind, numbers in TABLE.items():
            for number in numbers:
                yield alone(kind, number, options.rate, options.round_seconds)
    elif options.only:
        yield alone(options.only, options.attackers, options.rate, options.round_seconds)
    else:
        for seed in _seeds(options.seeds):
            end, number = time.monotonic() + options.seconds, 0
            while time.monotonic() < end if options.round is None else not number:
                number += 1
                yield drawn(seed, options.round or number, options.round_seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Play the rounds that the arguments ask for, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mixes", description=__doc__)
    parser.add_argument("--seeds", default="1", help="such as 1-10 or 3,7")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to play with each seed")
    parser.add_argument("--round", type=int, help="this round alone of each seed")
    parser.add_argument("--round-seconds", type=float, default=ROUND_S)
    parser.add_argument("--only", choices=[*VISITS, "hostile"], help="this kind alone")
    parser.add_argument("--attackers", type=int, default=200)
    parser.add_argument("--rate", type=float, help="steps a second of all of a kind, 0: as many as they can")
    parser.add_argument("--table", action="store_true", help="the kinds that have hurt most, with 20, 200, 1 000")
    options = parser.parse_args(arguments)
    found = 0
    for it in _rounds(options):
        play(it)
        sys.stdout.write(f"{it}\n{it.outcome}")
        sys.stdout.flush()
        found += len(it.counted)
    sys.stdout.write(f"{found or 'no'} findings\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
