"""One client's connection: its socket, its protocol state, and how it ends.

An ordinary line passes through `HotPath.__call__` and `_receive` only: it creates no task or timer, writes no log line
and does not read the clock. Readiness is level-triggered, so each readable client gets one bounded read per iteration
of the event loop. If very many clients have input, their reads are queued (`Scheduler`). The owner samples the client's
progress periodically and enforces the timeouts. This module knows nothing of other connections, signals or the server;
it reports the end of a connection through `Owner.on_closed`.
"""

import asyncio
import os
import socket
from contextlib import suppress
from enum import Enum
from typing import ClassVar, Protocol

from echod.net import sockets
from echod.protocol.echo import Echo, error_line
from echod.server.activity import Activity
from echod.server.fastpath import CHUNK_BYTES, HotPath
from echod.server.memory import SPARE_BYTES, UNREAD_BYTES, MemoryLimit
from echod.server.scheduler import Scheduler
from echod.server.state import ConnectionState
from echod.telemetry.reasons import CloseReason, EndReason, end_reason

MIN_CHUNK_BYTES = 16_384
"""The smallest read buffer, however long the partial line that the read continues."""

# All connections share this buffer: its content is copied before the next read.
_chunk = memoryview(bytearray(CHUNK_BYTES))

# All connections without pending replies share this object, which is never changed. Pending replies are a bytearray
# because deleting its front takes amortized linear time; slicing bytes would copy the rest at each write.
_NO_REPLIES = bytearray()


class State(Enum):
    """Where a connection is between its accept and its end.

    OPEN ─── client's end of stream, nothing pending ───────────────────────────────────► CLOSED
      │ ╲                                                                                    ▲
      │  `── client's end of stream, replies pending ──► FLUSHING ── last one sent ──────────┤
      │                                                    ▲  │                              │
      └─── finish: timeout, error line, drain ─────────────┘  └── last one sent ──► LINGERING┘
                                                                  client's end of stream, or LINGER_S

    A reset or an abort leads to CLOSED from every state. During a drain, the client's end of stream leads to LINGERING,
    so that its kernel acknowledges every reply before the close.
    """

    OPEN = "reads and answers"
    FLUSHING = "no longer answers; replies are still pending"
    LINGERING = "our side is half-closed; further input is read and discarded"
    CLOSED = "the socket is closed"


class Owner(Protocol):
    """What a connection needs from the object that owns it."""

    loop: asyncio.AbstractEventLoop
    scheduler: Scheduler
    memory: MemoryLimit

    def on_active(self, connection: "Connection") -> None:
        """Handle input on a parked connection."""

    def on_closed(self, connection: "Connection") -> None:
        """Handle the close of a connection; `connection.reason` says why it ended."""


class Connection(HotPath):
    """Echoes one client's lines until either side ends; `reason` then says why.

    Owns the descriptor, which must be non-blocking, from construction on. While `is_hot` is true, there is no partial
    line, no pending reply and nothing unusual, so the fast path may answer on its own.
    """

    is_tls: ClassVar[bool] = False
    """Whether the lines travel in TLS records."""

    __slots__ = (
        "_counted_bytes",
        "_has_ended",
        "_is_draining",
        "_is_postponed",
        "_is_reading",
        "_is_writing",
        "_linger",
        "_owner",
        "_pending",
        "_waits_for_memory",
        "activity",
        "echo",
        "is_anonymous",
        "is_counted",
        "is_unix",
        "opened_at",
        "parked_until",
        "reason",
        "sockaddr",
        "state",
        "unacknowledged_bytes",
    )

    def __init__(  # noqa: PLR0913 (everything that is known at an accept)
        self,
        owner: Owner,
        descriptor: int,
        peer: sockets.RawAddress,
        line_bytes: int,
        now: float,
        *,
        is_unix: bool = False,
        is_counted: bool = True,
    ) -> None:
        super().__init__()
        self._owner = owner
        self.descriptor = descriptor
        self.is_unix = is_unix
        """Whether the client connected through a Unix socket; its PROXY header may still name an IP address."""
        self.sockaddr = peer
        self.line_bytes = line_bytes
        self.is_counted = is_counted
        """Whether limits and statistics count the client: false for a rejected client and for our own self-probe."""
        self.is_anonymous = False
        """Whether the PROXY header names no client, as in a health check by the balancer itself."""
        self.echo = Echo(line_bytes)
        self.activity = Activity(now)
        self.opened_at = now
        self.state = State.OPEN
        self.reason: EndReason | None = None
        """Why the connection ends; None while it is open."""
        self.is_hot = True
        self.parked_until: float | None = None
        """When the idle timeout ends, if the connection is parked; None if it is sampled regularly."""
        self.unacknowledged_bytes = 0
        """How many bytes the client's kernel had not acknowledged when the linger ended."""
        self._pending = _NO_REPLIES
        self._counted_bytes = 0
        self._waits_for_memory = False
        self._has_ended = False
        self._is_draining = False
        self._is_postponed = False
        self._is_reading = False
        self._is_writing = False
        self._linger: asyncio.TimerHandle | None = None

    # -- queries ---------------------------------------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """The client's address."""
        return sockets.peer_name(socket.AF_UNIX if self.is_unix else socket.AF_INET, self.sockaddr)

    @property
    def host(self) -> str | None:
        """The client's IP address without the port; None for a Unix socket."""
        return self.sockaddr[0] if isinstance(self.sockaddr, tuple) else None

    @property
    def lines(self) -> int:
        """How many messages have been answered."""
        return self.hot_lines + self.echo.answered

    @property
    def pending(self) -> bytes:
        """A copy of the pending replies: bytes owed to the client that the kernel has not accepted yet."""
        return bytes(self._pending)

    @property
    def log_fields(self) -> dict[str, str]:
        """What the log says about this kind of connection beyond the common fields, when it closes."""
        return {}

    @property
    def held_bytes(self) -> int:
        """Memory held for this client: unanswered input and pending replies."""
        return self.echo.held_bytes + len(self._pending)

    @property
    def is_owed(self) -> bool:
        """Whether replies are pending, or complete lines that were read are not answered yet."""
        return bool(self._pending) or self.echo.has_more

    @property
    def lacks_memory(self) -> bool:
        """Whether the memory limit is exceeded and nothing may be read from this client."""
        return self._owner.memory.is_exceeded and self.state is State.OPEN and not self._spare_bytes(_chunk)

    def set_line_bytes(self, line_bytes: int) -> None:
        """Change the line limit; it also applies to the partial line."""
        self.line_bytes = self.echo.line_bytes = line_bytes

    # -- start -----------------------------------------------------------------------------------------------------

    def restore(self, saved: ConnectionState) -> None:
        """Restore the state that the predecessor saved at a live upgrade; call before `open`."""
        self.echo = Echo(self.line_bytes, saved.unanswered, saved.lines)
        self.activity.restore(saved.activity)
        self.opened_at = saved.opened_at
        self.bytes_in, self.bytes_out = saved.bytes_in, saved.bytes_out
        self._pending = bytearray(saved.pending) if saved.pending else _NO_REPLIES
        if saved.reason is not None:
            self.reason = end_reason(saved.reason)
            self._has_ended = self.reason is CloseReason.CLIENT
            self.state = State.FLUSHING
        self._count_held()

    def open(self) -> None:
        """Start to read and answer, or continue with restored pending replies and input."""
        if self.state is State.FLUSHING:
            self._end_when_sent()
        elif self.echo.has_more and not self._pending:
            self._owner.scheduler.add(self)
        self._watch()
        self._check_hot()

    # -- read, answer, send ----------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read once, and less if it continues a partial line.

        The smaller read bounds what one client can make us hold: about three times the line limit plus one read,
        because upper-casing can triple the size of UTF-8 text. `memory` bounds all clients together.
        """
        partial_bytes = self.echo.partial_bytes
        room = _chunk[: max(CHUNK_BYTES - partial_bytes, MIN_CHUNK_BYTES)] if partial_bytes else _chunk
        if self._owner.memory.is_exceeded and self.state is State.OPEN:
            room = room[: self._spare_bytes(room)]
            if not room:
                self._waits_for_memory = True
                self._owner.memory.wait(self)
                self._watch()
                return
        try:
            received = self._read_into(room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error.errno or 0)
            return
        self._receive(room[:received].tobytes())

    def _receive(self, chunk: bytes) -> None:
        """Answer the lines in `chunk`; b"" is the client's end of stream."""
        if not chunk:
            self._receive_end()
            return
        if self.state is not State.OPEN:  # after our half-close: discard input until the client's end of stream
            return
        self.bytes_in += len(chunk)
        echo = self.echo
        replies = echo.receive(chunk)
        if replies:
            self._send(replies)
        if not self.is_hot or not echo.is_clean:
            self._after_unusual(is_answered=bool(replies))

    def _after_unusual(self, *, is_answered: bool) -> None:
        """Handle what an ordinary chunk does not need: partial lines, errors, costly input, parking and accounting."""
        if self.state is not State.OPEN:
            return
        if self.parked_until is not None:
            self._owner.on_active(self)
        self._count_held()
        if self.echo.error:
            self.finish(CloseReason(self.echo.error.value))
            return
        if self.echo.has_more and not self._pending:
            self._owner.scheduler.add(self)
        elif not is_answered and (error := sockets.pending_error(self.descriptor)):
            # libuv reports an error on a descriptor once and then stops polling it. The read above may have returned
            # only the input before the error. Without a send, nothing else would report it.
            self._lose(error)
            return
        self._watch()
        self._check_hot()

    def take_step(self) -> bool:
        """Answer a slice of costly input; return whether more of it can be answered now."""
        if self.state is not State.OPEN or self._pending:
            return False
        replies = self.echo.receive_more()
        if replies:
            self._send(replies)
        self._count_held()
        if self.state is State.OPEN and self.echo.has_more and not self._pending:
            return True
        if self.state is State.OPEN and not self._pending:
            self._after_unusual(is_answered=True)
        elif self.echo.error:
            self.finish(CloseReason(self.echo.error.value))
        return False

    def _send(self, replies: bytes) -> None:
        """Send replies and keep what the kernel does not accept; no reply may be pending."""
        self.bytes_out += len(replies)
        try:
            sent = self._write(self.descriptor, replies)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._lose(error.errno or 0)
            return
        if sent < len(replies):
            self._keep_pending(replies[sent:])

    def _keep_pending(self, replies: bytes) -> None:
        """Keep replies that the kernel did not accept; stop reading until they are sent."""
        self._pending = bytearray(replies)
        self.is_hot = False
        self._count_held()
        self._watch()

    def _on_writable(self) -> None:
        try:
            sent = self._write(self.descriptor, self._pending)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error.errno or 0)
            return
        del self._pending[:sent]
        self._count_held()
        if self._pending:
            return
        self._pending = _NO_REPLIES
        if self.state is State.FLUSHING:
            self._end_when_sent()
        elif self.echo.has_more:
            self._owner.scheduler.add(self)
        self._watch()
        self._check_hot()

    _write = staticmethod(os.write)

    def _read_into(self, room: memoryview) -> int:
        return os.readv(self.descriptor, (room,))

    # -- event loop ------------------------------------------------------------------------------------------------

    def _detect_iteration(self) -> None:
        self._owner.scheduler.schedule_run()

    def _postpone(self) -> None:
        """Queue this client's read, because very many clients have input at once."""
        self._is_postponed = True
        self._watch()
        self._owner.scheduler.postpone(self)

    def read_postponed(self) -> None:
        """Read once, if the connection still waits for input."""
        self._is_postponed = False
        if self._wants_input and self.state is not State.CLOSED:
            self.read_now()
        self._watch()

    @property
    def _wants_room(self) -> bool:
        return bool(self._pending)

    @property
    def _wants_input(self) -> bool:
        return not (
            self._pending
            or self._has_ended
            or self._waits_for_memory
            or self._is_postponed
            or self.echo.has_more
            or self.state is State.FLUSHING
        )

    def _watch(self) -> None:
        """Register with the event loop for what this connection waits for now: room to send, or input."""
        if self.state is State.CLOSED:
            return
        wants_room = self._wants_room
        wants_input = self._wants_input
        loop = self._owner.loop
        # Add before removing: a descriptor without any registration leaves epoll and has to be added again.
        if wants_room and not self._is_writing:
            loop.add_writer(self.descriptor, self._on_writable)
        if wants_input and not self._is_reading:
            loop.add_reader(self.descriptor, self)
        if self._is_writing and not wants_room:
            loop.remove_writer(self.descriptor)
        if self._is_reading and not wants_input:
            loop.remove_reader(self.descriptor)
        self._is_writing, self._is_reading = wants_room, wants_input

    def _check_hot(self) -> None:
        """Update `is_hot`: the fast path may answer if nothing is partial, pending, draining, parked or unusual."""
        self.is_hot = (
            self.state is State.OPEN
            and not (self._pending or self._is_draining or self.parked_until is not None)
            and not self._owner.memory.is_exceeded
            and self.echo.is_clean
        )

    # -- memory ----------------------------------------------------------------------------------------------------

    def _count_held(self) -> None:
        held = self.held_bytes if self.state is not State.CLOSED else 0
        if held != self._counted_bytes:
            added, self._counted_bytes = held - self._counted_bytes, held
            self._owner.memory.add(added)

    def _spare_bytes(self, room: memoryview) -> int:
        """How much may be read into `room` while the memory limit is exceeded.

        A client that holds little may send a little more; one with a long partial line may only complete it.
        """
        if sockets.unacknowledged_bytes(self.descriptor) > UNREAD_BYTES:
            return 0
        if self.echo.partial_bytes <= SPARE_BYTES:
            return SPARE_BYTES
        if self._owner.memory.is_overdrawn:
            return 0
        if sockets.is_ended(self.descriptor):
            return len(room)
        return sockets.peek(self.descriptor, room).rfind(b"\n") + 1

    def retry_read(self) -> None:
        """Wait for input again after a pause for memory; the next read checks the memory limit once more."""
        self._waits_for_memory = False
        self._watch()

    # -- end -------------------------------------------------------------------------------------------------------

    def _receive_end(self) -> None:
        """Handle the client's end of stream: answer an unterminated last line, then close."""
        self._has_ended = True
        if self.state is State.LINGERING:
            self.close()
        elif self.state is State.OPEN:
            replies = self.echo.finish()
            self.reason = CloseReason(self.echo.error.value) if self.echo.error else CloseReason.CLIENT
            self.is_hot = False
            self.state = State.FLUSHING
            if replies:
                self._send(replies)
            self._end_when_sent()
            self._watch()

    def finish(self, reason: EndReason, error: str = "") -> None:
        """End gracefully: send pending replies and the `error` line, half-close, read to the end of stream, close."""
        if self.state is not State.OPEN:
            return
        self.reason = reason
        self.is_hot = self._waits_for_memory = False
        self.state = State.FLUSHING
        farewell = error_line(error) if error else b""
        if self._pending:
            self.bytes_out += len(farewell)
            self._pending += farewell
            self._count_held()
        elif farewell:
            self._send(farewell)
        self._end_when_sent()
        self._watch()

    def abort(self, reason: CloseReason) -> None:
        """Close now; the client loses the replies that the kernel has not accepted."""
        if self.state is not State.CLOSED:
            self.bytes_out -= len(self._pending)
            self.reason = reason
            self.close()

    def end_now(self) -> None:
        """Close now; the client counts as aborted if replies, answers to complete lines, or unread input are left."""
        if self.is_owed or (self.state is State.OPEN and self.unread_bytes()):
            self.abort(CloseReason.CUT)
        else:
            self.reason = self.reason or CloseReason.DRAINED
            self.close()

    def close_early(self) -> None:
        """Close before the linger ends, because another client needs the descriptor.

        Input that has arrived is read first: closing a socket with unread input resets the client.
        """
        if self.state is State.LINGERING:
            with suppress(OSError):
                os.readv(self.descriptor, (_chunk,))
        self.close()

    def close_if_done(self) -> None:
        """Close if the client has ended its stream and its kernel has acknowledged every reply."""
        if self._has_ended and not self.activity.owed_bytes:
            self.close()

    def _end_when_sent(self) -> None:
        if self.state is not State.FLUSHING or self._pending:
            return
        if self._has_ended and not self._is_draining:
            self.close()
            return
        try:
            sockets.half_close(self.descriptor)
        except OSError as error:
            self._lose(error.errno or 0)
            return
        self.state = State.LINGERING
        self._linger = self._owner.loop.call_later(sockets.LINGER_S, self._end_linger)

    def _end_linger(self) -> None:
        self._measure_progress(0.0)
        self.unacknowledged_bytes = max(0, self.activity.owed_bytes - 1)  # the FIN counts as one
        self.close()

    def _lose(self, error: int) -> None:  # noqa: ARG002 (every error means the same: the client is gone)
        """Close because the connection has failed, for example by a reset."""
        if self.reason is None or self.reason is CloseReason.CLIENT:
            # A balancer usually ends its health check with a reset; that is not a lost client.
            is_health_check = self.is_anonymous and not self.bytes_in
            self.reason = CloseReason.CLIENT if is_health_check else CloseReason.RESET
        self.close()

    def close(self) -> None:
        """Close now, whether or not the client has received its replies."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self.is_hot = False
        loop = self._owner.loop
        if self._is_reading:
            loop.remove_reader(self.descriptor)
        if self._is_writing:
            loop.remove_writer(self.descriptor)
        if self._linger:
            self._linger.cancel()
        self._is_reading = self._is_writing = False
        self._pending = _NO_REPLIES
        self._count_held()
        self._owner.memory.forget(self)
        os.close(self.descriptor)
        self._owner.on_closed(self)

    # -- time ------------------------------------------------------------------------------------------------------

    def sample(self, now: float) -> None:
        """Sample the client's progress for the timeouts; the owner calls this periodically."""
        activity = self.activity
        if activity.owed_bytes or self.state is not State.OPEN or activity.has_new_replies(self.bytes_out):
            self._measure_progress(now)
        activity.sample(
            now,
            self.bytes_in,
            self.lines,
            is_in_line=self.echo.held_bytes > 0,
            is_read_paused=self.is_owed,
        )

    def is_silent(self, now: float) -> bool:
        """Whether the last sample saw no input since an earlier one, no partial line and no reply that is owed."""
        return (
            self.state is State.OPEN
            and self.activity.quiet_since < now
            and not (self.activity.owed_bytes or self._is_draining or self.echo.held_bytes)
        )

    def park(self, until: float) -> None:
        """Suspend regular sampling until then; the next input calls `Owner.on_active`."""
        self.parked_until = until
        self.is_hot = False

    def unpark(self) -> None:
        """Resume regular sampling."""
        self.parked_until = None
        self._check_hot()

    def start_draining(self, now: float) -> None:
        """Measure quiet time from now on, and wait for the client to acknowledge every reply before closing."""
        self.activity.quiet_since = now
        self._is_draining = True
        self.is_hot = False

    def unread_bytes(self) -> int:
        """How many bytes have arrived but have not been read."""
        return sockets.unread_bytes(self.descriptor) if self.state is not State.CLOSED else 0

    def _measure_progress(self, now: float) -> None:
        """Measure the bytes owed: not acknowledged by the client's kernel (TCP), or not accepted by ours (Unix)."""
        if self.state is State.CLOSED:
            return
        unsent = len(self._pending)
        queued = sockets.unacknowledged_bytes(self.descriptor)
        owed = unsent if self.is_unix else unsent + queued
        self.activity.measure(now, accepted_bytes=self._accepted_bytes(queued), owed_bytes=owed)

    def _accepted_bytes(self, queued: int) -> int:
        """Return how many bytes of replies the client's kernel has accepted; `queued` has ours not sent, or not yet."""
        return self.bytes_out - len(self._pending) - queued
