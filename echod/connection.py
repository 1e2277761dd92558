"""One client: its transport, its protocol, and how it ends.

The way of a line through here is `buffer_updated` alone: no task, no timer, no log call and no look at the clock.
Time passes in `look`, which the owner calls now and then; what it means is decided elsewhere. Other connections,
signals and the server are not known here; the end is told through `on_closed`.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from echod import sockets
from echod.handover import Past
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
        "_farewell",
        "_linger",
        "_on_closed",
        "_tail",
        "_transport",
        "bytes_in",
        "bytes_out",
        "descriptor",
        "echo",
        "family",
        "is_aborted",
        "opened_at",
        "pace",
        "reason",
        "sockaddr",
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
        self.echo = Echo(line_bytes)
        self.pace = Pace(now)
        self.family = sock.family
        self.sockaddr = peer
        self.descriptor = sock.fileno()
        self._on_closed = on_closed
        # What `connection_made` has to send if the end was decided before; None: abort.
        self._farewell: bytes | None = b""
        self._linger: asyncio.TimerHandle | None = None
        self._awaits_acknowledgement = False
        # Whatever was written since the kernel took less than it was given, None if it took all: its end is unsent.
        self._tail: bytes | None = None
        self.is_aborted = False
        self.opened_at = now
        self.bytes_in = 0
        self.bytes_out = 0
        self.unacknowledged_bytes = 0
        self.reason: str | None = None

    # -- what others ask -------------------------------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """The client's address."""
        return sockets.peer_name(self.family, self.sockaddr)

    @property
    def host(self) -> str | None:
        """The client's IP address alone, None for a Unix socket."""
        return self.sockaddr[0] if isinstance(self.sockaddr, tuple) else None

    @property
    def lines(self) -> int:
        """Messages answered."""
        return self.echo.answered

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that the kernel has not taken yet: the client is owed them."""
        return self._transport.get_write_buffer_size() if self._transport else len(self._farewell or b"")

    @property
    def held_bytes(self) -> int:
        """Memory that the client makes us use: the line begun and the replies that the kernel has not taken yet."""
        return self.echo.unfinished_bytes + self.unsent_bytes

    @property
    def unsent(self) -> bytes:
        """Those bytes."""
        if not self._transport:
            return self._farewell or b""
        return (self._tail or b"")[-self.unsent_bytes :] if self.unsent_bytes else b""

    def resume(self, past: Past) -> None:
        """Go on where the program before us left off; to be called before the connection is opened."""
        self.echo = Echo(self.echo.line_bytes, past.unfinished, past.lines)
        self.pace.resume(past.pace)
        self.opened_at, self.reason = past.opened_at, past.reason
        self.bytes_in, self.bytes_out = past.bytes_in, past.bytes_out
        self._farewell = None if past.is_aborted else past.unsent

    # -- the way of a line -----------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (asyncio's signature)
        """Where the loop is to put what it reads (asyncio.BufferedProtocol); less of it after a line begun.

        So one client makes us hold three times (upper-casing can triple UTF-8) 64 KiB and the least chunk at most.
        """
        if self._tail is not None:  # just resumed: uvloop reads once before it hears of a pause
            return _chunk[:1]
        begun = self.echo.unfinished_bytes
        return _chunk[: max(CHUNK_BYTES - begun, LEAST_CHUNK_BYTES)] if begun else _chunk

    def buffer_updated(self, nbytes: int) -> None:
        """Answer what has arrived (asyncio.BufferedProtocol)."""
        replies = b""
        if self.reason is None:  # after the half-close: read on to the end of the stream, answer nothing
            self.bytes_in += nbytes
            replies = self.echo.receive(_chunk[:nbytes].tobytes())
        if replies:
            self.bytes_out += len(replies)
            self._transport.write(replies)  # type: ignore[union-attr]
            if self._tail is not None:
                self._tail += replies
            if self.echo.fault:
                self.finish(self.echo.fault.value)
        if nbytes >= LEAST_CHUNK_BYTES or self._tail is not None:
            # Others come first: libuv would read from this client up to 32 times in a row.
            self._transport.pause_reading()  # type: ignore[union-attr]
            asyncio.get_running_loop().call_soon(self._read_on)

    def pause_writing(self) -> None:
        """Read no more from a client that doesn't take its replies (asyncio.Protocol); comes from within a write."""
        self._tail = b""
        if self._transport:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on: the kernel has taken every reply (asyncio.Protocol)."""
        self._tail = None
        self._read_on()
        if self._transport and self.reason is not None:
            self._start_linger()

    def _read_on(self) -> None:
        if self._transport and self.reason != "client":  # an end of stream is read once
            if self.unsent_bytes:  # then `resume_writing` comes
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # -- beginning and end -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin (asyncio.Protocol), or end what was ended before it began."""
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        farewell, self._farewell = self._farewell, b""  # which may be much: not to be held any longer
        # No buffer of our own: `pause_writing` then means exactly that the kernel took less than it was given.
        transport.set_write_buffer_limits(high=0)
        if farewell is None:
            self._abort()
        elif self.reason == "client":
            self._write(farewell)
            transport.close()
        elif self.reason is not None:
            self._half_close(farewell)
        elif farewell:
            self._write(farewell)
            asyncio.get_running_loop().call_soon(self._read_on)

    def eof_received(self) -> bool:
        """Answer an unterminated last line and end, as the client did (asyncio.Protocol)."""
        assert self._transport
        if self.reason is None:
            replies = self.echo.finish()
            self.reason = self.echo.fault.value if self.echo.fault else "client"
            self.bytes_out += len(replies)
            self._write(replies)
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
        self.bytes_out += len(farewell)
        if self._transport:
            self._half_close(farewell)
        else:
            self._farewell = (self._farewell or b"") + farewell

    def cut_off(self, reason: str) -> None:
        """End now; what the kernel has not taken is lost to the client."""
        if not self.is_aborted:
            self.bytes_out -= self.unsent_bytes
            self.reason = reason
            self._abort()

    def close(self) -> None:
        """Close, the client having ended its stream and taken every reply."""
        if self._transport:
            self._transport.close()

    def end_now(self) -> None:
        """End now, cutting the client off if it is owed a reply still, be it to a line that has not been read yet."""
        if self.unsent_bytes or (self.reason is None and self.unread_bytes()):
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

    def _write(self, data: bytes) -> None:
        self._transport.write(data)  # type: ignore[union-attr]
        if self._tail is not None:
            self._tail += data

    def _half_close(self, farewell: bytes = b"") -> None:
        assert self._transport
        if self._transport.is_closing():
            return
        self._write(farewell)
        self._transport.write_eof()
        if not self.unsent_bytes:
            self._start_linger()

    def _start_linger(self) -> None:
        if not self._linger:
            self._linger = asyncio.get_running_loop().call_later(sockets.LINGER_S, self._give_up)

    def _give_up(self) -> None:
        self._measure(0.0)
        self.unacknowledged_bytes = max(0, self.pace.owed - 1)  # the FIN counts as one
        self._abort()

    def _abort(self) -> None:
        self.is_aborted = True
        if self._transport:
            self._transport.abort()
        else:
            self._farewell = None

    # -- time ------------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """See how the client gets on; to be called again and again."""
        pace = self.pace
        if pace.owed or self.reason is not None or pace.is_news(self.bytes_in):
            self._measure(now)
        # With replies unsent the rest of a line isn't even read.
        is_in_line, is_unread = self.echo.unfinished_bytes > 0, self.unsent_bytes > 0
        pace.look(now, self.bytes_in, self.echo.answered, is_in_line=is_in_line, is_unread=is_unread)

    def start_draining(self, now: float) -> None:
        """Count the quiet from now on, and see each reply acknowledged before closing."""
        self.pace.quiet_since = now
        self._awaits_acknowledgement = True

    def unread_bytes(self) -> int:
        """Bytes that have arrived and were not read."""
        return sockets.unread_bytes(self.descriptor) if self._transport else 0

    def _measure(self, now: float) -> None:
        """See what the client's kernel has not acknowledged (TCP), or ours not taken (Unix)."""
        unsent = self.unsent_bytes
        queued = sockets.unacknowledged_bytes(self.descriptor) if self._transport else 0
        owed = unsent if self.family == socket.AF_UNIX else unsent + queued
        self.pace.measure(now, self.bytes_out - unsent - queued, owed)
