"""Floods of the admin endpoint, which strangers may reach where it is on TCP."""

import contextlib
import multiprocessing
import socket
import time
from collections.abc import Callable

import pytest

from tests.daemon import Daemon, connect, serving
from tests.faults.scene import Figures, scene

FLOOD_S = 4.0
WAVE = 300
ASKING = b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "sent", "probe_s"), [("silent", b"", 4.0), ("asking", ASKING, 15.0)])
def test_a_flood_of_the_endpoint(name: str, sent: bytes, probe_s: float, report: Callable[[Figures], None]) -> None:
    """A thousand connections a second: clients are served, and a probe is answered before a silent one's time is over.

    Who asks costs more than who is silent, and the endpoint's share of the loop is bounded: a probe waits its turn.
    """
    with serving("--set", "admin.listen=127.0.0.1:0") as echod:
        port = int(echod.wait_for("admin endpoint")["listen"][0].rpartition(":")[2])
        flood = multiprocessing.get_context("spawn").Process(target=_flood, args=(port, sent))
        flood.start()
        with scene(f"a flood of the admin endpoint, {name}", echod) as it:
            probes = []
            while flood.is_alive():
                probes.append(_probe_s(port))
                time.sleep(0.1)  # the interval of the probes
            flood.join()
        it.notes |= {"slowest probe s": round(max(probes), 3), "open clients": _open(echod)}
        report(it.row())
        assert flood.exitcode == 0
        assert max(probes) < probe_s
        assert it.peak_descriptors <= it.usage_before.descriptors + 12
        it.assert_bystander_unaffected()


def _probe_s(port: int) -> float:
    """How long a health check takes; retried, as those that matter are."""
    began = time.monotonic()
    received = b""
    while not received and time.monotonic() - began < 10:
        with connect(port) as client, contextlib.suppress(ConnectionError):
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            received = client.recv(100)
    assert received.startswith(b"HTTP/1.1 200 "), received
    return time.monotonic() - began


def _open(echod: Daemon) -> int:
    count: int = echod.stats()["connections"]["open"]
    return count


def _flood(port: int, sent: bytes) -> None:
    """WAVE connections at once, and as many again a moment later: a thousand a second."""
    end = time.monotonic() + FLOOD_S
    while time.monotonic() < end:
        with contextlib.ExitStack() as wave:
            clients = [wave.enter_context(socket.socket()) for _ in range(WAVE)]
            for client in clients:
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(sent)
            time.sleep(WAVE / 1000)  # the rate of the flood
