"""`echod ping`: round trips over one connection, told one by one as ping(8) does; a new connection after every fault.

A reply that is late or wrong ends its connection, so it can't be taken for the next one's. Blocking sockets and no
event loop: a health check starts this every few hundred milliseconds.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

from echod import round_trips
from echod.address import TcpAddress, UnixAddress
from echod.round_trips import Plan, Tally

SocketAddress = tuple[Any, ...] | str
"""As the socket module has it: a path, or host, port and for IPv6 two more."""

REPLY_BYTES = 4096
"""How much longer than it should be a reply is read, to be shown."""


class LostError(Exception):
    """Why a round trip was not answered right."""


class UnknownHostError(Exception):
    """The name stands for no address."""


def ping(plan: Plan, write: Callable[[str], None], *, as_json: bool) -> bool:
    """Make the round trips, each told to `write` in a line as it ends; return whether all were answered right.

    Ctrl-C (KeyboardInterrupt) ends them early, and what was under way counts for nothing. Raises UnknownHostError.
    """
    tally = Tally()
    client = _Client(plan)
    if not as_json:
        write(f"PING {plan.target} ({client.addresses()[0]}) {plan.text_bytes} bytes of text.")
    start = time.monotonic()
    with suppress(KeyboardInterrupt):
        for sequence in _paced(plan):
            _one(client, sequence, tally, write, as_json=as_json)
    client.close()
    elapsed_s = time.monotonic() - start
    target = plan.target
    write(json.dumps(tally.as_fields(target, elapsed_s)) if as_json else tally.as_text(target, elapsed_s))
    return tally.is_all_right


def _paced(plan: Plan) -> Iterator[int]:
    """The numbers of the round trips, each when it is due; one that took longer than the interval delays the rest."""
    due = time.monotonic()
    for sequence in count(1) if plan.count is None else range(1, plan.count + 1):
        if (early_s := due - time.monotonic()) > 0:
            time.sleep(early_s)
        due = max(due, time.monotonic() - plan.interval_s) + plan.interval_s
        yield sequence


def _one(client: "_Client", sequence: int, tally: Tally, write: Callable[[str], None], *, as_json: bool) -> None:
    time_ns, fault = None, None
    try:
        time_ns = client.round_trip(sequence)
    except LostError as error:
        fault = str(error)
        client.close()
    tally.add(time_ns)
    if as_json:
        time_ms = None if time_ns is None else time_ns / 1e6
        write(json.dumps({"seq": sequence, "peer": client.peer, "time_ms": time_ms, "fault": fault}))
    elif time_ns is None:
        write(f"seq={sequence} {fault}")
    else:
        write(f"{client.plan.text_bytes + 1} bytes from {client.peer}: seq={sequence} time={time_ns / 1e6:.3f} ms")


class _Client:
    """One connection at a time to whom the plan names."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.peer: str | None = None
        self._socket: socket.socket | None = None

    def close(self) -> None:
        if self._socket:
            self._socket.close()
        self._socket = None

    def addresses(self) -> list[str]:
        """Where to connect to, each as a person writes it. Raises UnknownHostError."""
        return [_name(address) for _, address in _resolved(self.plan.target)]

    def round_trip(self, sequence: int) -> int:
        """Say something and wait for the reply; return the nanoseconds between. Raises LostError."""
        end = time.monotonic() + self.plan.wait_s
        said = round_trips.text(sequence, self.plan.text_bytes)
        connected = self._connected(end)
        try:
            start = time.perf_counter_ns()
            connected.settimeout(max(end - time.monotonic(), 0.001))
            connected.sendall(said.encode() + b"\n")
            reply = self._reply(connected, end)
            time_ns = time.perf_counter_ns() - start
        except TimeoutError:
            raise LostError(f"no reply from {self.peer} within {self.plan.wait_s:g} s") from None
        except OSError as error:
            raise LostError(f"{self.peer}: {_words(error)}") from error
        if fault := round_trips.fault(said, reply):
            raise LostError(f"{self.peer}: {fault}")
        return time_ns

    def _reply(self, connected: socket.socket, end: float) -> bytes:
        """All that came up to the chunk with the first LF."""
        reply = bytearray()
        longest = self.plan.text_bytes + REPLY_BYTES
        while len(reply) <= longest:
            connected.settimeout(max(end - time.monotonic(), 0.001))
            try:
                chunk = connected.recv(65536)
            except TimeoutError:
                if not reply:
                    raise
                raise LostError(
                    f"{self.peer}: reply not finished within {self.plan.wait_s:g} s: {round_trips.shown(bytes(reply))}"
                ) from None
            reply += chunk
            if not chunk:
                what = f"in the middle of a reply: {round_trips.shown(bytes(reply))}" if reply else "without a reply"
                raise LostError(f"{self.peer}: connection closed {what}")
            if b"\n" in chunk:
                break
        return bytes(reply)

    def _connected(self, end: float) -> socket.socket:
        """The connection there is, or a new one to the first address where somebody listens."""
        if self._socket:
            return self._socket
        faults = []
        try:
            resolved = _resolved(self.plan.target)
        except UnknownHostError as error:
            raise LostError(str(error)) from error
        for left, (family, address) in zip(range(len(resolved), 0, -1), resolved, strict=True):
            connecting = socket.socket(family)
            try:
                connecting.settimeout(max((end - time.monotonic()) / left, 0.001))
                connecting.connect(address)
            except OSError as error:
                connecting.close()
                faults.append(f"{_name(address)}: {_words(error)}")
            else:
                self._socket, self.peer = connecting, _name(address)
                return connecting
        raise LostError("; ".join(faults))


def _resolved(target: TcpAddress | UnixAddress) -> list[tuple[int, SocketAddress]]:
    """Every address that the target stands for, with its family, in the order to try them."""
    if isinstance(target, UnixAddress):
        return [(socket.AF_UNIX, target.path)]
    try:
        # As bytes, or Python would import its IDNA codec, though a name here is always ASCII.
        found = socket.getaddrinfo(target.host.encode(), target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnknownHostError(f"{target.host}: {_words(error)}") from error
    return [(family, address) for family, _, _, _, address in found]


def _name(address: SocketAddress) -> str:
    return f"unix:{address}" if isinstance(address, str) else str(TcpAddress(*address[:2]))


def _words(error: OSError) -> str:
    return "no connection in time" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
