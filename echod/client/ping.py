"""`echod ping`: round trips over one connection, told one by one as ping(8) does; a new connection after every fault.

A reply that is late or wrong ends its connection, so it can't be taken for the next one's. Blocking sockets and no
event loop: a health check starts this every few hundred milliseconds.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count

from echod.client import dial, probe
from echod.client.probe import Plan, Tally

REPLY_BYTES = 4096
"""How much longer than it should be a reply is read, to be shown."""


class LostError(Exception):
    """Why a round trip was not answered right."""


def ping(plan: Plan, write: Callable[[str], None], *, as_json: bool) -> bool:
    """Make the round trips, each told to `write` in a line as it ends; return whether all were answered right.

    Ctrl-C (KeyboardInterrupt) ends them early, and what was under way counts for nothing. Raises dial.UnknownHostError.
    """
    tally = Tally()
    client = _Client(plan)
    if not as_json:
        write(f"PING {plan.target} ({client.first}) {plan.text_bytes} bytes of text.")
    start = time.monotonic()
    with suppress(KeyboardInterrupt):
        for sequence in _paced(plan):
            time_ns, fault = client.round_trip(sequence)
            tally.add(time_ns)
            write((_fields if as_json else _line)(client, sequence, time_ns, fault))
    client.close()
    elapsed_s = time.monotonic() - start
    if as_json:
        write(_json(tally.as_fields(plan.target, elapsed_s)))
    else:
        write(tally.as_text(plan.target, elapsed_s))
    return tally.is_all_right


def _paced(plan: Plan) -> Iterator[int]:
    """The numbers of the round trips, each when it is due; one that took longer than the interval delays the rest."""
    due = time.monotonic()
    for sequence in count(1) if plan.rounds is None else range(1, plan.rounds + 1):
        if (early_s := due - time.monotonic()) > 0:
            time.sleep(early_s)
        due = max(due, time.monotonic() - plan.interval_s) + plan.interval_s
        yield sequence


def _line(client: "_Client", sequence: int, time_ns: int | None, fault: str) -> str:
    if time_ns is None:
        return f"seq={sequence} {fault}"
    size, note = client.plan.text_bytes + 1, f" ({client.note})" if client.note else ""
    return f"{size} bytes from {client.peer}: seq={sequence} time={time_ns / 1e6:.3f} ms{note}"


def _fields(client: "_Client", sequence: int, time_ns: int | None, fault: str) -> str:
    fields = {
        "seq": sequence,
        "peer": client.peer,
        "connection": client.connections,
        "time_ms": None if time_ns is None else time_ns / 1e6,
        "fault": fault or None,
    }
    return _json(fields)


def _json(fields: object) -> str:
    import json

    return json.dumps(fields)


class _Client:
    """One connection at a time to whom the plan names. Raises dial.UnknownHostError."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.peer: str | None = None
        self.connections = 0
        self.note = ""
        self._socket: socket.socket | None = None
        self._resolved = dial.resolve(plan.target, plan.wait_s)
        self.first = dial.name(self._resolved[0][1])

    def close(self) -> None:
        if self._socket:
            self._socket.close()
        self._socket = None

    def round_trip(self, sequence: int) -> tuple[int | None, str]:
        """Say something and wait for the reply: the nanoseconds between, or None and why it was not answered right."""
        try:
            return self._asked(probe.text(sequence, self.plan.text_bytes)), ""
        except TimeoutError:
            fault = f"{self.peer}: no reply within {self.plan.wait_s:g} s"
        except OSError as error:
            fault = f"{self.peer}: {dial.words(error)}"
        except LostError as error:
            fault = str(error)
        self.close()
        return None, fault

    def _asked(self, text: str) -> int:
        end = time.monotonic() + self.plan.wait_s
        connected = self._connected(end)
        connected.settimeout(dial.left_s(end))
        line = text.encode() + b"\n"
        start = time.perf_counter_ns()
        with suppress(BrokenPipeError, ConnectionResetError):  # why, it may have said before: read that
            connected.sendall(line)
        reply = self._reply(connected, end)
        time_ns = time.perf_counter_ns() - start
        if fault := probe.mismatch(text, reply):
            raise LostError(f"{self.peer}: {fault}")
        return time_ns

    def _reply(self, connected: socket.socket, end: float) -> bytes:
        """All that came up to the chunk with the first LF."""
        reply = bytearray()
        while len(reply) <= self.plan.text_bytes + REPLY_BYTES:
            connected.settimeout(dial.left_s(end))
            try:
                chunk = connected.recv(65536)
            except TimeoutError:
                if not reply:
                    raise
                wait_s, begun = self.plan.wait_s, probe.shown(bytes(reply))
                raise LostError(f"{self.peer}: reply not finished within {wait_s:g} s: {begun}") from None
            if not chunk:
                what = f"in the middle of a reply: {probe.shown(bytes(reply))}" if reply else "without a reply"
                raise LostError(f"{self.peer}: connection closed {what}")
            reply += chunk
            if b"\n" in chunk:
                break
        return bytes(reply)

    def _connected(self, end: float) -> socket.socket:
        """The connection there is, or a new one."""
        said = self._said_meanwhile()
        if self._socket:
            return self._socket
        if self.connections:
            self.note = f"new connection, told {said}" if said else "new connection"
        found = self._resolved or self._resolved_again(end)
        self._resolved = []
        try:
            self._socket, address = dial.connect(found, end)
        except dial.UnreachableError as error:
            raise LostError(str(error)) from error
        self.peer = dial.name(address)
        self.connections += 1
        return self._socket

    def _said_meanwhile(self) -> str:
        """What an idle connection was told before the server closed it, as it may; anything else is a fault."""
        self.note = ""
        if not self._socket:
            return ""
        try:
            self._socket.settimeout(0)
            said = self._socket.recv(REPLY_BYTES)
        except BlockingIOError:
            return ""
        except OSError:
            said = b""
        if said and not probe.is_error(said):
            raise LostError(f"{self.peer}: said unasked: {probe.shown(said)}")
        self.close()
        return probe.shown(said) if said else ""

    def _resolved_again(self, end: float) -> dial.Found:
        """The name may stand for another address by now."""
        try:
            return dial.resolve(self.plan.target, dial.left_s(end))
        except dial.UnknownHostError as error:
            raise LostError(str(error)) from error
