"""`systemctl stop` returns when every client has what it is owed, or was aborted."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tests.support.report import Report
from tests.system.systemd.machine import ADDRESS, Machine

DRAIN_S = 3


def stop(machine: Machine) -> float:
    """Stop the service, and return the time it took."""
    began = time.monotonic()
    machine("systemctl", "stop", "echod")
    return time.monotonic() - began


def assert_stopped_in_good_order(machine: Machine) -> None:
    about = machine.show("echod", "ActiveState", "Result", "NRestarts")
    assert about == {"ActiveState": "inactive", "Result": "success", "NRestarts": "0"}


def test_stop_under_load_delivers_every_reply_that_is_owed(machine: Machine, report: Report) -> None:
    """20 clients with 20 MB of pending replies get all of them; 20 pipelining clients end at a line boundary."""
    machine.configure(f"[timeouts]\ndrain = {DRAIN_S}\n")
    machine("systemctl", "start", "echod")
    cursor = machine.cursor()
    with (
        machine.load("busy", ADDRESS, 20) as busy,
        machine.load("owed", ADDRESS, 20, 20_000) as owed,
        ThreadPoolExecutor() as pool,
    ):
        assert busy.next()["ended"] == 0
        assert owed.next() == "sent"
        stopping = pool.submit(stop, machine)
        machine.wait_for(lambda: machine.events("echod", "drain started", cursor), "no drain")
        received = owed.ask()
        seconds = stopping.result()
        ended = busy.ask()
    assert received["got"] == ["all"] * 20
    assert (ended["ended"], ended["complaints"]) == (20, [])
    assert_stopped_in_good_order(machine)
    (finished,) = machine.events("echod", "drain finished", cursor)
    assert (finished["clean"], finished["cut"]) == (40, 0)
    report(
        "3 stop under load",
        owed_and_delivered=f"{received['bytes'] / 1e6:.0f} MB to 20 clients",
        busy_clients_ended_at_a_line="20 of 20",
        drain_s=DRAIN_S,
        stop_s=round(seconds, 1),
        result="success",
    )


def test_a_client_that_never_reads_is_aborted_and_the_unit_succeeds(machine: Machine, report: Report) -> None:
    """A client that never reads is aborted at the deadline; systemd counts exit status 3 as success."""
    machine.configure(f"[timeouts]\ndrain = {DRAIN_S}\n")
    machine("systemctl", "start", "echod")
    cursor = machine.cursor()
    with machine.load("never_read", ADDRESS) as client:
        assert client.next() == "stuck"
        seconds = stop(machine)
    assert DRAIN_S <= seconds < DRAIN_S + 3
    assert_stopped_in_good_order(machine)
    assert [event["exit_status"] for event in machine.events("echod", "stopped", cursor)] == [3]
    report("3 stop, a client never reads", drain_s=DRAIN_S, stop_s=round(seconds, 1), exit_status=3, result="success")


def test_a_drain_longer_than_the_stop_timeout_asks_for_the_time_it_needs(machine: Machine, report: Report) -> None:
    """With a drain of 6 s and TimeoutStopSec=2, systemd waits for the drain, which extends the timeout."""
    machine.configure("[timeouts]\ndrain = 6\n")
    machine.drop_in("echod.service", "[Service]\nTimeoutStopSec=2\n")
    machine("systemctl", "start", "echod")
    with machine.load("unfinished", ADDRESS) as client:
        assert client.next() == "begun"
        ending = threading.Timer(4, client.tell)
        ending.start()
        seconds = stop(machine)
        ending.join()
        assert client.next() == {"received": "SECOND\n"}
    assert seconds >= 4
    assert_stopped_in_good_order(machine)
    report("3 stop, drain 6 s, TimeoutStopSec=2", line_ended_after_s=4, stop_s=round(seconds, 1), result="success")
