"""Long sessions through HAProxy during a drain and after a half-close."""

import asyncio
import socket
from pathlib import Path

from tests.support.clients import Pipeliner, finished, pipeline
from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, read_to_end, settings
from tests.support.report import Report
from tests.system.balancer.fleet import NAMES, Fleet, balanced
from tests.system.balancer.haproxy import HAProxy

SESSIONS = 9
DRAIN_S = 1
QUICK = settings(timeouts_lame_duck=0.5, timeouts_drain=DRAIN_S, timeouts_drain_quiet=0.2)


def complaints(haproxy: HAProxy) -> set[tuple[str, str, str]]:
    """Return the errors that HAProxy counted: it hides a server's reset from the client."""
    servers = haproxy.servers()
    columns = ("econ", "eresp", "srv_abrt")
    return {(name, column, value) for name in NAMES for column in columns if (value := servers[name][column]) != "0"}


async def sessions_through_a_drain(fleet: Fleet) -> tuple[list[Pipeliner], list[Pipeliner], Daemon]:
    """Run pipelining sessions through a drain; return those of the draining instance, the others, and the instance."""
    clients = await pipeline(f"127.0.0.1:{fleet.port}", SESSIONS)
    leaving = fleet[NAMES[0]]
    fleet.leave(NAMES[0])
    assert await asyncio.to_thread(leaving.exit_status) == 0
    count = len(leaving.events_named("connection closed"))
    async with asyncio.timeout(DEADLINE_S):
        while len(ended := [client for client in clients if client.ended.done()]) < count:
            await asyncio.wait(
                [client.ended for client in clients if client not in ended], return_when="FIRST_COMPLETED"
            )
    staying = [client for client in clients if client not in ended]
    await finished(staying)
    return ended, staying, leaving


def test_a_pipelining_session_gets_every_reply_and_a_clean_end(tmp_path: Path, report: Report) -> None:
    """Every reply of the draining instance reaches its client; sessions of the others continue."""
    with balanced(tmp_path, *QUICK) as (fleet, haproxy):
        ended, staying, left = asyncio.run(sessions_through_a_drain(fleet))
        assert not complaints(haproxy)
    for client in ended:
        client.check()
    answered = sum(client.received.count(b"\n") for client in ended)
    closed = left.events_named("connection closed")
    report(
        "pipelining sessions, one of three instances drained",
        ended=len(ended),
        replies=answered,
        sessions_that_went_on=len(staying),
    )
    assert 0 < len(ended) < SESSIONS
    assert answered == sum(event["lines"] for event in closed) > 0
    assert sum(len(client.received) for client in ended) == sum(event["bytes_out"] for event in closed)
    drained = left.wait_for("drain finished")
    assert (drained["clean"], drained["cut"]) == (len(ended), 0)


def test_an_idle_session_ends_cleanly_in_a_drain(tmp_path: Path) -> None:
    """An idle session ends without a reset or an extra byte, and the client can reconnect at once."""
    with balanced(tmp_path, *QUICK) as (fleet, haproxy), connect(fleet.port) as idle:
        assert ask(idle, b"hello\n") == b"HELLO\n"
        (name,) = (name for name in NAMES if fleet[name].stats()["connections"]["open"])
        fleet.leave(name)
        assert read_to_end(idle) == b""
        with connect(fleet.port) as again:
            assert ask(again, b"again\n") == b"AGAIN\n"
        idle.close()
        assert fleet[name].exit_status() == 0
        assert fleet[name].wait_for("connection closed")["reason"] == "drained"
        assert not complaints(haproxy)


def test_a_half_close_passes_in_both_directions(tmp_path: Path) -> None:
    """After a client's half-close its last line is answered; after echod's, the client may still send."""
    with balanced(tmp_path) as (fleet, _):
        with connect(fleet.port) as client:
            client.sendall(b"first\nand the last one")
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == b"FIRST\nAND THE LAST ONE\n"
        assert any(_is_read_on(fleet) for _ in range(5)), "it is for a second, of which a busy machine may take all"


def _is_read_on(fleet: Fleet) -> bool:
    """Return whether a client that got an error is still read from; either way it must not be reset."""
    with connect(fleet.port) as client:
        client.sendall(b"\xff\n")
        assert read_to_end(client) == b"ERROR invalid utf-8\n"
        is_there: bool = sum(fleet[name].stats()["connections"]["open"] for name in NAMES) == 1
        client.sendall(b"too late\n")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    return is_there
