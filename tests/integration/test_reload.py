"""A reload: all or nothing, and no client notices."""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_admin_endpoint import get
from tests.support.clients import Tally, come_and_go, pipeline
from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, free_port, read_to_end, serving
from tests.support.gate import Gate

GOOD = """\
[[listen]]
address = "127.0.0.1:{port}"
[limits]
connections = 50
[log]
level = "info"
"""


def _no_file(file: Path) -> None:
    file.unlink()


def _write(text: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_text(text)

    return write


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (_no_file, "{file}: cannot be read: No such file or directory"),
        (_write("[limits\n"), "{file}: not valid TOML: Expected ']' at the end of a table declaration"),
        (
            _write("[limits]\nconections = 1\n"),
            "{file}: limits.conections: unknown key, did you mean limits.connections?",
        ),
        (_write("[limits]\nconnections = '1'\n"), "{file}: limits.connections: expected int (got '1')"),
        (_write("[timeouts]\nidle = -1\n"), "{file}: timeouts.idle: expected number >= 0 (got -1)"),
        (_write("[[listen]]\naddress = '127.0.0.1:{taken}'\n"), "listen: 127.0.0.1:{taken}: address already in use"),
        (_write("[[listen]]\naddress = '192.0.2.1:9'\n"), "listen: 192.0.2.1:9: not an address of this machine"),
        (_write("[[listen]]\naddress = 'no.such.host.invalid:9'\n"), "listen: no.such.host.invalid:9: unknown host"),
        (_write("[log]\nfile = '/no/such/folder/log'\n"), "log.file: /no/such/folder/log: no such file or directory"),
    ],
    ids=[
        "no file",
        "bad TOML",
        "unknown key",
        "wrong type",
        "out of range",
        "port taken",
        "address unknown",
        "host",
        "log",
    ],
)
def test_a_fault_leaves_everything_as_it_was_and_says_why(
    spoil: Callable[[Path], None], fault: str, tmp_path: Path
) -> None:
    """Whatever fails, the old configuration stays in force in every respect, and the error is logged."""
    file = tmp_path / "echod.toml"
    file.write_text(GOOD.format(port=0))
    with socket.create_server(("127.0.0.1", 0)) as taken, serving("-c", str(file)) as echod:
        with connect(echod.port) as client:
            assert ask(client, b"before\n") == b"BEFORE\n"
            before = echod.stats()
            spoil(file)
            names = {"file": str(file), "taken": str(taken.getsockname()[1])}
            if file.exists():
                file.write_text(_fill(file.read_text(), names))
            refused = echod.reload("reload refused")
            assert refused["errors"][0].startswith(_fill(fault, names))
            assert ask(client, b"after\n") == b"AFTER\n"
            after = echod.stats()
        with connect(echod.port) as another:
            assert ask(another, b"the old port\n") == b"THE OLD PORT\n"
        assert after["config_generation"] == before["config_generation"] == 1
        assert after["open_files"] == before["open_files"]
        assert after["reloads"] == {"applied": 0, "refused": 1, "last_error": "; ".join(refused["errors"])}
        assert echod.stop() == 0


def _fill(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def test_every_error_is_reported_at_once(tmp_path: Path) -> None:
    """`reload refused` (`errors`) names every error."""
    file = tmp_path / "echod.toml"
    file.write_text(GOOD.format(port=0))
    with serving("-c", str(file)) as echod:
        file.write_text("[limits]\nconnections = 0\nline_bytes = 'x'\n[nonsense]\n")
        assert len(echod.reload("reload refused")["errors"]) == 3
        assert echod.stop() == 0


def test_new_limits_and_timeouts_apply_to_established_connections(tmp_path: Path) -> None:
    """Established connections are not touched; new limits and timeouts apply to them from then on."""
    file = tmp_path / "echod.toml"
    file.write_text(GOOD.format(port=0))
    with serving("-c", str(file)) as echod, connect(echod.port) as client, connect(echod.port) as idle:
        assert ask(client, b"a line that is long\n") == b"A LINE THAT IS LONG\n"
        assert ask(idle, b"hello\n") == b"HELLO\n"
        file.write_text(
            GOOD.format(port=0).replace("connections = 50", "connections = 2\nline_bytes = 10\n[timeouts]\nidle = 2")
        )
        applied = echod.reload("reload applied")
        assert applied["changed"] == ["limits.connections", "limits.line_bytes", "timeouts.idle"]
        with connect(echod.port) as third:
            assert read_to_end(third) == b"ERROR too many connections\n"
        client.sendall(b"a line that is long\n")
        assert read_to_end(client) == b"ERROR line longer than 10 bytes\n"
        assert read_to_end(idle) == b"ERROR idle for 2 s\n"
        assert echod.stop() == 0


def test_listeners_are_added_moved_and_removed_under_load_without_a_lost_reply(tmp_path: Path) -> None:
    """A removed listener is closed as in a drain; its connections live on."""
    file = tmp_path / "echod.toml"
    stays, first, second, third = (free_port() for _ in range(4))
    unix = tmp_path / "echod.sock"

    def write(*addresses: str) -> None:
        file.write_text("".join(f"[[listen]]\naddress = '{address}'\n" for address in addresses))

    async def scenario(echod: Daemon) -> None:
        tally = Tally()
        on_first = await pipeline(f"127.0.0.1:{first}", 10)
        on_unix = await pipeline(f"unix:{unix}", 10)
        coming = [asyncio.ensure_future(come_and_go(f"127.0.0.1:{first}", tally)) for _ in range(8)]
        added: list[int | str] = [stays, first, f"unix:{unix}", second]
        moved: list[int | str] = [third, stays, f"unix:{unix}", second]
        removed: list[int | str] = [stays, second]
        for listen in (added, moved, removed):
            write(*(each if isinstance(each, str) else f"127.0.0.1:{each}" for each in listen))
            applied = await asyncio.to_thread(echod.reload, "reload applied")
            assert applied["changed"] == ["listen"]
            assert len(applied["listen"]) == len(listen)
            for port in (each for each in listen if isinstance(each, int)):
                with await asyncio.to_thread(connect, port) as visitor:
                    assert await asyncio.to_thread(ask, visitor, b"here\n") == b"HERE\n"
        await asyncio.wait_for(asyncio.gather(*coming), DEADLINE_S)
        assert not tally.complaints, tally.complaints
        assert tally.refused == len(coming)
        lines = sum(client.received.count(b"\n") for client in (*on_first, *on_unix))
        assert not any(client.ended.done() for client in (*on_first, *on_unix))
        assert not unix.exists()
        with pytest.raises(ConnectionRefusedError):
            connect(first)
        echod.send(signal.SIGTERM)
        await asyncio.wait([client.ended for client in (*on_first, *on_unix)], timeout=DEADLINE_S)
        for client in (*on_first, *on_unix):
            client.check()
        assert sum(client.received.count(b"\n") for client in (*on_first, *on_unix)) > lines

    write(f"127.0.0.1:{stays}", f"127.0.0.1:{first}", f"unix:{unix}")
    with serving("-c", str(file), "--set", "timeouts.drain=0.5") as echod:
        asyncio.run(scenario(echod))
        assert echod.exit_status() == 0


def test_200_hups_in_a_second_end_with_the_last_configuration(tmp_path: Path) -> None:
    """Reloads run one after the other; signals that pile up become one further reload."""
    file = tmp_path / "echod.toml"
    file.write_text(GOOD.format(port=0))
    with serving("-c", str(file)) as echod, connect(echod.port) as client:
        for number in range(200):
            _replace(file, GOOD.format(port=0).replace("50", str(1000 + number)))
            echod.send(signal.SIGHUP)
            assert ask(client, b"served\n") == b"SERVED\n"
            time.sleep(0.004)  # the rate of the signals
        _replace(file, GOOD.format(port=0).replace("50", "1"))
        echod.send(signal.SIGHUP)
        end = time.monotonic() + DEADLINE_S
        while _first_answer(echod.port) != b"ERROR too many connections\n":
            assert time.monotonic() < end
        stats = echod.stats()
        assert stats["reloads"]["refused"] == 0
        assert 1 <= stats["reloads"]["applied"] <= 201
        assert stats["config_generation"] == stats["reloads"]["applied"] + 1
        assert ask(client, b"the same connection\n") == b"THE SAME CONNECTION\n"
        assert echod.stop() == 0


def _replace(file: Path, text: str) -> None:
    """Replace the file as an editor does: a reload never sees half of it, or an empty file (the defaults)."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(file)


def _first_answer(port: int) -> bytes:
    with connect(port) as client:
        client.sendall(b"x\n")
        return client.recv(100)


def test_the_log_file_is_reopened(tmp_path: Path) -> None:
    """A log file is reopened (logrotate); level and format also change for loggers in use."""
    file, log, port = tmp_path / "echod.toml", tmp_path / "echod.log", free_port()
    file.write_text(GOOD.format(port=port) + f"file = '{log}'\n")
    with Daemon("-c", str(file)) as echod:
        _wait_for_text(log, '"ready"')
        log.rename(tmp_path / "echod.log.1")
        echod.send(signal.SIGHUP)
        _wait_for_text(log, '"reload applied"')
        assert "reload applied" not in (tmp_path / "echod.log.1").read_text()
        file.write_text(GOOD.format(port=port).replace("info", "error"))
        echod.send(signal.SIGHUP)
        _wait_until(lambda: _asked_for_stats(echod))
        with connect(port) as client:
            assert ask(client, b"hello\n") == b"HELLO\n"
        assert echod.stop() == 0
        assert {event["event"] for event in echod.events} == {"stats"}, "back on standard error, at level error"


def _asked_for_stats(echod: Daemon) -> bool:
    """Request a statistics dump, which goes to standard error only once the reload is in force."""
    echod.send(signal.SIGUSR1)
    return bool(echod.events)


def _wait_for_text(file: Path, text: str) -> None:
    _wait_until(lambda: file.exists() and text in file.read_text())


def _wait_until(claim: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_running_reload_does_not_delay_a_stop(tmp_path: Path) -> None:
    """A stop abandons a reload that is being prepared, and nothing of it is left."""
    gate, file = Gate(tmp_path / "gate"), tmp_path / "echod.toml"
    file.write_text(GOOD.format(port=0))
    with serving("-c", str(file), environment=gate.environment) as echod:
        gate.shut()
        echod.send(signal.SIGHUP)
        echod.wait_for("reload started")
        release = gate.wait()
        with connect(echod.port) as client:
            assert ask(client, b"served meanwhile\n") == b"SERVED MEANWHILE\n"
        assert echod.stop() == 0
        release()


def test_keys_that_need_a_restart_are_named_until_they_are_in_force(tmp_path: Path) -> None:
    """Each reload names the keys that are not in force, as long as the listener was bound without them."""
    file = tmp_path / "echod.toml"
    stays, goes = free_port(), free_port()

    def write(address: str, *, is_shared: bool) -> None:
        unix = f"[[listen]]\naddress = 'unix:{tmp_path}/sock'\n"
        shared = f"reuse_port = {str(is_shared).lower()}\n"
        file.write_text(f"{unix}[[listen]]\naddress = '{address}'\n{shared}")

    write(f"127.0.0.1:{stays}", is_shared=False)
    with serving("-c", str(file)) as echod:
        assert echod.reload("reload applied")["restart_needed"] == []
        write(f"127.0.0.1:{stays}", is_shared=True)
        applied = echod.reload("reload applied")
        assert (applied["changed"], applied["restart_needed"]) == (["listen"], ["listen[1].reuse_port"])
        applied = echod.reload("reload applied")
        assert (applied["changed"], applied["restart_needed"]) == ([], ["listen[1].reuse_port"])
        write(f"127.0.0.1:{stays}", is_shared=False)
        assert echod.reload("reload applied")["restart_needed"] == []
        write(f"127.0.0.1:{goes}", is_shared=True)
        assert echod.reload("reload applied")["restart_needed"] == []
        assert echod.stop() == 0


WITHOUT_THREADS = """
import os, sys, threading
from echod import __main__
start = threading.Thread.start
def limited(self):
    if os.path.exists({flag!r}):
        raise RuntimeError("can't start new thread")
    start(self)
    if self.name == "read file" and os.path.exists({flag!r} + ".soon"):
        open({flag!r}, "w").close()
threading.Thread.start = limited
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_reload_without_a_free_thread_is_refused(tmp_path: Path) -> None:
    """Without a thread nothing changes, the log says why, and the next reload succeeds."""
    flag, file, log = tmp_path / "flag", tmp_path / "echod.toml", tmp_path / "log"
    file.write_text(GOOD.format(port=0))
    code = WITHOUT_THREADS.format(flag=str(flag))
    with serving("-c", str(file), command=(sys.executable, "-c", code)) as echod:
        before = echod.stats()
        file.write_text(GOOD.format(port=free_port()) + f"file = '{log}'\n")
        flag.touch()
        refused = echod.reload("reload refused")["errors"]
        assert refused == ["can't start new thread; raise TasksMax= or the limit of processes (ulimit -u)"]
        after = echod.stats()
        assert (after["config_generation"], after["open_files"]) == (1, before["open_files"])
        file.write_text(GOOD.format(port=0).replace("50", "49"))
        flag.unlink()
        assert echod.reload("reload applied")["changed"] == ["limits.connections"]
        assert echod.stop() == 0


@pytest.mark.parametrize("is_file", [False, True])
def test_no_thread_is_needed_once_everything_is_prepared(is_file: bool, tmp_path: Path) -> None:
    """Once it is prepared, a reload needs no further thread that could be missing."""
    flag, file, log = tmp_path / "flag", tmp_path / "echod.toml", tmp_path / "log"
    file.write_text(GOOD.format(port=0))
    code = WITHOUT_THREADS.format(flag=str(flag))
    with serving("-c", str(file), command=(sys.executable, "-c", code)) as echod:
        (tmp_path / "flag.soon").touch()
        file.write_text(GOOD.format(port=0).replace("50", "49") + (f"file = '{log}'\n" if is_file else ""))
        echod.send(signal.SIGHUP)
        if is_file:
            _wait_for_text(log, '"reload applied"')
        else:
            echod.wait_for("reload applied")
        assert echod.stop() == 0
        assert not echod.events_named("reload failed")


FAILING_LISTENER = """
import sys
from echod import __main__
from echod.net import sockets
real = sockets.pass_on_no_delay
def fail(bound):
    if bound.socket.getsockname()[1] == {port}:
        raise OSError(12, "Cannot allocate memory")
    return real(bound)
sockets.pass_on_no_delay = fail
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_listener_that_fails_at_the_last_moment_leaves_the_admin_endpoint_as_it_was(tmp_path: Path) -> None:
    """A reload that changes both puts neither in force if one of them fails after everything was prepared."""
    file, port = tmp_path / "echod.toml", free_port()
    old, new = f"unix:{tmp_path}/old", f"unix:{tmp_path}/new"
    file.write_text(GOOD.format(port=0) + f"[admin]\nlisten = '{old}'\n")
    command = (sys.executable, "-c", FAILING_LISTENER.format(port=port))
    with serving("-c", str(file), command=command) as echod:
        before = echod.stats()["open_files"]
        file.write_text(GOOD.format(port=port) + f"[admin]\nlisten = '{new}'\n")
        echod.send(signal.SIGHUP)
        assert "Cannot allocate memory" in echod.wait_for("reload refused")["errors"][0]
        assert get(old, "/readyz").status == 200
        assert not (tmp_path / "new").exists()
        with connect(echod.port) as client:
            assert ask(client, b"the old port\n") == b"THE OLD PORT\n"
        assert echod.stats()["open_files"] <= before + 1
        file.write_text(GOOD.format(port=0) + f"[admin]\nlisten = '{new}'\n")
        echod.reload("reload applied")
        assert get(new, "/readyz").status == 200
        echod.send(signal.SIGTERM)  # not `stop`, which asserts that the log holds no traceback
        assert echod.process.wait(DEADLINE_S) == 0
