"""A stop: every client gets what it is owed, nobody is reset, and the exit status tells the truth."""

import asyncio
import random
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.clients import Tally, come_and_go, pipeline
from tests.support.daemon import (
    DEADLINE_S,
    UNMEASURED,
    Daemon,
    ask,
    connect,
    read_to_end,
    send_until_stuck,
    serving,
    settings,
)

SHORT = settings(timeouts_drain=0.5, timeouts_drain_quiet=0.1)


def _rounds(count: int, one_round: Callable[[int], Awaitable[None]], *, at_once: int = 4) -> None:
    """Run this many rounds, a few at once, because a round mostly waits."""

    async def all_rounds() -> None:
        turnstile = asyncio.Semaphore(at_once)

        async def guarded(number: int) -> None:
            async with turnstile:
                await one_round(number)

        await asyncio.gather(*map(guarded, range(count)))

    asyncio.run(all_rounds())


async def _address(echod: Daemon) -> str:
    ready = await asyncio.to_thread(echod.wait_for, "ready")
    address: str = ready["listen"][0]
    return address


@pytest.mark.timeout(180)
def test_50_pipelining_clients_and_term_at_a_random_moment(full: bool) -> None:
    """Lines answered are a prefix of lines sent, no torn reply, no reset, exit 0."""

    async def one_round(number: int) -> None:
        moments = random.Random(number)
        with Daemon("-l", "127.0.0.1:0", *SHORT) as echod:
            clients = await pipeline(await _address(echod), 50)
            await asyncio.sleep(moments.uniform(0, 0.3))
            echod.send(signal.SIGTERM)
            await asyncio.wait([client.ended for client in clients], timeout=DEADLINE_S)
            for client in clients:
                client.check()
            assert await asyncio.to_thread(echod.exit_status) == 0
            finished = echod.wait_for("drain finished")
            assert (finished["clean"], finished["cut"]) == (50, 0)
            closed = echod.events_named("connection closed")
            # Every line echod says it answered reached its client.
            assert sum(event["lines"] for event in closed) == sum(client.received.count(b"\n") for client in clients)
            assert sum(client.received.count(b"\n") for client in clients) > 0

    _rounds(50 if full else 4, one_round)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "unix"])
def test_clients_that_connect_as_fast_as_they_can_are_served_or_cleanly_refused(
    listen: str, tmp_path: Path, full: bool
) -> None:
    """Every client whose handshake was complete is accepted and served; later ones are refused; nobody is reset."""

    async def one_round(number: int) -> None:
        address = f"unix:{tmp_path}/{number}" if listen == "unix" else listen
        tally = Tally()
        # A client that was accepted while draining has `drain_quiet` to send its line: enough for the slowest client.
        with Daemon("-l", address, *settings(timeouts_drain_quiet=3)) as echod:
            address = await _address(echod)
            coming = asyncio.gather(*(come_and_go(address, tally) for _ in range(16)))
            await asyncio.sleep(random.Random(number).uniform(0.02, 0.15))
            echod.send(signal.SIGTERM)
            await asyncio.wait_for(coming, DEADLINE_S)
            assert not tally.complaints, tally.complaints
            assert tally.refused == 16
            assert tally.served > 0
            assert await asyncio.to_thread(echod.exit_status) == 0
            assert echod.wait_for("drain finished")["cut"] == 0

    _rounds(12 if full else 2, one_round)


def test_a_client_with_a_partial_line_gets_its_reply_and_an_idle_one_end_of_stream() -> None:
    """A drain waits for a partial line, and half-closes a connection that was quiet for `drain_quiet`."""
    with serving(*settings(timeouts_drain=8, timeouts_drain_quiet=1)) as echod:
        with connect(echod.port) as in_line, connect(echod.port) as idle, connect(echod.port) as late:
            assert ask(idle, b"hello\n") == b"HELLO\n"
            in_line.sendall(b"half a li")
            echod.send(signal.SIGTERM)
            echod.wait_for("drain started", connections=3)
            assert ask(late, b"answered while draining\n") == b"ANSWERED WHILE DRAINING\n"
            assert read_to_end(idle) == b""
            idle.close()
            echod.wait_for("drain progress")
            assert ask(in_line, b"ne\n") == b"HALF A LINE\n"
            assert read_to_end(in_line) == b""
            assert read_to_end(late) == b""
            in_line.close()
            late.close()
            assert echod.exit_status() == 0
        assert [event["reason"] for event in echod.events_named("connection closed")] == ["drained"] * 3


def test_a_client_idle_for_long_still_has_drain_quiet_to_send_a_line() -> None:
    """The quiet time counts from the beginning of the drain: a line in transit is answered."""
    with serving(*settings(timeouts_drain_quiet=1.5)) as echod, connect(echod.port) as client:
        assert ask(client, b"hello\n") == b"HELLO\n"
        time.sleep(2.7)  # longer than `drain_quiet` and a sweep
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started")
        time.sleep(0.2)  # in transit
        assert ask(client, b"just in time\n") == b"JUST IN TIME\n"
        assert read_to_end(client) == b""


def test_what_waits_in_the_backlog_is_served() -> None:
    """Every client whose handshake was complete is served, including those in the listen backlog."""
    with serving(*settings(timeouts_drain_quiet=0.1)) as echod:
        port = echod.port
        echod.send(signal.SIGSTOP)
        waiting = [connect(port) for _ in range(200)]
        for client in waiting:
            client.sendall(b"from the backlog\n")
        echod.send(signal.SIGTERM)
        echod.send(signal.SIGCONT)
        assert {read_to_end(client) for client in waiting} == {b"FROM THE BACKLOG\n"}
        for client in waiting:
            client.close()
        assert echod.exit_status() == 0
        assert echod.wait_for("drain finished")["clean"] == 200


def test_later_clients_are_refused() -> None:
    """After that the port closes and later clients are refused, at the latest when their SYN is retried."""
    with serving(*settings(timeouts_drain=8)) as echod, connect(echod.port) as client:
        port = echod.port
        client.sendall(b"keeps the drain going")
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started")
        with pytest.raises(ConnectionRefusedError):
            while True:  # a client that connects before the port is closed is served
                connect(port).close()
        assert ask(client, b".\n") == b"KEEPS THE DRAIN GOING.\n"


def test_a_client_that_never_reads_is_aborted_at_the_deadline() -> None:
    """A client that is still owed bytes after `drain` seconds is aborted, counted and logged; exit status 3."""
    with serving(*settings(timeouts_drain=1)) as echod, connect(echod.port, receive_buffer=4096) as client:
        send_until_stuck(client)
        echod.send(signal.SIGTERM)
        sent_at = time.monotonic()
        assert echod.exit_status() == 3
        assert time.monotonic() - sent_at >= 1
        assert echod.wait_for("connection closed")["reason"] == "cut"
        finished = echod.wait_for("drain finished")
        assert (finished["clean"], finished["cut"]) == (0, 1)
        assert echod.wait_for("stopped")["exit_status"] == 3


def test_a_partial_line_at_the_deadline_is_owed_nothing() -> None:
    """After `drain` seconds a partial line is owed nothing: exit status 0."""
    with serving(*settings(timeouts_drain=1)) as echod, connect(echod.port) as client:
        client.sendall(b"whole\nhalf")
        echod.send(signal.SIGTERM)
        assert read_to_end(client) == b"WHOLE\n"
        client.close()
        assert echod.exit_status() == 0


def test_a_second_signal_ends_it_within_100_ms() -> None:
    """The second signal aborts the rest at once; exit status 3 if anyone was owed a reply."""
    # The best of some tries, because a busy machine may delay any process.
    assert any(_seconds_from_second_signal_to_end() < 0.1 for _ in range(20))


def _seconds_from_second_signal_to_end() -> float:
    with (
        serving(environment=UNMEASURED) as echod,
        connect(echod.port, receive_buffer=4096) as client,
        connect(echod.port) as idle,
    ):
        ask(idle, b"hello\n")
        send_until_stuck(client)
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started")
        insisted_at = time.monotonic()
        echod.send(signal.SIGINT)
        assert echod.process.wait() == 3  # with a deadline it would poll every 50 ms
        ended_at = time.monotonic()
        assert echod.exit_status() == 3
        assert echod.wait_for("drain finished")["cut"] == 1
        return ended_at - insisted_at


def test_a_second_signal_exits_0_if_nobody_is_owed_anything() -> None:
    """A second signal ends idle clients and those with a partial line at once; exit status 0."""
    with serving() as echod, connect(echod.port) as in_line:
        assert ask(in_line, b"hello\nand") == b"HELLO\n"
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started")
        echod.send(signal.SIGTERM)
        assert echod.exit_status() == 0
        assert echod.wait_for("drain finished")["clean"] == 1


def test_progress_is_logged_at_least_once_a_second() -> None:
    """Each line names the connections and the seconds that are left."""
    with serving(*settings(timeouts_drain=3.5)) as echod, connect(echod.port) as client:
        client.sendall(b"half")
        echod.send(signal.SIGTERM)
        assert read_to_end(client) == b""
        client.close()
        assert echod.exit_status() == 0
        progress = echod.events_named("drain progress")
        assert len(progress) >= 2, "of three"
        assert all(event["connections"] == 1 for event in progress)
        assert progress[0]["seconds_left"] > progress[1]["seconds_left"]


def test_signals_while_draining() -> None:
    """Draining: HUP is logged and ignored, USR1 dumps, USR2 is logged and refused."""
    with serving(*settings(timeouts_drain=8)) as echod, connect(echod.port) as client:
        client.sendall(b"half")
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started", signal="TERM")
        echod.send(signal.SIGHUP)
        echod.wait_for("reload ignored")
        echod.send(signal.SIGUSR2)
        echod.wait_for("upgrade refused")
        assert echod.stats()["state"] == "draining"
        assert ask(client, b" and half\n") == b"HALF AND HALF\n"
        assert read_to_end(client) == b""
        client.close()
        assert echod.exit_status() == 0


def test_replies_are_acknowledged_before_the_exit() -> None:
    """`drain finished` reports nothing unacknowledged, even for a client that ended its stream while draining."""
    with serving(*settings(timeouts_drain=8)) as echod, connect(echod.port) as client:
        client.sendall(b"half")
        echod.send(signal.SIGTERM)
        echod.wait_for("drain started")
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b"HALF\n"
        assert echod.exit_status() == 0
        assert echod.wait_for("drain finished")["unacknowledged"] == 0


def test_an_idle_daemon_stops_at_once() -> None:
    """Without clients, a stop takes only as long as closing the port."""
    assert any(_seconds_of_an_idle_drain() < 0.5 for _ in range(20))  # the best of some tries, as above


def _seconds_of_an_idle_drain() -> float:
    with serving() as echod:
        echod.send(signal.SIGINT)
        echod.wait_for("drain started", signal="INT")
        assert echod.exit_status() == 0
        started, finished = (
            datetime.fromisoformat(echod.wait_for(name)["timestamp"]) for name in ("drain started", "drain finished")
        )
        return (finished - started).total_seconds()


def test_term_ends_a_process_whose_loop_is_stuck() -> None:
    """TERM ends the process even if the loop never runs again; exit status 3."""
    stuck = (
        "import sys, time; from echod import __main__\nfrom echod.server import clients\n"
        "clients.Clients.accept = lambda *_: time.sleep(3600)\n"
        "sys.exit(__main__.main(sys.argv[1:]))"
    )
    with serving("-l", "127.0.0.1:0", *settings(timeouts_drain=0.2), command=(sys.executable, "-c", stuck)) as echod:
        with connect(echod.port) as client:
            client.sendall(b"stuck\n")
            echod.send(signal.SIGTERM)
            assert echod.exit_status() == 3
            assert echod.events[-1]["event"] == "stop overdue"


def read_some(client: socket.socket, size: int) -> bytes:
    """Read this many bytes, or all before the end of stream."""
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


def test_a_client_that_waits_for_memory_is_served_during_a_drain() -> None:
    """A client that reads its replies only during the drain is served, although others hold the memory."""
    limits = settings(limits_held_bytes=100_000, timeouts_drain=8)
    with serving(*limits) as echod, connect(echod.port, receive_buffer=4096) as client:
        client.sendall(b"x" * 50_000 + b"\n")
        assert read_some(client, 1) == b"X"  # the rest is in the kernel
        with connect(echod.port) as one, connect(echod.port) as another:
            for holder in (one, another):
                holder.sendall(b"y" * 52_000)
            echod.wait_for("memory limit exceeded")
            echod.send(signal.SIGTERM)
            echod.wait_for("drain started")
            client.sendall(b"again\n")
            echod.wait_for("drain progress")
            assert read_some(client, 50_006) == b"X" * 49_999 + b"\nAGAIN\n"
            for holder in (one, another):
                holder.sendall(b"\n")
                assert read_to_end(holder) == b"Y" * 52_000 + b"\n"
        assert read_to_end(client) == b""
        assert echod.exit_status() == 0
