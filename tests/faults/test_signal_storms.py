"""Signals sent without a pause delay neither clients nor other signals."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.measurements import Figures, scene
from tests.support.daemon import DEADLINE_S, ask, connect, serving

STORM_S = 4.0

CLIENTS = 500
"""Connected clients, which make a stats dump more expensive."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("number", "event"), [(signal.SIGUSR1, "stats"), (signal.SIGHUP, "reload applied")])
def test_clients_are_served_during_a_storm_of_one_signal(
    number: signal.Signals, event: str, tmp_path: Path, report: Callable[[Figures], None]
) -> None:
    """Clients are served as before, no signal is queued twice, and the last one is handled."""
    file = tmp_path / "echod.toml"
    file.write_text("[[listen]]\naddress = '127.0.0.1:0'\n")
    with serving("-c", str(file)) as echod:
        clients = [connect(echod.port) for _ in range(CLIENTS)]
        storm = multiprocessing.get_context("spawn").Process(target=_send, args=(echod.pid, number))
        with scene(f"a storm of {number.name}", echod) as it:
            storm.start()
            storm.join()
            followed = len(echod.events_named(event))
            began = time.monotonic()
            assert ask(clients[0], b"still there?\n") == b"STILL THERE?\n"
            waited_s = time.monotonic() - began
        it.notes |= {"followed": followed, "then a line took ms": round(1000 * waited_s)}
        report(it.row())
        assert storm.exitcode == 0
        known = len(echod.events)
        echod.send(signal.SIGTERM)
        for client in clients:
            client.close()
        assert echod.exit_status() == 0
        later = [each["event"] for each in echod.events[known:]]
        assert later.count(event) <= 2, "the one under way and the one that was pending"
        assert len(echod.events_named("reload started")) <= len(echod.events_named("reload applied")) + 1
        assert followed >= 1
        it.assert_bystander_unaffected()


def test_a_stop_is_handled_at_once_during_a_storm() -> None:
    """During a storm of USR1, TERM begins a drain within a second, and a second TERM ends it."""
    with serving() as echod, connect(echod.port) as client:
        client.sendall(b"half a line")
        is_over = threading.Event()

        def storm() -> None:
            while not is_over.is_set():
                for _ in range(100):
                    echod.send(signal.SIGUSR1)

        sender = threading.Thread(target=storm)
        sender.start()
        try:
            time.sleep(1)  # the storm so far
            began = time.monotonic()
            echod.send(signal.SIGTERM)
            echod.wait_for("drain started")
            drained_s = time.monotonic() - began
            echod.send(signal.SIGTERM)
            assert echod.process.wait(DEADLINE_S) == 0
        finally:
            is_over.set()
            sender.join()
        assert drained_s < 1


def _send(pid: int, number: signal.Signals) -> None:
    end = time.monotonic() + STORM_S
    while time.monotonic() < end:
        for _ in range(100):
            os.kill(pid, number)
