"""A live upgrade in a container, which replaces process 1 unnoticed by the engine."""

import asyncio
import statistics
from typing import Any

from tests.support.clients import finished, pipeline
from tests.support.daemon import read_line
from tests.support.report import Report
from tests.system.docker.conftest import Start
from tests.system.docker.engine import Container, Engine

ROUNDS = 10
CONFINED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "12345:12345")
PACKAGE = "/opt/echod/lib/python3*/site-packages/echod"


def upgrade(container: Container, event: str = "upgrade done") -> dict[str, Any]:
    """Request an upgrade as an operator does, and return the event with its result."""
    known = len(container.events(event))
    container.kill("USR2")
    found: dict[str, Any] = container.wait_until(lambda: container.events(event)[known:], f"no {event}")[0]
    return found


def test_10_upgrades_go_unnoticed_by_the_engine(start: Start, report: Report) -> None:
    """In a confined container, upgrades cause no restart and no failed health check, and streams are byte-exact."""
    container = start(*CONFINED)
    container.wait_until(lambda: container.health == "healthy", "not healthy")
    before = {name: container.state[name] for name in ("Pid", "StartedAt")}
    with container.connect() as begun:
        begun.sendall(b"begun")
        gaps = asyncio.run(_stream_through_upgrades(container))
        begun.sendall(b", ended\n")
        assert read_line(begun) == b"BEGUN, ENDED\n"
    assert {name: container.state[name] for name in before} == before
    assert container.health == "healthy"
    container.kill("USR1")
    assert container.wait_for("stats")["upgrades"] == ROUNDS
    container.stop()
    assert container.state["ExitCode"] == 0
    report(f"{ROUNDS} upgrades", same_process="yes", gap_ms=statistics.median(gaps), longest_ms=max(gaps), lost=0)


async def _stream_through_upgrades(container: Container) -> list[float]:
    clients = await pipeline(container.address, 20)
    gaps = [(await asyncio.to_thread(upgrade, container))["gap_ms"] for _ in range(ROUNDS)]
    await finished(clients)
    return gaps


def test_from_one_version_to_another(start: Start, engine: Engine) -> None:
    """An upgrade runs the installed version; a broken version is refused, with the reason in the log."""
    container = start()

    def change(module: str, text: str) -> None:
        engine("exec", "--user", "0", container.name, "sh", "-c", f"echo {text!r} >>$(echo {PACKAGE})/{module}.py")

    change("__init__", "__version__ = str(2)")
    with container.connect() as begun:
        begun.sendall(b"begun")
        assert upgrade(container)["version"] == "2"
        change("service", "def")
        refused = upgrade(container, "upgrade refused")
        assert "SyntaxError" in refused["errors"][0]
        begun.sendall(b", ended\n")
        assert read_line(begun) == b"BEGUN, ENDED\n"
