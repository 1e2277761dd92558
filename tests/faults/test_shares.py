"""A greedy address, and many clients that hold memory: other clients are served."""

import contextlib
import signal
import socket
import time
from collections.abc import Callable

import pytest

from echod.config.schema import RESERVED_FILES
from echod.process.limits import allowed_open_files
from tests.faults.measurements import Figures, scene
from tests.support.daemon import DEADLINE_S, Daemon, ask, connect, read_to_end, serving, settings, settled

GREEDY, MODEST = "127.0.0.2", "127.0.0.3"
"""Addresses of clients."""

REJECTED = 300
TOLD = b"ERROR too many connections from your address\n"

HELD_BYTES = 4_000_000
NEVER_READERS = 150
LINE = "ΐ".encode() * 32_768 + b"\n"
"""The longest line, of a character whose upper case is three times as long."""


def _client(stack: contextlib.ExitStack, port: int, host: str, *, is_patient: bool = True) -> socket.socket:
    """Connect from this address; without patience the connection may still be in progress."""
    client = stack.enter_context(socket.socket())
    client.bind((host, 0))
    client.settimeout(DEADLINE_S if is_patient else 0)
    with contextlib.suppress(BlockingIOError):
        client.connect(("127.0.0.1", port))
    client.settimeout(DEADLINE_S)
    return client


@pytest.mark.timeout(120)
def test_rejected_clients_that_never_leave_do_not_block_others(report: Callable[[Figures], None]) -> None:
    """While one address exceeds its limit and closes nothing, another address is served at once."""
    # Descriptors remain for 32 rejected clients at once.
    flags = settings(limits_connections=allowed_open_files() - RESERVED_FILES - 2, limits_connections_per_address=5)
    with serving(*flags) as echod, contextlib.ExitStack() as clients:
        waited = []
        with scene("an address over its limit", echod) as it:
            greedy = [_client(clients, echod.port, GREEDY, is_patient=False) for _ in range(REJECTED)]
            for _ in range(10):
                began = time.monotonic()
                with contextlib.ExitStack() as one:
                    assert ask(_client(one, echod.port, MODEST), b"modest\n") == b"MODEST\n"
                waited.append(time.monotonic() - began)
        assert [read_to_end(client) for client in greedy[-20:]] == [TOLD] * 20, "the last ones hear why"
        it.notes |= {"clients saw": f"another address was served after {1000 * max(waited):.0f} ms at most"}
        report(it.row())
        assert max(waited) < 3.5, "a SYN that a busy machine drops is retried after 1 s, and again 2 s later"
        late = _client(clients, echod.port, MODEST)
        late.sendall(b"late\n")
        echod.send(signal.SIGTERM)
        assert read_to_end(late) == b"LATE\n", "a stop resets nobody, although rejected clients are there still"
        for client in greedy:
            client.close()
        late.close()
        assert echod.exit_status() == 0


@pytest.mark.timeout(120)
def test_memory_held_for_clients_is_bounded_in_total(report: Callable[[Figures], None]) -> None:
    """Clients that never read stay within limits.held_bytes together, and a bystander is served."""
    flags = settings(limits_held_bytes=HELD_BYTES, timeouts_write=60)
    with serving(*flags) as echod, contextlib.ExitStack() as clients:
        crowd = [_client(clients, echod.port, GREEDY) for _ in range(NEVER_READERS)]
        for client in crowd:
            client.setblocking(False)
        with scene("never-readers together", echod) as it:
            most = _held_at_most(echod, crowd)
            with connect(echod.port) as other:
                assert ask(other, b"still here\n") == b"STILL HERE\n"
        it.notes |= {"held": f"{most / 1e6:.1f} of {HELD_BYTES / 1e6:.1f} MB"}
        report(it.row())
        assert echod.events_named("memory limit exceeded")
        assert most < HELD_BYTES + 2 * 3 * len(LINE), "the reply that reached the limit, and next to nothing more"
        for client in crowd:
            client.close()
        assert settled(echod, 0)["held_bytes"] == 0


def _held_at_most(echod: Daemon, crowd: list[socket.socket]) -> int:
    """Send without reading for twice as long as it takes to exceed the limit; return the most bytes held."""
    sent = dict.fromkeys(crowd, 0)
    most, began, exceeded_at = 0, time.monotonic(), 0.0
    while not exceeded_at or time.monotonic() < exceeded_at + max(2.0, exceeded_at - began):
        assert time.monotonic() < began + DEADLINE_S, f"{most} bytes held"
        for client in crowd:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                sent[client] += client.send(LINE[sent[client] % len(LINE) :])
        held: int = echod.stats()["held_bytes"]
        most = max(most, held)
        if not exceeded_at and most > HELD_BYTES:
            exceeded_at = time.monotonic()
    return most
