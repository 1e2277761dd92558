"""One client: its transport, its protocol, and how it ends.

The way of a line through here is `buffer_updated` alone: no task, no timer, no log call and no look at the clock.
Time is the business of `tend` and `settle`, which the owner calls now and then: a timeout is at most two of those
intervals late and never early. Other connections, signals and the server are not known here; the end is told through
`on_closed`.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from echod import sockets
from echod.config import Timeouts
from echod.pace import Pace
from echod.protocol import Echo, error_line

CHUNK_BYTES = 65_536
"""The most that one read brings; the loop's own buffer of 256 000 bytes would multiply by the clients that stall."""

LEAST_CHUNK_BYTES = 16_384
"""The least that a read may bring, however long the line is that it goes on with."""

# libuv reads into it and calls `buffer_updated` in one go, so all connections of the process can share it.
_chunk = memoryview(bytearray(CHUNK_BYTES))


class Connection(asyncio.BufferedProtocol):
    """Echoes one client's lines until either side ends; `reason` then says why, in the words of the statistics."""

    __slots__ = (
        "_awaits_acknowledgement",
        "_descriptor",
        "_echo",
        "_family",
        "_farewell",
        "_is_aborted",
        "_linger",
        "_on_closed",
        "_pace",
        "_peer",
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
        self._pace = Pace(now)
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

    @property
    def held_bytes(self) -> int:
        """Memory that the client makes us use: the line begun and the replies that the kernel has not taken yet."""
        return self._echo.unfinished_bytes + self.unsent_bytes

    def limit_lines(self, line_bytes: int) -> None:
        """Put a new limit of line length in force, for the line begun too."""
        self._echo.line_bytes = line_bytes

    # -- the way of a line -----------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (asyncio's signature)
        """Where the loop is to put what it reads (asyncio.BufferedProtocol); less of it after a line begun.

        So one client makes us hold three times (upper-casing can triple UTF-8) 64 KiB and the least chunk at most.
        """
        begun = self._echo.unfinished_bytes
        return _chunk[: max(CHUNK_BYTES - begun, LEAST_CHUNK_BYTES)] if begun else _chunk

    def buffer_updated(self, nbytes: int) -> None:
        """Answer what has arrived (asyncio.BufferedProtocol)."""
        replies = b""
        if self.reason is None:  # after the half-close: read on to the end of the stream, answer nothing
            self.bytes_in += nbytes
            replies = self._echo.receive(_chunk[:nbytes].tobytes())
        if replies:
            self.bytes_out += len(replies)
            self._transport.write(replies)  # type: ignore[union-attr]
            if self._echo.fault:
                self.finish(self._echo.fault.value)
        if nbytes >= LEAST_CHUNK_BYTES:
            # Others come first: libuv would read from this client up to 32 times in a row.
            self._transport.pause_reading()  # type: ignore[union-attr]
            asyncio.get_running_loop().call_soon(self._read_on)

    def pause_writing(self) -> None:
        """Read no more from a client that doesn't take its replies (asyncio.Protocol)."""
        if self._transport:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on: the kernel has taken every reply (asyncio.Protocol)."""
        self._read_on()
        if self._transport and self.reason is not None:
            self._start_linger()

    def _read_on(self) -> None:  # if replies are unsent `resume_writing` comes; an end of stream is read once
        if self._transport and not self.unsent_bytes and self.reason != "client":
            self._transport.resume_reading()

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
            self._linger = asyncio.get_running_loop().call_later(sockets.LINGER_S, self._give_up)

    def _give_up(self) -> None:
        self._measure(0.0)
        self.unacknowledged_bytes = max(0, self._pace.owed - 1)  # the FIN counts as one
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
        pace = self._pace
        if timeouts.write and pace.owed and now - pace.taken_since >= timeouts.write:
            sockets.reset_on_close(self._descriptor)
            self.cut_off("write timeout")
        elif self.reason is not None:
            return
        elif timeouts.line and pace.line_since is not None and now - pace.line_since >= timeouts.line:
            self._time_out("line timeout", f"line not finished within {timeouts.line:.15g} s")
        elif timeouts.idle and now - pace.quiet_since >= timeouts.idle:
            self._time_out("idle", f"idle for {timeouts.idle:.15g} s")

    def _time_out(self, reason: str, error: str) -> None:
        # What has arrived and waits for us, as after a pause of the whole process, is not the client's delay: it is
        # read before the next look.
        if not self._unread_bytes():
            self.finish(reason, error)

    def start_draining(self, now: float) -> None:
        """Count the quiet of `settle` from now on, and see each reply acknowledged before closing."""
        self._pace.quiet_since = now
        self._awaits_acknowledgement = True

    def settle(self, now: float, quiet_s: float) -> None:
        """Finish the connection if it has been quiet for so long; to be called after each `tend` while draining."""
        if self.reason == "client" and self._transport and not self._pace.owed:
            self._transport.close()
        elif self.reason is None and now - self._pace.quiet_since >= quiet_s and self._is_settled():
            self.finish("drained")

    def end_at_line_boundary(self) -> None:
        """End a drain that takes too long: a line begun is owed nothing, replies that the kernel hasn't taken are."""
        if self.unsent_bytes:
            self.cut_off("cut")
        else:
            self.finish("drained")

    def _is_settled(self) -> bool:
        return not (self._echo.unfinished_bytes or self._pace.owed or self._unread_bytes())

    def _look(self, now: float) -> None:
        pace = self._pace
        if pace.owed or self.reason is not None or pace.is_news(self.bytes_in):
            self._measure(now)
        # With replies unsent the rest of a line isn't even read.
        is_in_line, is_unread = self._echo.unfinished_bytes > 0, self.unsent_bytes > 0
        pace.look(now, self.bytes_in, self._echo.answered, is_in_line=is_in_line, is_unread=is_unread)

    def _measure(self, now: float) -> None:
        """See what the client's kernel has not acknowledged (TCP), or ours not taken (Unix)."""
        unsent = self.unsent_bytes
        queued = sockets.unacknowledged_bytes(self._descriptor) if self._transport else 0
        owed = unsent if self._family == socket.AF_UNIX else unsent + queued
        self._pace.measure(now, self.bytes_out - unsent - queued, owed)

    def _unread_bytes(self) -> int:
        return sockets.unread_bytes(self._descriptor) if self._transport else 0
