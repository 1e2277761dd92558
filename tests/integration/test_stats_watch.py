"""`echod stats --watch`: at a terminal, in a pipe and as JSON; also across restarts of the daemon."""

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from echod.cli.stats_watch import JsonLines
from tests.integration.test_arguments import PYTHON_M_ECHOD, environment
from tests.support.daemon import DEADLINE_S, ask, connect, serving
from tests.support.terminal import at_terminal

ENTER = b"\r"
CTRL_C = b"\x03"
CTRL_Z = b"\x1a"


@pytest.fixture
def admin(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/admin"


def watch(admin: str, *more: str) -> list[str]:
    return ["stats", "--watch", "--admin", admin, *more]


@contextlib.contextmanager
def watching(admin: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`echod stats --watch` whose output is a pipe."""
    command = [*PYTHON_M_ECHOD, *watch(admin, *more)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment({"TERM": "xterm"}), stdout=pipe, stderr=pipe, text=True) as watched:
        try:
            yield watched
        finally:
            watched.kill()


# -- at a terminal -----------------------------------------------------------------------------------------------------


def test_live_at_a_terminal(admin: str) -> None:
    """The table is redrawn every second, with bars; Ctrl-C restores the terminal, leaves the last table and exits 0."""
    with serving("--set", f"admin.listen={admin}") as echod, at_terminal(*watch(admin)) as terminal:
        terminal.see(rf"^echod \S+   pid {echod.pid}   serving   up \d+ s   (no )?fast path$")
        terminal.see(r"^  open +0 +░{20} peak 0$")
        assert terminal.screen.is_other
        assert not terminal.screen.is_cursor_shown
        with connect(echod.port) as client:
            for _ in range(20):
                assert ask(client, b"hello\n") == b"HELLO\n"
            terminal.see(r"^  open +1 +█{20} peak 1$")
            terminal.see(r"^  accepted +1( +\d\.\d/s)?$")
            terminal.see(r"^  lines +20( +\d+\.\d/s)?$")
            terminal.see(r"^  loop lag +\d+\.\d ms +█*░+$")
        terminal.see(r"^  open +0 +░{20} peak 1$")
        assert len(terminal.screen.text.splitlines()) < 24
        terminal.press(CTRL_C)
        assert terminal.exit_status() == 0
        assert not terminal.screen.is_other
        assert terminal.screen.is_cursor_shown
        assert "peak 1" in terminal.screen.text
        assert terminal.screen.colours >= {"1", "2", "32", "0"}


def test_rates(admin: str) -> None:
    """Growing counters have a rate, which disappears when they stop."""
    with serving("--set", f"admin.listen={admin}") as echod, at_terminal(*watch(admin)) as terminal:
        terminal.see("^echod")
        with connect(echod.port) as client:
            while not re.search(r"^  lines .*/s$", terminal.screen.text, re.MULTILINE):
                ask(client, b"hello\n")
                terminal.look()
            terminal.see(r"^  in +[\d.]+ (B|KiB) +\d+(\.\d)? (B|KiB|MiB)/s$")
            terminal.see(r"^  lines +[\d,]+$")


def test_the_daemon_restarts(admin: str) -> None:
    """While nobody answers, it says so and retries; then it shows the new daemon, and that it was restarted."""
    with contextlib.ExitStack() as watched:
        with serving("--set", f"admin.listen={admin}") as first:
            terminal = watched.enter_context(at_terminal(*watch(admin)))
            terminal.see(f"pid {first.pid} ")
        terminal.see(f"^asking again: nobody answers at {re.escape(admin)}"[:79])
        assert f"pid {first.pid} " in terminal.screen.text
        with serving("--set", f"admin.listen={admin}") as second:
            terminal.see(f"pid {second.pid} ")
            terminal.see("^restarted once since the watch began$")
            terminal.press(CTRL_C)
            assert terminal.exit_status() == 0


def test_a_narrow_terminal(admin: str) -> None:
    """Lines are cut at the width of the terminal, and a larger terminal is used at once."""
    with serving("--set", f"admin.listen={admin}"), at_terminal(*watch(admin), rows=5, columns=20) as terminal:
        terminal.see(r"^  open +\Z|^  accepted")
        assert len(terminal.screen.text.splitlines()) == 5
        terminal.resize(40, 100)
        terminal.see("^  upgrades ")
        terminal.see(r"░ peak 0$")


def test_ctrl_z(admin: str) -> None:
    """Ctrl-Z restores the terminal, and the table is redrawn when the command continues."""
    with serving("--set", f"admin.listen={admin}"), at_terminal(*watch(admin)) as terminal:
        terminal.see("^echod")
        terminal.press(CTRL_Z)
        terminal.see("^stopped$")
        assert not terminal.screen.is_other
        assert terminal.screen.is_cursor_shown
        terminal.press(ENTER)
        terminal.see("^echod")
        assert terminal.screen.is_other
        terminal.press(CTRL_C)
        assert terminal.exit_status() == 0


def test_no_colour(admin: str) -> None:
    """NO_COLOR and a dumb terminal disable colours, once and with --watch; an empty NO_COLOR does not."""
    with serving("--set", f"admin.listen={admin}"):
        for no_color, is_coloured in [("1", False), ("", True)]:
            with at_terminal("stats", "--admin", admin, NO_COLOR=no_color) as terminal:
                assert terminal.exit_status() == 0
                assert bool(terminal.screen.colours) == is_coloured
        with at_terminal(*watch(admin), NO_COLOR="1") as terminal:
            terminal.see("^echod")
            assert not terminal.screen.colours
        with at_terminal(*watch(admin), TERM="dumb") as terminal:
            terminal.see(r"^  upgrades .*\n\nechod")
            assert not terminal.screen.is_other
            assert not terminal.screen.colours


def test_term_leaves_a_clean_terminal(admin: str) -> None:
    """TERM ends it as Ctrl-C does."""
    with serving("--set", f"admin.listen={admin}"), at_terminal(*watch(admin)) as terminal:
        terminal.see("^echod")
        terminal.end(signal.SIGTERM)
        assert terminal.exit_status() == 0
        assert terminal.screen.is_cursor_shown
        assert not terminal.screen.is_other


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def test_through_a_pipe(admin: str) -> None:
    """Output that is not a terminal gets plain tables, one below the other, unbuffered."""
    with serving("--set", f"admin.listen={admin}"), watching(admin) as watched:
        assert watched.stdout
        lines = [line for line, _ in zip(watched.stdout, range(30), strict=False)]
        assert [bool(line.startswith("echod ")) for line in lines].count(True) == 2
        assert "\n" in lines
        assert not [line for line in lines if "\x1b" in line or "\r" in line]
        watched.send_signal(signal.SIGINT)
        _, errors = watched.communicate(timeout=DEADLINE_S)
    assert (watched.returncode, errors) == (0, "")


def test_json_lines(admin: str) -> None:
    """`--watch --json` prints one object per line; an outage is reported once on standard error."""
    with contextlib.ExitStack() as watched:
        with serving("--set", f"admin.listen={admin}") as first:
            command = watched.enter_context(watching(admin, "--json"))
            assert command.stdout
            assert command.stderr
            assert [json.loads(command.stdout.readline())["pid"] for _ in range(2)] == [first.pid] * 2
        assert command.stderr.readline().startswith(f"echod: asking again: nobody answers at {admin}: ")
        with serving("--set", f"admin.listen={admin}") as second:
            assert any(json.loads(line)["pid"] == second.pid for line in command.stdout)
            command.send_signal(signal.SIGINT)
            _, errors = command.communicate(timeout=DEADLINE_S)
    assert (command.returncode, errors) == (0, "")


def test_each_outage_is_told_once() -> None:
    """An outage is reported once, and again only after an answer."""
    written: list[str] = []
    complaints: list[str] = []
    page = JsonLines(written.append, complaints.append)
    page.miss("first")
    page.miss("still")
    page.draw({"pid": 1})
    page.miss("second")
    assert (written, complaints) == (['{"pid": 1}'], ["first", "second"])


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_nobody_there_from_the_start(more: list[str]) -> None:
    """If nobody answers the first request, the command prints one line and exits 1, as without --watch."""
    with watching("unix:/no/such/socket", *more) as watched:
        said, errors = watched.communicate(timeout=DEADLINE_S)
    assert (watched.returncode, said, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("echod: nobody answers at unix:/no/such/socket")
