"""A live upgrade: a new program in the same process keeps every connection, and no byte is lost or duplicated."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from echod.config.schema import RESERVED_FILES
from echod.net.sockets import LINGER_S
from echod.process.limits import allowed_open_files
from echod.server.admission import MIN_LINGERING
from tests.integration.test_inheriting import activated, two_sockets
from tests.support.daemon import (
    CONSOLE_SCRIPT,
    DEADLINE_S,
    Daemon,
    Event,
    ask,
    clean_environment,
    connect,
    free_port,
    read_line,
    read_to_end,
    send_until_stuck,
    serving,
    settings,
)
from tests.support.gate import CODE, Gate
from tests.support.installed import Installed
from tests.support.streams import stream_through_upgrades, upgrade

PASSING = 800
"""So many clients that their log lines do not fit into a pipe."""

OTHERS = 20
"""At most this many log lines belong to no client."""


def test_connections_stay_established(full: bool) -> None:
    """50 streaming clients and some upgrades: streams are byte-exact, the pid stays, nobody is refused or reset."""
    with serving(*settings(timeouts_write=60, timeouts_line=0)) as echod:
        rounds = 4 if full else 2
        done = asyncio.run(stream_through_upgrades(echod, rounds))
        assert {each["pid"] for each in done} == {echod.pid}
        stats = echod.stats()
        assert stats["upgrades"] == rounds
        counts = stats["connections"]
        assert counts["accepted"] == counts["open"] + sum(counts["closed"].values())


# -- what is installed -------------------------------------------------------------------------------------------------


def test_from_one_version_to_another(installed: Installed) -> None:
    """`stats` shows the new version, and connections from before the upgrade are still answered."""
    installed.add("two", {"__init__": '__version__ = "2.0.0"'})
    with installed.serving() as echod, connect(echod.port) as client:
        client.sendall(b"begun by one")
        first = echod.stats()["version"]
        installed.switch("two")
        done = upgrade(echod)
        assert (done["previous_version"], done["version"], echod.stats()["version"]) == (first, "2.0.0", "2.0.0")
        assert ask(client, b", ended by two\n") == b"BEGUN BY ONE, ENDED BY TWO\n"
        client.close()
        installed.switch("one")
        assert upgrade(echod)["version"] == first


BROKEN = {
    "syntax error": ({"server.server": "def"}, "SyntaxError: invalid syntax"),
    "import error": (
        {"server.server": "import no_such_module"},
        "ModuleNotFoundError: No module named 'no_such_module'",
    ),
    "hang": ({"service": "import time; time.sleep(1000)"}, "no answer from .* within 1 s"),
    "killed": ({"service": "import os; os.kill(os.getpid(), 9)"}, "killed by SIGKILL"),
    "unknown state": (
        {"upgrade.state_file": "READABLE = (7, 8)"},
        r"a state of version 1, which echod doesn't know \(7, 8\)",
    ),
    "no preflight": ({"__main__": "sys.exit(2)"}, "exit status 2"),
    "endless talk": ({"service": "while True: print('no' * 1000)"}, "no answer from"),
}

SIMILAR = ("import error", "killed", "no preflight")
"""Cases that take the same way through the code as another one."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in SIMILAR else ()) for name in BROKEN]
)
def test_a_broken_next_version_changes_nothing(installed: Installed, name: str) -> None:
    """The old program serves on with nothing lost, and the log says why."""
    changes, complaint = BROKEN[name]
    if complaint.startswith("no answer"):
        installed.add("hasty", {"upgrade.preflight": "PREFLIGHT_S = 1.0"})
        installed.switch("hasty")
    installed.add("two", changes)
    _is_refused(installed, complaint, lambda: installed.switch("two"))


def test_a_broken_next_version_is_detected_although_sigchld_is_ignored(installed: Installed) -> None:
    """A parent that ignores SIGCHLD, which execve passes on, does not hide how the preflight ended."""
    installed.add("two", {"server.server": "def"})
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    with installed.serving(by=(sys.executable, "-c", ignoring)) as echod, connect(echod.port) as client:
        installed.switch("two")
        assert "SyntaxError" in upgrade(echod, "upgrade refused")["errors"][0]
        assert ask(client, b"still here\n") == b"STILL HERE\n"
        client.close()


def test_a_missing_interpreter_changes_nothing(installed: Installed) -> None:
    """The interpreter that the script's first line names is gone."""
    _is_refused(installed, "no such file or directory", (installed.directory / "one/bin/python").unlink)


def test_an_execve_that_fails_changes_nothing(installed: Installed) -> None:
    """The preflight succeeds, and then there is nothing to execute: the old program serves on."""
    script = installed.directory / "current/bin/echod"
    removing = (
        f"before = preflight\ndef preflight(*all):\n    before(*all)\n    __import__('os').unlink({str(script)!r})"
    )
    installed.add("two", {"service": removing})
    _is_refused(installed, "no such file or directory", lambda: installed.switch("two"))


def test_an_execve_that_fails_takes_everything_back(installed: Installed, tmp_path: Path) -> None:
    """A signal that arrived meanwhile is handled, the admin endpoint answers, and no child inherits a descriptor."""
    admin, script = tmp_path / "admin", installed.directory / "current/bin/echod"
    installed.add("slow", SLOW)
    installed.add("two", {"service": f"preflight = lambda *all: os.unlink({str(script)!r})"})
    installed.switch("slow")
    arguments = settings(admin_listen=f"unix:{admin}")
    with installed.serving(*arguments) as echod, connect(echod.port) as client:
        assert ask(client, b"hello\n") == b"HELLO\n"
        installed.switch("two")
        echod.send(signal.SIGUSR2)
        echod.wait_for("standing still")
        echod.send(signal.SIGHUP)
        echod.wait_for("upgrade refused")
        echod.wait_for("reload applied")
        asking = [CONSOLE_SCRIPT, "stats", "--admin", f"unix:{admin}"]
        subprocess.run(asking, check=True, capture_output=True, timeout=DEADLINE_S)
        assert _inheritable(echod) == []
        client.close()


def _is_refused(installed: Installed, complaint: str, break_it: Callable[[], object]) -> None:
    with installed.serving() as echod, connect(echod.port) as begun, connect(echod.port) as stuck:
        begun.sendall(b"begun ")
        send_until_stuck(stuck)
        before = _unchanging_stats(echod)
        break_it()
        refused = upgrade(echod, "upgrade refused")
        assert any(re.search(complaint, error) for error in refused["errors"]), refused
        after = echod.stats()
        assert [after[key] for key in ("upgrades", "open_files", "version", "held_bytes")] == [
            before[key] for key in ("upgrades", "open_files", "version", "held_bytes")
        ]
        assert ask(begun, b"and ended\n") == b"BEGUN AND ENDED\n"
        with connect(echod.port) as later:
            assert ask(later, b"new\n") == b"NEW\n"
        stuck.shutdown(socket.SHUT_WR)
        assert set(read_to_end(stuck).split(b"\n")) <= {b"NO REPLY IS READ", b"NO REPLY IS", b"NO REPLY", b"NO", b""}
        echod.reload("reload applied")
        begun.close()


def _unchanging_stats(echod: Daemon) -> Event:
    """Return the statistics once echod has read and written all that it can: between two dumps the loop has a turn."""
    previous, stats = echod.stats(), echod.stats()
    while any(stats[key] != previous[key] for key in ("bytes_in", "bytes_out", "held_bytes")):
        previous, stats = stats, echod.stats()
    return stats


# -- the configuration is read again -----------------------------------------------------------------------------------


def test_the_configuration_is_read_again(tmp_path: Path) -> None:
    """An upgrade changes what a reload changes, and what it cannot: a port becomes shared (`reuse_port`)."""
    path = tmp_path / "echod.toml"
    port = free_port()
    path.write_text(f'listen = [{{address = "127.0.0.1:{port}"}}, {{address = "127.0.0.1:0"}}]\n')
    with serving("-c", str(path)) as echod, connect(echod.ports[1]) as client:
        path.write_text(
            f'listen = [{{address = "127.0.0.1:{port}", reuse_port = true}}, {{address = "unix:{tmp_path}/sock"}}]\n'
            "limits.line_bytes = 10\n"
        )
        shared = tmp_path / "shared.toml"
        shared.write_text(f'listen = [{{address = "127.0.0.1:{port}", reuse_port = true}}]')
        assert echod.reload("reload applied")["restart_needed"] == ["listen[0].reuse_port"]
        done = upgrade(echod)
        assert done["listen"] == [f"127.0.0.1:{port}", f"unix:{tmp_path}/sock"]
        with serving("-c", str(shared)) as second:
            assert second.port == port
        assert ask(client, b"the one that went away\n") == b"ERROR line longer than 10 bytes\n"
    assert not (tmp_path / "sock").exists()


def test_a_configuration_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    """Every error is reported, of the file and of what only the daemon can see, and nothing has changed."""
    path = tmp_path / "echod.toml"
    path.write_text("")
    with serving("-l", "127.0.0.1:0", "-c", str(path)) as echod, connect(echod.port) as client:
        path.write_text("limits.connections = 0\nlog.level = 'loud'\n")
        errors = upgrade(echod, "upgrade refused")["errors"]
        assert any("limits.connections" in error for error in errors), errors
        assert any("log.level" in error for error in errors), errors
        with socket.create_server(("127.0.0.1", 0)) as taken:
            path.write_text(f"admin.listen = '127.0.0.1:{taken.getsockname()[1]}'\n")
            errors = upgrade(echod, "upgrade refused")["errors"]
        assert any("address already in use" in error for error in errors), errors
        assert ask(client, b"still here\n") == b"STILL HERE\n"
        client.close()


OVERLAPPING = '{{address = "127.0.0.1:{0}"}}, {{address = "0.0.0.0:{0}"}}'
"""Both addresses can be bound, but only one of them can be listened on."""


def _overlap(path: Path, port: int) -> None:
    overlapping = OVERLAPPING.format(free_port())
    path.write_text(f'listen = [{{address = "127.0.0.1:{port}"}}, {overlapping}]\n')


def test_addresses_that_overlap_are_refused_by_the_preflight(tmp_path: Path) -> None:
    """An error that only listen(2) reports is found before anything has changed."""
    path = tmp_path / "echod.toml"
    port = free_port()
    path.write_text(f'listen = [{{address = "127.0.0.1:{port}"}}]\n')
    with serving("-c", str(path)) as echod, connect(port) as client:
        _overlap(path, port)
        (error,) = upgrade(echod, "upgrade refused")["errors"]
        assert re.fullmatch(r"listen: 0\.0\.0\.0:\d+: address already in use", error)
        assert ask(client, b"still here\n") == b"STILL HERE\n"
        client.close()


def test_an_error_after_the_preflight_keeps_the_previous_configuration(installed: Installed, tmp_path: Path) -> None:
    """If the preflight overlooks an error, the old configuration stays in force, and the log names the error."""
    installed.add("two", {"service": "preflight = lambda *all: None"})
    path = tmp_path / "echod.toml"
    port = free_port()
    path.write_text(f'listen = [{{address = "127.0.0.1:{port}"}}]\n')
    arguments = ("-c", str(path))
    with installed.serving(*arguments) as echod, connect(port) as client:
        client.sendall(b"begun ")
        installed.switch("two")
        for break_it, complaint in (
            (partial(_overlap, path, port), "address already in use"),
            (partial(path.write_text, "limits.connections = 0"), "limits.connections"),
        ):
            break_it()
            known = len(echod.events)
            assert upgrade(echod)["listen"] == [f"127.0.0.1:{port}"]
            warning = echod.wait_for("configuration", after=known)["warning"]
            assert warning.startswith("the previous configuration stays in force: ")
            assert complaint in warning
        assert ask(client, b"and ended\n") == b"BEGUN AND ENDED\n"
        client.close()


# -- everything crosses ------------------------------------------------------------------------------------------------


def test_timeouts_and_durations_continue(installed: Installed) -> None:
    """A partial line from before upgrades, even upgrades faster than a sweep, times out as usual; uptime continues."""
    installed.prove_at_once()
    with installed.serving(*settings(timeouts_line=4)) as echod, connect(echod.port) as client:
        began_at = time.monotonic()
        client.sendall(b"begun")
        while (upgraded_at := time.monotonic()) < began_at + 2:
            upgrade(echod)
        assert read_line(client) == b"ERROR line not finished within 4 s\n"
        assert began_at + 4 <= time.monotonic() < upgraded_at + 3.5, "not from the upgrade on"
        closed = echod.wait_for("connection closed", reason="line timeout")
        assert closed["duration_s"] >= 4 + LINGER_S, "it is read for a second more, to an end that doesn't come"
        assert echod.stats()["uptime_s"] >= closed["duration_s"]


def test_counters_continue() -> None:
    """Clients that are connected, have left or were rejected are counted exactly once."""
    with serving(*settings(limits_connections=2)) as echod, connect(echod.port) as client:
        with connect(echod.port) as second, connect(echod.port) as third:
            assert (ask(second, b"one\n"), read_line(third)) == (b"ONE\n", b"ERROR too many connections\n")
        assert ask(client, b"two\n") == b"TWO\n"
        echod.wait_for("connection closed")
        before = echod.stats()
        for _ in range(2):
            upgrade(echod)
        after = echod.stats()
        same = ("connections", "lines", "bytes_in", "bytes_out", "reloads", "log_dropped")
        assert {name: after[name] for name in same} == {name: before[name] for name in same}
        assert after["upgrades"] == 2
        assert after["config_generation"] == before["config_generation"] + 2
        assert ask(client, b"three\n") == b"THREE\n"
        client.close()
        closed = echod.wait_for("connection closed", lines=2)
        assert (closed["bytes_in"], closed["bytes_out"]) == (10, 10)


def test_the_limit_of_an_address_continues() -> None:
    """Clients from before an upgrade count against the limit of their address until they leave."""
    with serving(*settings(limits_connections_per_address=1)) as echod, connect(echod.port) as client:
        assert ask(client, b"one\n") == b"ONE\n"
        upgrade(echod)
        with connect(echod.port) as second:
            assert read_to_end(second) == b"ERROR too many connections from your address\n"
        client.close()
        echod.wait_for("connection closed", lines=1)
        with connect(echod.port) as third:
            assert ask(third, b"three\n") == b"THREE\n"


def test_a_pending_self_probe_is_not_counted(installed: Installed, tmp_path: Path) -> None:
    """A self-probe that the old program did not accept is accepted by the next one, and not counted as a client."""
    installed.add("deaf", {"net.listener": "Listener._accept_batch = lambda self: False"})
    installed.switch("deaf")
    watchdog = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "60000000"}
    with installed.serving(environment=watchdog) as echod, connect(echod.port) as client:
        installed.switch("one")
        upgrade(echod)
        assert ask(client, b"hello\n") == b"HELLO\n"
        assert echod.stats()["connections"]["accepted"] == 1
        client.close()


def test_lost_log_lines_are_counted(tmp_path: Path) -> None:
    """Log lines that the old program could not write are lost as whole lines, and the next program counts them."""
    admin, (reading, writing) = f"unix:{tmp_path}/admin", os.pipe()
    command = [sys.executable, "-m", "echod", "serve", "-l", "127.0.0.1:0", *settings(admin_listen=admin)]

    def stats() -> Event:
        asking = [CONSOLE_SCRIPT, "stats", "--json", "--admin", admin]
        answer: Event = json.loads(subprocess.run(asking, check=True, capture_output=True, timeout=DEADLINE_S).stdout)
        return answer

    def upgraded(times: int) -> list[int]:
        return [1] if stats()["upgrades"] == times else []

    with open(reading, "rb") as log, subprocess.Popen(command, stderr=writing, env=clean_environment()) as process:
        os.close(writing)
        try:
            events = [json.loads(log.readline()) for _ in ("admin endpoint", "ready")]
            port = int(events[-1]["listen"][0].rpartition(":")[2])
            for _ in range(PASSING):
                with connect(port) as client:
                    assert ask(client, b"hello\n") == b"HELLO\n"
            for number in (1, 2):
                process.send_signal(signal.SIGUSR2)
                _until_there(partial(upgraded, number))
            dropped = stats()["log_dropped"]
        finally:
            process.terminate()
        logged = sum(json.loads(line)["event"] == "connection closed" for line in log)
    assert PASSING - logged <= dropped <= PASSING - logged + OTHERS


def test_connections_that_are_ending_still_end() -> None:
    """A client that got an error line, one whose stream has ended and one that is rejected see the end of stream."""
    with serving(*settings(limits_connections=3)) as echod:
        port = echod.port
        with connect(port) as faulty, connect(port) as ended, connect(port), connect(port) as refused:
            faulty.sendall(b"\xff\n")
            assert read_line(faulty) == b"ERROR invalid utf-8\n"
            send_until_stuck(ended)
            ended.shutdown(socket.SHUT_WR)
            upgrade(echod)
            assert read_to_end(faulty) == b""
            assert read_to_end(refused) == b"ERROR too many connections\n"
            replies = read_to_end(ended)
            assert replies.endswith(b"\n") or replies
            assert set(replies.split(b"\n")[:-1]) <= {b"NO REPLY IS READ"}
        echod.wait_for("connection closed", reason="invalid utf-8")
        closed = echod.wait_for("connection closed", reason="client", bytes_out=len(replies))
        assert closed["lines"] == replies.count(b"\n")
        assert echod.stats()["connections"]["rejected"]["limit"] == 1


def test_unix_sockets_and_the_admin_endpoint_stay(tmp_path: Path) -> None:
    """Clients of a Unix socket, its file, and the admin endpoint survive an upgrade."""
    sock, admin = tmp_path / "sock", tmp_path / "admin"
    with serving("-l", f"unix:{sock}", *settings(admin_listen=f"unix:{admin}")) as echod:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(str(sock))
            client.sendall(b"begun ")
            upgrade(echod)
            assert ask(client, b"ended\n") == b"BEGUN ENDED\n"
        for verb in ("stats", "reload"):
            subprocess.run(
                [CONSOLE_SCRIPT, verb, "--admin", f"unix:{admin}"], check=True, capture_output=True, timeout=DEADLINE_S
            )
        assert echod.stop() == 0
        assert not sock.exists()
        assert not admin.exists()


# -- signals around an upgrade -----------------------------------------------------------------------------------------

REACTIONS = {
    signal.SIGHUP: ("reload applied", "reload refused", "reload ignored"),
    signal.SIGUSR1: ("stats",),
    signal.SIGUSR2: ("upgrade done", "upgrade refused"),
    signal.SIGTERM: ("drain started",),
}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, id="-".join(n.name for n in order), marks=() if number % 6 == 0 else pytest.mark.full)
        for number, order in enumerate(itertools.permutations(REACTIONS))
    ],
)
def test_no_signal_is_lost_around_an_upgrade(order: tuple[signal.Signals, ...], pytestconfig: pytest.Config) -> None:
    """HUP, USR1, USR2 and TERM in every order, at any moment: each is handled, by the old program or the new one."""
    moments = random.Random(f"{pytestconfig.getoption('--seed')} {order}")
    with serving(*settings(timeouts_drain_quiet=0.1)) as echod, connect(echod.port) as client:
        client.sendall(b"begun")
        for number in order:
            echod.send(number)
            time.sleep(moments.choice([0.0, 0.01, 0.1, 0.2, 0.3, 0.4]))
        for number in order:
            echod.wait_until(partial(_reaction, echod, number), f"{number.name} was lost")
        assert ask(client, b", ended\n") == b"BEGUN, ENDED\n"
        assert read_to_end(client) == b""
        assert echod.exit_status() == 0
        for number in order:
            assert sum(event["event"] in REACTIONS[number] for event in echod.events) == 1, number


def _reaction(echod: Daemon, number: signal.Signals) -> Event | None:
    return next((event for event in echod.events if event["event"] in REACTIONS[number]), None)


def test_requests_during_an_upgrade_become_one_more(installed: Installed, tmp_path: Path) -> None:
    """Ten USR2 in a row cause two or three upgrades, and the last one begins after the last request."""
    allowed = tmp_path / "allowed"
    installed.add("two", {"service": f"import os, time\nwhile not os.path.exists({str(allowed)!r}): time.sleep(0.01)"})
    with installed.serving() as echod, connect(echod.port) as client:
        installed.switch("two")
        echod.send(signal.SIGUSR2)
        echod.wait_for("upgrade started")
        for _ in range(9):
            time.sleep(0.01)
            echod.send(signal.SIGUSR2)
        allowed.touch()
        echod.wait_until(lambda: echod.stats() if len(echod.events_named("upgrade done")) >= 2 else None, "one upgrade")
        assert ask(client, b"still here\n") == b"STILL HERE\n"
        client.close()
        assert echod.stop() == 0
        assert 2 <= len(echod.events_named("upgrade done")) <= 3


def test_a_stop_ends_a_preflight(installed: Installed) -> None:
    """TERM does not wait for a preflight that hangs, and the child is killed."""
    installed.add("two", {"service": "import time; time.sleep(1000)"})
    with installed.serving() as echod:
        installed.switch("two")
        echod.send(signal.SIGUSR2)
        echod.wait_for("upgrade started")
        (child,) = _until_there(lambda: _children(echod.pid))
        began = time.monotonic()
        assert echod.stop() == 0
        assert time.monotonic() - began < 5
        assert echod.wait_for("upgrade refused")["errors"] == ["draining"]
        assert not os.path.exists(f"/proc/{child}")


SLOW = {
    "upgrade.coordinator": """
before = Upgrader._replace
def standing_still(self):
    log.info("standing still")
    time.sleep(0.5)
    before(self)
Upgrader._replace = standing_still""",
    "telemetry.log_writer": """
before = LogWriter.flush
def flush(self, timeout_s):
    time.sleep(1)
    return before(self, timeout_s)
LogWriter.flush = flush""",
}
"""A program that pauses just before it is replaced, and logs that: for half a second it takes signals, then for one
second the kernel keeps them."""


def test_signals_are_handled_in_order(installed: Installed) -> None:
    """Signals are handled in order, whether or not the old program had taken them from the kernel."""
    installed.add("slow", SLOW)
    installed.switch("slow")
    with installed.serving() as echod:
        installed.switch("one")
        echod.send(signal.SIGUSR2)
        echod.wait_for("standing still")
        echod.send(signal.SIGHUP)
        time.sleep(1)
        echod.send(signal.SIGTERM)
        assert echod.exit_status() == 0
        assert len(echod.events_named("upgrade done")) == 1
        events = [event["event"] for event in echod.events]
        assert events.index("reload started") < events.index("drain started")


@pytest.mark.parametrize("wait_s", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_stop_is_bounded_although_the_next_program_hangs(installed: Installed, wait_s: float) -> None:
    """The next program passes the preflight and then hangs: a stop ends it in time, with exit status 3."""
    installed.add("slow", SLOW)
    installed.switch("slow")
    hang = "import time; preflight = lambda *all: None; _first = lambda *all: time.sleep(1000)"
    installed.add("two", {"service": hang, "process.force_exit": "STARTING_S = 0.1"})
    flags = settings(timeouts_drain=1)
    with installed.serving(*flags) as echod, connect(echod.port) as client:
        assert ask(client, b"hello\n") == b"HELLO\n"
        installed.switch("two")
        echod.send(signal.SIGUSR2)
        echod.wait_for("standing still")
        time.sleep(wait_s)
        echod.send(signal.SIGTERM)
        assert echod.process.wait(DEADLINE_S) == 3


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_preflight(pid: int) -> bool:
    return b"preflight" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def _until_there(look: Callable[[], list[int]]) -> list[int]:
    end = time.monotonic() + DEADLINE_S
    while not (found := look()):
        assert time.monotonic() < end
    return found


# -- with a reload --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(signal.SIGHUP, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGHUP)])
def test_a_reload_at_the_same_time_does_no_harm(order: tuple[signal.Signals, ...], tmp_path: Path) -> None:
    """An address that a reload adds during the preflight is not reported as in use."""
    path = tmp_path / "echod.toml"
    before = f'{{address = "unix:{tmp_path}/one"}}'
    path.write_text(f"listen = [{before}]\n")
    with serving("-c", str(path)) as echod:
        path.write_text(f'listen = [{before}, {{address = "unix:{tmp_path}/two"}}]\n')
        for number in order:
            echod.send(number)
        outcome = echod.wait_until(partial(_reaction, echod, signal.SIGUSR2), "no outcome")
        assert (outcome["event"], len(outcome.get("listen", ()))) == ("upgrade done", 2)


def test_a_client_that_waits_for_the_result_of_a_reload_gets_it(installed: Installed, tmp_path: Path) -> None:
    """An upgrade waits for a slow reload that was requested at the last moment, and for its client."""
    gate = Gate(tmp_path / "gate")
    installed.add(
        "patient", {"admin.endpoint": "END_S = 2", "config.toml": CODE}
    )  # so that the test can act within the last moment
    installed.switch("patient")
    path = tmp_path / "echod.toml"
    text = f'listen = [{{address = "unix:{tmp_path}/sock"}}]\nadmin.listen = "unix:{tmp_path}/admin"\n'
    path.write_text(text)
    there = {"TEST_GATE": gate.environment["TEST_GATE"]}
    with installed.serving("-c", str(path), environment=there) as echod, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(f"{tmp_path}/admin")
        echod.send(signal.SIGUSR2)
        echod.wait_for("upgrade proven")
        gate.shut()
        client.sendall(b"POST /reload HTTP/1.1\r\nhost: x\r\n\r\n")
        release = gate.wait()
        time.sleep(3)  # longer than a silent client may stay connected
        release()
        assert b"HTTP/1.1 200" in read_to_end(client)
        echod.wait_for("upgrade done")


def test_clients_in_the_backlog_of_a_removed_listener_are_served(installed: Installed, tmp_path: Path) -> None:
    """An upgrade waits for clients in the backlog of a listener that the previous upgrade removed."""
    installed.prove_at_once()
    path = tmp_path / "echod.toml"
    port = free_port()
    kept, gone = f'{{address = "unix:{tmp_path}/sock"}}', f'{{address = "127.0.0.1:{port}"}}'
    # Only the smallest number of rejected clients may linger; one more closes the oldest.
    rest = f"limits.connections = {allowed_open_files() - RESERVED_FILES - 2}\nlimits.connections_per_address = 1\n"
    path.write_text(f"listen = [{kept}, {gone}]\n{rest}")
    with installed.serving("-c", str(path)) as echod, contextlib.ExitStack() as clients:
        served, *_ = [clients.enter_context(connect(port)) for _ in range(MIN_LINGERING + 1)]
        assert ask(served, b"hello\n") == b"HELLO\n"
        late = [clients.enter_context(connect(port)) for _ in range(5)]
        path.write_text(f"listen = [{kept}]\n{rest}")
        upgrade(echod)
        upgrade(echod)
        for client in late:
            assert read_to_end(client) == b"ERROR too many connections from your address\n"


# -- every way to start -------------------------------------------------------------------------------------------


def test_a_daemon_with_a_pid_file(tmp_path: Path) -> None:
    """The lock of the pid file survives: a second instance is refused, and a stop removes the file."""
    pidfile, log = tmp_path / "pid", tmp_path / "log"
    command = [sys.executable, "-m", "echod", "serve", "--daemon", "--pidfile", str(pidfile)]
    command += ["-l", f"unix:{tmp_path}/sock"]
    options: dict[str, Any] = {"env": clean_environment(), "capture_output": True, "text": True, "timeout": DEADLINE_S}
    subprocess.run([*command, *settings(log_file=log)], check=True, **options)
    pid = int(pidfile.read_text())
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(f"{tmp_path}/sock")
            client.sendall(b"begun")
            os.kill(pid, signal.SIGUSR2)
            _until_there(lambda: [1] if "upgrade done" in log.read_text() else [])
            assert ask(client, b", ended\n") == b"BEGUN, ENDED\n"
        assert int(pidfile.read_text()) == pid
        second = subprocess.run([*command, *settings(log_file=log)], **options)
        assert second.returncode == 1
        assert f"already running, pid {pid}" in second.stderr
    finally:
        os.kill(pid, signal.SIGTERM)
        _until_there(lambda: [1] if not pidfile.exists() else [])
    assert "exception" not in log.read_text()


def test_the_command_line_stays_the_same() -> None:
    """`ps` shows the same command line after any number of upgrades."""

    def command_line(echod: Daemon) -> bytes:
        return Path(f"/proc/{echod.pid}/cmdline").read_bytes()

    with serving() as echod:
        upgrade(echod)
        once = command_line(echod)
        upgrade(echod)
        assert command_line(echod) == once


def test_a_script_without_an_interpreter_line(tmp_path: Path) -> None:
    """A script without an interpreter line is run with the interpreter that it was started with."""
    script = tmp_path / "echod"
    script.write_text("import sys\nfrom echod.__main__ import main\nsys.exit(main())\n")
    with serving(command=(sys.executable, "-X", "utf8", str(script))) as echod:
        upgrade(echod)
    with serving(command=(sys.executable, str(script))) as echod:
        upgrade(echod)


def test_relative_paths_refer_to_the_directory_of_the_start(tmp_path: Path) -> None:
    """A daemon's working directory is /, so the directory of its relative paths is part of the state."""
    (tmp_path / "echod.toml").write_text(f"listen = [{{address = 'unix:{tmp_path}/sock'}}]\nlog.file = 'log'\n")
    command = [sys.executable, "-m", "echod", "serve", "--daemon", "--pidfile", "pid", "-c", "echod.toml"]
    subprocess.run(command, env=clean_environment(), cwd=tmp_path, check=True, timeout=DEADLINE_S)
    pid, log = int((tmp_path / "pid").read_text()), tmp_path / "log"
    try:
        for number, event in ((signal.SIGUSR2, "upgrade done"), (signal.SIGHUP, "reload applied")):
            os.kill(pid, number)
            _until_there(partial(_found, log, event))
    finally:
        os.kill(pid, signal.SIGTERM)
        _until_there(lambda: [1] if not (tmp_path / "pid").exists() else [])
    assert '"warning"' not in log.read_text()


def _found(log: Path, event: str) -> list[int]:
    return [1] if f'"{event}"' in log.read_text() else []


def test_sockets_of_a_service_manager_stay_inherited() -> None:
    """Inherited sockets keep their names through upgrades and reloads, and keep listening after a stop."""
    with two_sockets() as (one, other), activated(one, other, names="a:b") as echod:
        ports = echod.ports
        for _ in range(2):
            assert upgrade(echod)["listen"] == [f"127.0.0.1:{port}" for port in ports]
        echod.reload("reload applied")
        with connect(ports[1]) as client:
            assert ask(client, b"hello\n") == b"HELLO\n"
        assert not {3, 4} & {*_inheritable(echod)}
        assert echod.stop() == 0
        with connect(ports[0]):
            pass


def test_no_descriptor_is_inherited_by_children(tmp_path: Path) -> None:
    """After an upgrade every descriptor beyond the standard streams is close-on-exec again."""
    with serving("-l", "127.0.0.1:0", "-l", f"unix:{tmp_path}/sock") as echod, connect(echod.port) as client:
        assert ask(client, b"hello\n") == b"HELLO\n"
        upgrade(echod)
        upgrade(echod)
        assert _inheritable(echod) == []
        client.close()


def _inheritable(echod: Daemon) -> list[int]:
    """The descriptors that a child would inherit, except the standard streams."""
    found = []
    for number in map(int, os.listdir(f"/proc/{echod.pid}/fd")):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            flags = int(Path(f"/proc/{echod.pid}/fdinfo/{number}").read_text().split("flags:")[1].split()[0], 8)
            if number > 2 and not flags & os.O_CLOEXEC:
                found.append(number)
    return found


def test_a_preflight_that_outlives_echod_holds_no_listener(installed: Installed) -> None:
    """A preflight that hangs holds no listener: when echod is killed, its port is free."""
    installed.add("two", {"service": "import time; time.sleep(1000)"})
    with installed.serving() as echod:
        port = echod.port
        installed.switch("two")
        echod.send(signal.SIGUSR2)
        echod.wait_for("upgrade started")
        # Until its execve the child has a copy of every descriptor.
        (child,) = _until_there(lambda: [pid for pid in _children(echod.pid) if _is_preflight(pid)])
        try:
            echod.process.kill()
            echod.process.wait()
            with pytest.raises(ConnectionRefusedError):
                connect(port)
        finally:
            os.kill(child, signal.SIGKILL)
