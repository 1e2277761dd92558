"""`echod ping`: round trips over one connection, reported as by ping(8), with a new connection after each error.

A late or wrong reply ends its connection, so that it cannot be mistaken for the next reply. Sockets block and there is
no event loop, because a health check starts this every few hundred milliseconds.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING

from echod.client import dial, probe
from echod.client.probe import Plan, Tally

if TYPE_CHECKING:
    from echod.client.tls import Dialer, Session

REPLY_BYTES = 4096
"""How many bytes are read beyond the expected reply, to be shown."""


class LostError(Exception):
    """A round trip had no correct reply; the message says why."""


def ping(plan: Plan, write: Callable[[str], None], *, as_json: bool) -> bool:
    """Make the round trips and pass a line about each to `write`; return whether every reply was correct.

    KeyboardInterrupt (Ctrl-C) ends them early; an unfinished round trip is not counted. Raise dial.UnknownHostError and
    dial.UnusableFileError.
    """
    tally = Tally()
    client = _Client(plan)
    if not as_json:
        write(f"PING {plan.target} ({client.first}) {plan.text_bytes} bytes of text.")
    start = time.monotonic()
    with suppress(KeyboardInterrupt):
        for sequence in _paced(plan):
            time_ns, error_text = client.round_trip(sequence)
            tally.add(time_ns)
            write((_fields if as_json else _line)(client, sequence, time_ns, error_text))
    client.close()
    elapsed_s = time.monotonic() - start
    session = client.session
    if as_json:
        tls = {"tls": session and session.as_fields()} if plan.tls else {}
        write(_json({**tally.as_fields(plan.target, elapsed_s), **tls}))
    else:
        write(tally.as_text(plan.target, elapsed_s) + (f"\n{session.as_text()}" if session else ""))
    return tally.is_all_right


def _paced(plan: Plan) -> Iterator[int]:
    """Yield the number of each round trip when it is due; one that takes longer than the interval delays the rest."""
    due = time.monotonic()
    for sequence in count(1) if plan.rounds is None else range(1, plan.rounds + 1):
        if (early_s := due - time.monotonic()) > 0:
            time.sleep(early_s)
        due = max(due, time.monotonic() - plan.interval_s) + plan.interval_s
        yield sequence


def _line(client: "_Client", sequence: int, time_ns: int | None, error_text: str) -> str:
    if time_ns is None:
        return f"seq={sequence} {error_text}"
    size, note = client.plan.text_bytes + 1, f" ({client.note})" if client.note else ""
    return f"{size} bytes from {client.peer}: seq={sequence} time={time_ns / 1e6:.3f} ms{note}"


def _fields(client: "_Client", sequence: int, time_ns: int | None, error_text: str) -> str:
    fields = {
        "seq": sequence,
        "peer": client.peer,
        "connection": client.connections,
        "time_ms": None if time_ns is None else time_ns / 1e6,
        "fault": error_text or None,
    }
    return _json(fields)


def _json(fields: object) -> str:
    import json

    return json.dumps(fields)


def _tls_dialer(plan: Plan) -> "Dialer | None":
    if not plan.tls:
        return None
    from echod.client.tls import Dialer  # imports ssl (10 ms)

    return Dialer(plan.tls)


class _Client:
    """Connects to the plan's target, with one connection at a time.

    Raises dial.UnknownHostError, and with TLS dial.UnusableFileError.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.peer: str | None = None
        self.connections = 0
        self.note = ""
        self.session: Session | None = None
        """What the latest TLS handshake has negotiated."""
        self._tls = _tls_dialer(plan)
        self._socket: socket.socket | None = None
        self._has_reply = False  # on this connection
        self._resolved = dial.resolve(plan.target, plan.wait_s)
        self.first = dial.name(self._resolved[0][1])

    def close(self) -> None:
        if self._socket:
            self._socket.close()
        self._socket = None

    def round_trip(self, sequence: int) -> tuple[int | None, str]:
        """Send a text and wait for the reply; return the time in ns and "", or None and what went wrong."""
        try:
            return self._asked(probe.text(sequence, self.plan.text_bytes)), ""
        except TimeoutError:
            error_text = f"{self.peer}: no reply within {self.plan.wait_s:g} s"
        except OSError as error:
            hint = self._hint if isinstance(error, ConnectionResetError) else ""
            error_text = f"{self.peer}: {dial.words(error)}{hint}"
        except LostError as error:
            error_text = str(error)
        self.close()
        return None, error_text

    def _asked(self, text: str) -> int:
        end = time.monotonic() + self.plan.wait_s
        connected = self._connected(end)
        connected.settimeout(dial.left_s(end))
        line = text.encode() + b"\n"
        start = time.perf_counter_ns()
        with suppress(BrokenPipeError, ConnectionResetError):  # the server may have sent an error line before: read it
            connected.sendall(line)
        reply = self._reply(connected, end)
        time_ns = time.perf_counter_ns() - start
        if wrong := probe.mismatch(text, reply):
            raise LostError(f"{self.peer}: {wrong}")
        self._has_reply = True
        return time_ns

    def _reply(self, connected: socket.socket, end: float) -> bytes:
        """Return everything received up to and including the chunk with the first LF."""
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
                what = (
                    f"in the middle of a reply: {probe.shown(bytes(reply))}"
                    if reply
                    else f"without a reply{self._hint}"
                )
                raise LostError(f"{self.peer}: connection closed {what}")
            reply += chunk
            if b"\n" in chunk or probe.is_tls(reply):
                break
        return bytes(reply)

    @property
    def _hint(self) -> str:
        """What to try if the connection has ended and has never carried a reply: OpenSSL closes on plain text."""
        return "" if self.plan.tls or self._has_reply else "; if the server expects TLS, use --tls"

    def _connected(self, end: float) -> socket.socket:
        """Return the open connection, or a new one."""
        error_line = self._check_idle()
        if self._socket:
            return self._socket
        if self.connections:
            self.note = f"new connection after {error_line}" if error_line else "new connection"
        found = self._resolved or self._resolved_again(end)
        self._resolved = []
        try:
            connected, address = dial.connect(found, end)
        except dial.UnreachableError as error:
            raise LostError(str(error)) from error
        self.peer = dial.name(address)
        if self._tls:
            connected, self.session = self._tls.handshake(connected, end)
        self._socket = connected
        self._has_reply = False
        self.connections += 1
        return connected

    def _check_idle(self) -> str:
        """Drop the connection if the server has closed it; return its error line, if any.

        A server may close an idle connection. Raise LostError for any other data.
        """
        self.note = ""
        if not self._socket:
            return ""
        try:
            self._socket.settimeout(0)
            received = self._socket.recv(REPLY_BYTES)
        except BlockingIOError:
            return ""
        except OSError:
            received = b""
        if received and not probe.is_error(received):
            raise LostError(f"{self.peer}: unexpected data: {probe.shown(received)}")
        self.close()
        return probe.shown(received) if received else ""

    def _resolved_again(self, end: float) -> dial.Found:
        """Resolve the target again, because a name may have another address by now."""
        try:
            return dial.resolve(self.plan.target, dial.left_s(end))
        except dial.UnknownHostError as error:
            raise LostError(str(error)) from error
