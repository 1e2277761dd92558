"""Restarts after a kill: nothing that the dead process left hinders the next start."""

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest

from tests.faults.measurements import Figures
from tests.support.clients import open_stream
from tests.support.daemon import DEADLINE_S, UNMEASURED, Daemon, ask, connect, free_port, read_to_end, serving

STARTS = 5
KILLS = 20
CLIENTS = 16
SERVED_BETWEEN_KILLS = 100
OF_EACH = 20
SLACK_S = 1.0
"""How much longer a start may take on a busy machine; an obstacle such as TIME_WAIT lasts a minute."""

UNREAD = b"a reply that nobody reads yet\n" * 10_000

STATES = {"01": "ESTABLISHED", "04": "FIN_WAIT1", "05": "FIN_WAIT2", "06": "TIME_WAIT", "0A": "LISTEN"}
"""The states of /proc/net/tcp (net/tcp_states.h)."""


@pytest.mark.timeout(120)
def test_a_port_is_bound_at_once_after_a_kill_with_connections(report: Callable[[Figures], None]) -> None:
    """After kill -9 with partial lines, unread replies and closed clients, the next start is not delayed."""
    usual_s = [_start_s("127.0.0.1:0") for _ in range(STARTS)]
    port = free_port()
    restarts_s = []
    for _ in range(STARTS):
        with contextlib.ExitStack() as clients:
            mid_line, unread = _leave_connections_behind(port, clients)
            before = _states(port)
            restarts_s.append(_start_s(f"127.0.0.1:{port}"))
            saw = Counter(read_to_end(client) for client in mid_line)
            received = [read_to_end(client) for client in unread]
        assert before["TIME_WAIT"] >= OF_EACH
        assert before["FIN_WAIT1"] + before["FIN_WAIT2"] >= 2 * OF_EACH
        assert saw == {b"": OF_EACH}
        assert received == [UNREAD.upper()] * OF_EACH, "what the kernel had taken still arrives"
    report(
        {
            "fault": "kill -9 and restart on a busy port",
            "before the last": dict(before),
            "ready after s": f"{median(restarts_s):.3f}, at most {max(restarts_s):.3f}",
            "usually": f"{median(usual_s):.3f}, at most {max(usual_s):.3f}",
            "clients mid-line saw": dict(saw),
        }
    )
    assert median(restarts_s) < max(usual_s) + SLACK_S


def _leave_connections_behind(port: int, clients: contextlib.ExitStack) -> tuple[list[socket.socket], ...]:
    """Kill a daemon, and return its clients with a partial line and with unread replies."""
    with serving("-l", f"127.0.0.1:{port}") as echod:
        for _ in range(OF_EACH):
            with connect(port) as gone:
                gone.sendall(b"\xff\n")
                assert (
                    read_to_end(gone) == b"ERROR invalid utf-8\n"
                )  # half-closed by echod first, so its side is in TIME_WAIT
        mid_line = [clients.enter_context(connect(port)) for _ in range(OF_EACH)]
        assert {ask(client, b"whole\nhalf") for client in mid_line} == {b"WHOLE\n"}
        unread = [clients.enter_context(connect(port, receive_buffer=4096)) for _ in range(OF_EACH)]
        for client in unread:
            client.sendall(UNREAD)
        while echod.stats()["bytes_out"] < OF_EACH * len(UNREAD):
            pass
        echod.process.kill()
        echod.process.wait()
    return mid_line, unread


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_20_kills_in_a_row_under_load(kind: str, tmp_path: Path, report: Callable[[Figures], None]) -> None:
    """Under load, no start after a kill is delayed, and clients lose their connection only by the kill."""
    address = f"unix:{tmp_path}/sock" if kind == "unix" else f"127.0.0.1:{free_port()}"
    usual_s = [_start_s(f"unix:{tmp_path}/other" if kind == "unix" else "127.0.0.1:0") for _ in range(STARTS)]
    tally = Tally()
    with ThreadPoolExecutor(1) as executor:
        load = executor.submit(asyncio.run, _come_and_go(address, tally))
        try:
            starts_s = [_kill_under_load(address, tally, load) for _ in range(KILLS)]
        finally:
            tally.is_over.set()
        load.result(DEADLINE_S)
    report(
        {
            "fault": f"{KILLS} times kill -9 and restart under load, {kind}",
            "ready after s": f"{median(starts_s):.3f}, at most {max(starts_s):.3f}",
            "usually, with no load": f"{median(usual_s):.3f}, at most {max(usual_s):.3f}",
            "clients saw": f"{tally.served} served, {tally.cut} cut by a kill, {tally.refused} refused between",
        }
    )
    assert not tally.complaints
    assert median(starts_s) < max(usual_s) + SLACK_S
    with serving("-l", address) as echod:
        assert echod.stop() == 0


def _kill_under_load(address: str, tally: "Tally", load: "Future[None]") -> float:
    """Start a daemon, let it serve some clients and kill it; return the time of the start."""
    began = time.monotonic()
    with serving("-l", address, environment=UNMEASURED) as echod:
        start_s = time.monotonic() - began
        enough, cut = tally.served + SERVED_BETWEEN_KILLS, tally.cut
        while tally.served < enough:
            assert time.monotonic() < began + DEADLINE_S
            assert not load.done(), load.result()
            time.sleep(0.005)
        assert tally.cut == cut, "while nobody was killed"
        echod.process.kill()
        echod.process.wait()
    return start_s


@dataclass
class Tally:
    """Results of short-lived clients across kills."""

    served: int = 0
    refused: int = 0
    cut: int = 0
    complaints: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)


async def _come_and_go(address: str, tally: Tally) -> None:
    await asyncio.gather(*(_come_again_and_again(address, tally) for _ in range(CLIENTS)))


async def _come_again_and_again(address: str, tally: Tally) -> None:
    while not tally.is_over.is_set():
        try:
            async with asyncio.timeout(DEADLINE_S):
                received = await _ask_and_leave(address)
        except (ConnectionRefusedError, FileNotFoundError):
            tally.refused += 1
            await asyncio.sleep(0.005)
        except TimeoutError:
            tally.complaints.append("no answer, and no end")
        except OSError:
            tally.cut += 1
        else:
            tally.served += received == b"QUICK\n"
            tally.cut += received == b""
            if received not in (b"QUICK\n", b""):
                tally.complaints.append(f"got {received!r}")


async def _ask_and_leave(address: str) -> bytes:
    reader, writer = await open_stream(address)
    try:
        writer.write(b"quick\n")
        writer.write_eof()
        return await reader.read()
    finally:
        writer.close()


def test_a_socket_file_left_by_a_kill_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    """A socket file left by kill -9 is replaced; a start on a served socket fails, without harm to its clients."""
    path = tmp_path / "sock"
    with serving("-l", f"unix:{path}") as killed:
        killed.process.kill()
        killed.process.wait()
    assert path.is_socket()
    with serving("-l", f"unix:{path}"), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(str(path))
        with Daemon("-l", f"unix:{path}") as second:
            assert second.process.wait(DEADLINE_S) == 1
        assert "address already in use" in second.other_lines[0]
        assert ask(client, b"unharmed\n") == b"UNHARMED\n"
        with socket.socket(socket.AF_UNIX) as late:
            late.settimeout(DEADLINE_S)
            late.connect(str(path))
            assert ask(late, b"me too\n") == b"ME TOO\n"


def _start_s(address: str) -> float:
    """Return the time from the start of the process to `ready`; then assert that it serves and stops."""
    began = time.monotonic()
    with serving("-l", address, environment=UNMEASURED) as echod:
        start_s = time.monotonic() - began
        if not address.startswith("unix:"):
            with connect(echod.port) as client:
                assert ask(client, b"at once\n") == b"AT ONCE\n"
    return start_s


def _states(port: int) -> Counter[str]:
    """Count the sockets of the port by state."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return Counter(STATES.get(row[3], row[3]) for row in rows if int(row[1].rpartition(":")[2], 16) == port)
