"""A well-behaved client in a separate process, which measures what a fault does to other users.

Run as a module, it sends lines and checks each reply. For every line on standard input it prints the figures since the
last one as JSON. A wrong reply, a reset or an end of stream ends it with a traceback.
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.daemon import DEADLINE_S, UNMEASURED, clean_environment, read_line

PAUSE_S = 0.002
"""Pause between two lines: about 400 lines a second, little load."""


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Round-trip times within a period, in milliseconds."""

    count: int
    p50_ms: float
    p99_ms: float
    max_ms: float


class Bystander:
    """Sends lines all the time; `figures` returns the round trips since the last call."""

    def __init__(self, port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.bystander", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment() | UNMEASURED,
        )
        self.figures()  # returns once it has had its first round trips

    def figures(self) -> RoundTrips:
        """Return the round trips since the last call; raise AssertionError if the client has failed."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], DEADLINE_S)[0], "the bystander hangs"
        answer = self._process.stdout.readline()
        assert answer, "the bystander has failed: see its traceback"
        return RoundTrips(**json.loads(answer))

    def leave(self) -> None:
        """End the client; raise AssertionError if it has failed."""
        self._process.communicate("", DEADLINE_S)
        assert self._process.returncode == 0, "the bystander has failed: see its traceback"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def bystanding(port: int) -> Iterator[Bystander]:
    """Run a bystander, and assert at the end that it has not failed."""
    bystander = Bystander(port)
    try:
        yield bystander
        bystander.leave()
    except BaseException:
        bystander.kill()
        raise


def _talk(port: int) -> None:
    trips: list[float] = []
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(sys.maxsize):
            began = time.perf_counter()
            client.sendall(b"bystander %d\n" % number)
            reply = read_line(client) if number < 100 else client.recv(100)
            trips.append(time.perf_counter() - began)
            assert reply == b"BYSTANDER %d\n" % number, reply
            if select.select([0], [], [], PAUSE_S)[0]:
                if not os.read(0, 1):
                    return
                os.write(1, json.dumps(_summary(sorted(trips))).encode() + b"\n")
                trips.clear()


def _summary(trips: list[float]) -> dict[str, float]:
    ms = [round(trip * 1000, 3) for trip in trips]
    return {"count": len(ms), "p50_ms": ms[len(ms) // 2], "p99_ms": ms[len(ms) * 99 // 100], "max_ms": ms[-1]}


if __name__ == "__main__":
    _talk(int(sys.argv[1]))
