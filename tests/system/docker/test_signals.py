"""Signals of `docker kill -s`, and their results in `docker logs`."""

from pathlib import Path

from tests.support.report import Report
from tests.system.docker.conftest import Start
from tests.system.docker.engine import Container, Engine

FILE = "/etc/echod/echod.toml"
STARTS = 5
ANSWERS = {"HUP": "reload applied", "USR1": "stats", "USR2": "upgrade started"}


def mounted(directory: Path) -> tuple[str, ...]:
    """Return the options that mount the directory and name the file."""
    return ("--volume", f"{directory}:/etc/echod:ro", "--env", f"ECHOD_CONFIG={FILE}")


def assert_limit(container: Container, connections: int) -> None:
    """Assert that this many clients are served, and one more is rejected."""
    clients = [container.connect() for _ in range(connections + 1)]
    try:
        for client in clients[:-1]:
            client.sendall(b"hello\n")
            assert client.recv(100) == b"HELLO\n"
        assert clients[-1].recv(100) == b"ERROR too many connections\n"
    finally:
        for client in clients:
            client.close()


def test_hup_reads_the_mounted_file_again_and_refuses_a_bad_one(start: Start, open_path: Path, report: Report) -> None:
    """HUP applies a changed file without a restart; an invalid one is refused and changes nothing."""
    file = open_path / "echod.toml"
    file.write_text("[limits]\nconnections = 3\n")
    container = start(*mounted(open_path))
    assert_limit(container, 3)
    file.write_text("[limits]\nconnections = 2\n")
    container.kill("HUP")
    changed = container.wait_for("reload applied")["changed"]
    assert changed == ["limits.connections"]
    assert_limit(container, 2)
    file.write_text("[limits]\nconnections = 0\nline_byte = 5\n")
    container.kill("HUP")
    errors = container.wait_for("reload refused")["errors"]
    assert {tuple(error.split(": ")[:2]) for error in errors} == {
        (FILE, "limits.connections"),
        (FILE, "limits.line_byte"),
    }
    assert_limit(container, 2)
    container.stop()
    assert container.state["ExitCode"] == 0
    report("3 kill -s HUP", changed_file=f"applied, changed {changed}", bad_file=f"refused, {len(errors)} faults named")


def test_usr1_shows_the_statistics_in_the_log(start: Start, report: Report) -> None:
    """USR1 logs one event with consistent statistics."""
    container = start("--env", "ECHOD_LOG_LEVEL=error", is_ready=False)
    container.wait_until(lambda: container.health == "healthy", "not healthy")
    with container.connect() as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"HELLO\n"
        container.kill("USR1")
        stats = container.wait_for("stats")
    connections = stats["connections"]
    assert connections["accepted"] == connections["open"] + sum(connections["closed"].values())
    assert (stats["pid"], connections["open"], stats["state"]) == (1, 1, "serving")
    report("3 kill -s USR1", stats_in_docker_logs="yes", lines=stats["lines"], pid=stats["pid"])


def test_signals_during_the_start_are_held(start: Start, engine: Engine, image: str, report: Report) -> None:
    """Signals sent as soon as the container runs are handled once echod serves."""
    containers = [engine.create(image) for _ in range(STARTS)]
    kept = 0
    for container in containers:
        for verb in ("start", *(f"kill?signal={signal}" for signal in ANSWERS)):
            assert container.ask(verb) == 204
        container.wait_for("ready")
        container.stop()
        kept += sum(bool(container.events(event)) for event in ANSWERS.values())
    sent = STARTS * len(ANSWERS)
    assert kept >= sent - len(ANSWERS)  # one start may lose them, see test_stop.py
    report("3 signals sent with the start", sent=sent, acted_on_once_it_serves=kept)
