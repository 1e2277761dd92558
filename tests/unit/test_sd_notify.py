"""Inherited sockets and notifications, with sockets and variables as a service manager makes them."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from echod.net import socket_activation
from echod.process import sd_notify
from echod.process.sd_notify import Notifier
from tests.support.daemon import DEADLINE_S

PID = 4711


@pytest.fixture
def notifier(manager: socket.socket) -> Iterator[Notifier]:
    """A notifier connected to that socket."""
    with closing(Notifier(manager.getsockname())) as notifier:
        yield notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The end of NOTIFY_SOCKET that a service manager reads."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.settimeout(DEADLINE_S)
        end.bind(str(tmp_path / "notify"))
        yield end


def test_no_sockets_without_the_variables() -> None:
    """Without a service manager there are no inherited sockets."""
    assert socket_activation.take_descriptors({"HOME": "/"}, PID) == ()


def test_sockets_of_another_process_are_not_taken() -> None:
    """Variables for another process are ignored and removed."""
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "HOME": "/"}
    assert socket_activation.take_descriptors(environment, PID) == ()
    assert environment == {"HOME": "/"}


def test_no_sockets_at_all_are_no_error() -> None:
    """LISTEN_FDS may be 0 or missing."""
    assert socket_activation.take_descriptors({"LISTEN_PID": str(PID), "LISTEN_FDS": "0"}, PID) == ()
    assert socket_activation.take_descriptors({"LISTEN_PID": str(PID)}, PID) == ()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(PID)}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_interval(environment: dict[str, str], expected: float | None) -> None:
    """WATCHDOG_USEC applies to the process that WATCHDOG_PID names, or to any process without it."""
    assert sd_notify.watchdog_s(environment, PID) == expected


def test_messages(manager: socket.socket, notifier: Notifier) -> None:
    """Each message has the format of sd_notify(3)."""
    notifier.ready("serving")
    notifier.status("2 connections")
    notifier.alive()
    notifier.stopping("draining")
    notifier.extend(3, "1 left")
    assert [manager.recv(1000) for _ in range(5)] == [
        b"READY=1\nSTATUS=serving",
        b"STATUS=2 connections",
        b"WATCHDOG=1",
        b"STOPPING=1\nSTATUS=draining",
        b"EXTEND_TIMEOUT_USEC=3000000\nSTATUS=1 left",
    ]


def test_a_reload_is_told_with_the_time(manager: socket.socket, notifier: Notifier) -> None:
    """MONOTONIC_USEC is the time of the reload."""
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    first, second = manager.recv(1000).decode().split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_an_abstract_socket() -> None:
    """A name that starts with @ is in the abstract namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"\0echod-test-{os.getpid()}")
        with closing(Notifier(f"@echod-test-{os.getpid()}")) as notifier:
            notifier.alive()
        assert end.recv(100) == b"WATCHDOG=1"


def test_nobody_to_tell_is_no_error(tmp_path: Path) -> None:
    """Without NOTIFY_SOCKET, or if nobody listens there, a message is discarded."""
    Notifier(None).ready("serving")
    with closing(Notifier(str(tmp_path / "nobody"))) as notifier:
        notifier.ready("serving")


def test_a_manager_that_is_stuck_delays_nobody(manager: socket.socket, notifier: Notifier) -> None:
    """A watchdog message is dropped instead of waiting; `ready` waits at most a second."""
    began = time.monotonic()
    for _ in range(5000):
        notifier.alive()
    assert time.monotonic() - began < DEADLINE_S / 4
    began = time.monotonic()
    notifier.ready("serving")
    assert time.monotonic() - began < DEADLINE_S / 4
    while manager.recv(1000) != b"WATCHDOG=1":
        pass


def test_ready_waits_for_a_busy_manager(manager: socket.socket, notifier: Notifier) -> None:
    """`ready` arrives once a busy service manager reads again."""
    for _ in range(5000):
        notifier.alive()
    heard: list[bytes] = []

    def listen() -> None:
        time.sleep(0.1)  # busy
        while (message := manager.recv(1000)) == b"WATCHDOG=1":
            pass
        heard.append(message)

    listening = threading.Thread(target=listen)
    listening.start()
    notifier.ready("serving")
    listening.join()
    assert heard == [b"READY=1\nSTATUS=serving"]
