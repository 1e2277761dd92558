"""One client: its transport, its protocol, and how it ends.

The way of a line through here is `buffer_updated` alone: no task, no timer, no log call and no look at the clock.
Time is the business of `tend` and `settle`, which the owner calls now and then: they compare what they see with what
they saw before, so a timeout is at most two of those intervals late and never early. Other connections, signals and
the server are not known here; the end is told through `on_closed`.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from echod import sockets
from echod.config import Timeouts
from echod.protocol import Echo, error_line

LINGER_S = 1.0
"""How long to read on after a half-close for the client's end of stream: closing on unread input would reset it."""

# libuv reads into it and calls `buffer_updated` in one go, so all connections of the process can share it; 64 KiB
# bound what one read brings, where the loop's own buffer of 256 000 bytes would multiply by the clients that stall.
_chunk = memoryview(bytearray(65_536))


class Connection(asyncio.BufferedProtocol):
    """Echoes one client's lines until either side ends; `reason` then says why, in the words of the statistics."""

    __slots__ = (
        "_awaits_acknowledgement",
        "_descriptor",
        "_echo",
        "_family",
        "_farewell",
        "_is_aborted",
        "_line_since",
        "_linger",
        "_on_closed",
        "_owed",
        "_peer",
        "_quiet_since",
        "_seen_in",
        "_seen_lines",
        "_taken",
        "_taken_since",
        "_transport",
        "bytes_in",
        "bytes_out",
        "opened_at",
        "reason",
        "unacknowledged_bytes",
    )

    def __init__(
        self,
        sock: socket.socket,
        peer: sockets.SockAddr,
        line_bytes: int,
        now: float,
        on_closed: Callable[["Connection"], None],
    ) -> None:
        self._transport: asyncio.Transport | None = None
        self._echo = Echo(line_bytes)
        self._family = sock.family
        self._peer = peer
        self._descriptor = sock.fileno()
        self._on_closed = on_closed
        # What `connection_made` has to send if the end was decided before; None: abort.
        self._farewell: bytes | None = b""
        self._linger: asyncio.TimerHandle | None = None
        self._awaits_acknowledgement = False
        self._is_aborted = False
        self.opened_at = now
        self.bytes_in = 0
        self.bytes_out = 0
        self.unacknowledged_bytes = 0
        self.reason: str | None = None
        # What the last look saw, and since when it has been so.
        self._seen_in = self._seen_lines = self._owed = self._taken = 0
        self._quiet_since = self._taken_since = now
        self._line_since: float | None = None

    # -- what others ask -------------------------------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """The client's address."""
        return sockets.peer_name(self._family, self._peer)

    @property
    def host(self) -> str | None:
        """The client's IP address alone, None for a Unix socket."""
        return self._peer[0] if isinstance(self._peer, tuple) else None

    @property
    def lines(self) -> int:
        """Messages answered."""
        return self._echo.answered

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that the kernel has not taken yet: the client is owed them."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    def limit_lines(self, line_bytes: int) -> None:
        """Put a new limit of line length in force, for the line begun too."""
        self._echo.line_bytes = line_bytes

    # -- the way of a line -----------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (asyncio's signature)
        """Where the loop is to put what it reads (asyncio.BufferedProtocol)."""
        return _chunk

    def buffer_updated(self, nbytes: int) -> None:
        """Answer what has arrived (asyncio.BufferedProtocol)."""
        if self.reason is not None:
            return  # after the half-close: read on to the end of the stream, answer nothing
        self.bytes_in += nbytes
        replies = self._echo.receive(_chunk[:nbytes].tobytes())
        if replies:
            self.bytes_out += len(replies)
            self._transport.write(replies)  # type: ignore[union-attr]
            if self._echo.fault:
                self.finish(self._echo.fault.value)

    def pause_writing(self) -> None:
        """Read no more from a client that doesn't take its replies (asyncio.Protocol)."""
        if self._transport:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on: the kernel has taken every reply (asyncio.Protocol)."""
        if not self._transport:
            return
        if self.reason != "client":  # whose end of stream would be read a second time
            self._transport.resume_reading()
        if self.reason is not None:
            self._start_linger()

    # -- beginning and end -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin (asyncio.Protocol), or end what was ended before it began."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        self._transport = transport
        # No buffer of our own: `pause_writing` then means exactly that the kernel took less than it was given.
        transport.set_write_buffer_limits(high=0)
        if self._farewell is None:
            transport.abort()
        elif self.reason is not None:
            self._half_close(self._farewell)

    def eof_received(self) -> bool:
        """Answer an unterminated last line and end, as the client did (asyncio.Protocol)."""
        assert self._transport
        if self.reason is None:
            replies = self._echo.finish()
            self.reason = self._echo.fault.value if self._echo.fault else "client"
            self.bytes_out += len(replies)
            self._transport.write(replies)
            if self._awaits_acknowledgement:
                self._half_close()
                return True
        self._transport.close()
        return True

    def finish(self, reason: str, error: str = "") -> None:
        """End in good order: send what is owed and the `error`, half-close, read to the end of the stream, close."""
        if self.reason is not None:
            return
        self.reason = reason
        farewell = error_line(error) if error else b""
        if self._transport:
            self._half_close(farewell)
        else:
            self._farewell = farewell

    def cut_off(self, reason: str) -> None:
        """End now; what the kernel has not taken is lost to the client."""
        if not self._is_aborted:
            self.bytes_out -= self.unsent_bytes
            self.reason = reason
            self._abort()

    def end_now(self) -> None:
        """End now, cutting the client off if it is owed a reply still, be it to a line that has not been read yet."""
        if self.unsent_bytes or (self.reason is None and self._unread_bytes()):
            self.cut_off("cut")
        else:
            self.reason = self.reason or "drained"
            self._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, however it came (asyncio.Protocol)."""
        if self.reason is None or (exc and self.reason == "client"):
            self.reason = "reset"
        if self._linger:
            self._linger.cancel()
        self._transport = self._linger = None
        self._on_closed(self)

    def _half_close(self, farewell: bytes = b"") -> None:
        assert self._transport
        if self._transport.is_closing():
            return
        self.bytes_out += len(farewell)
        self._transport.write(farewell)
        self._transport.write_eof()
        if not self.unsent_bytes:
            self._start_linger()

    def _start_linger(self) -> None:
        if not self._linger:
            self._linger = asyncio.get_running_loop().call_later(LINGER_S, self._give_up)

    def _give_up(self) -> None:
        self._measure(0.0)
        self.unacknowledged_bytes = max(0, self._owed - 1)  # the FIN counts as one
        self._abort()

    def _abort(self) -> None:
        self._is_aborted = True
        if self._transport:
            self._transport.abort()
        else:
            self._farewell = None

    # -- time ------------------------------------------------------------------------------------------------------

    def tend(self, now: float, timeouts: Timeouts) -> None:
        """End the connection if a timeout is over; to be called again and again while serving."""
        self._look(now)
        if timeouts.write and self._owed and now - self._taken_since >= timeouts.write:
            sockets.reset_on_close(self._descriptor)
            self.cut_off("write timeout")
        elif self.reason is not None:
            return
        elif timeouts.line and self._line_since is not None and now - self._line_since >= timeouts.line:
            self._time_out("line timeout", f"line not finished within {timeouts.line:.15g} s")
        elif timeouts.idle and now - self._quiet_since >= timeouts.idle:
            self._time_out("idle", f"idle for {timeouts.idle:.15g} s")

    def _time_out(self, reason: str, error: str) -> None:
        # What has arrived and waits for us, as after a pause of the whole process, is not the client's delay: it is
        # read before the next look.
        if not self._unread_bytes():
            self.finish(reason, error)

    def start_draining(self, now: float) -> None:
        """Count the quiet of `settle` from now on, and see each reply acknowledged before closing."""
        self._quiet_since = now
        self._awaits_acknowledgement = True

    def settle(self, now: float, quiet_s: float) -> None:
        """Finish the connection if it has been quiet for so long; to be called after each `tend` while draining."""
        if self.reason == "client" and self._transport and not self._owed:
            self._transport.close()
        elif self.reason is None and now - self._quiet_since >= quiet_s and self._is_settled():
            self.finish("drained")

    def end_at_line_boundary(self) -> None:
        """End a drain that takes too long: a line begun is owed nothing, replies that the kernel hasn't taken are."""
        if self.unsent_bytes:
            self.cut_off("cut")
        else:
            self.finish("drained")

    def _is_settled(self) -> bool:
        return not (self._echo.unfinished_bytes or self._owed or self._unread_bytes())

    def _look(self, now: float) -> None:
        is_heard = self.bytes_in != self._seen_in
        if is_heard or self._owed or self.reason is not None:
            self._measure(now)
        is_in_line = self._echo.unfinished_bytes > 0
        if not is_in_line:
            self._line_since = None
        elif self._line_since is None or self._echo.answered != self._seen_lines or self.unsent_bytes:
            self._line_since = now  # with replies unsent the rest of the line isn't even read
        if is_heard or is_in_line or self._owed:
            self._quiet_since = now
        self._seen_in = self.bytes_in
        self._seen_lines = self._echo.answered

    def _measure(self, now: float) -> None:
        """See what the client's kernel has not acknowledged (TCP), or ours not taken (Unix), and since when."""
        queued = sockets.unacknowledged_bytes(self._descriptor) if self._transport else 0
        owed = self.unsent_bytes if self._family == socket.AF_UNIX else self.unsent_bytes + queued
        taken = self.bytes_out - self.unsent_bytes - queued
        if taken != self._taken or not self._owed:
            self._taken = taken
            self._taken_since = now
        self._owed = owed

    def _unread_bytes(self) -> int:
        return sockets.unread_bytes(self._descriptor) if self._transport else 0
