"""Clients from the start of their TLS handshake to its end.

A handshake costs up to a millisecond of CPU time. Each part of one is a step of the scheduler, so a flood of them gets
a bounded share of each iteration of the event loop. Owns the descriptors meanwhile; whether a client is admitted is
decided elsewhere.
"""

import asyncio
from collections.abc import Callable

from echod.net import sockets
from echod.server.arrival import Arrival
from echod.server.scheduler import Scheduler
from echod.server.tls_stream import HandshakeError, TlsStream

UNREAD_WAIT_S = 0.1
"""How long a late handshake is extended while its input is unread: that delay is ours and not the client's."""

OnEnd = Callable[["TlsHandshake", str], None]
"""Handles the end of a handshake; the text is why it failed, or empty."""


class TlsHandshake:
    """One handshake; `on_end` is called once."""

    __slots__ = ("_is_ended", "_is_reading", "_is_writing", "_on_end", "_scheduler", "_timer", "arrival", "stream")

    def __init__(self, arrival: Arrival, scheduler: Scheduler, timeout_s: float, on_end: OnEnd) -> None:
        """`timeout_s` is 0 for no timeout."""
        assert arrival.settings.tls
        self.arrival = arrival
        self.stream = TlsStream(arrival.descriptor, arrival.settings.tls.context)
        self._scheduler = scheduler
        self._on_end = on_end
        self._is_ended = self._is_reading = self._is_writing = False
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(timeout_s, self._time_out, timeout_s) if timeout_s else None
        scheduler.add(self)

    def take_step(self) -> bool:
        """Go on with the handshake as far as the client's input allows (Worker)."""
        if self._is_ended:
            return False
        try:
            self.stream.handshake()
        except BlockingIOError:
            self._wait()
        except HandshakeError as error:
            self.fail(str(error))
        else:
            self._end("")
        return False

    def fail(self, why: str) -> None:
        """Give the handshake up."""
        if not self._is_ended:
            self._end(why)

    def _wait(self) -> None:
        loop, descriptor = asyncio.get_running_loop(), self.arrival.descriptor
        if self.stream.wants_room:
            loop.add_writer(descriptor, self._go_on)
            self._is_writing = True
        else:
            loop.add_reader(descriptor, self._go_on)
            self._is_reading = True

    def _go_on(self) -> None:
        self._stop_waiting()
        self._scheduler.add(self)

    def _stop_waiting(self) -> None:
        loop, descriptor = asyncio.get_running_loop(), self.arrival.descriptor
        if self._is_reading:
            loop.remove_reader(descriptor)
        if self._is_writing:
            loop.remove_writer(descriptor)
        self._is_reading = self._is_writing = False

    def _time_out(self, timeout_s: float) -> None:
        if sockets.unread_bytes(self.arrival.descriptor):
            self._timer = asyncio.get_running_loop().call_later(UNREAD_WAIT_S, self._time_out, timeout_s)
        else:
            self.fail(f"not finished within {timeout_s:g} s")

    def _end(self, why: str) -> None:
        self._is_ended = True
        self._stop_waiting()
        if self._timer:
            self._timer.cancel()
        self._on_end(self, why)
