"""One HTTP exchange on a socket: read a request within bounds, answer it once, close without a reset.

The code reads and writes the socket directly, without a transport, so that a request from the backlog is read before a
crowd of silent clients can displace it. The owner supplies the answer. h11 parses the request; the first request
imports it.
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from echod.admin.cpu_share import CpuShare
from echod.net.sockets import LINGER_S
from echod.process.tasks import background_once

if TYPE_CHECKING:
    import h11

REQUEST_BYTES = 8192
"""The largest head of a request."""

BODY_BYTES = 262_144
"""How many bytes may follow the head. They are read and discarded, so that the close does not reset the connection."""

READ_BYTES = 65_536
"""How many bytes are read at once."""

REQUEST_S = 5.0
"""How long a client may take to send its request, and again to receive its answer."""


class Request(Struct, frozen=True):
    """The request line of a client."""

    method: str
    path: str


class Answer(Struct, frozen=True):
    """A response."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


class Exchange:
    """Owns an accepted socket until `on_closed`; `on_request` must lead to `reply`, `reply_later` or `close`.

    Its CPU time is charged to `share`. The owner pauses the exchange while the share is suspended.
    """

    def __init__(
        self,
        sock: socket.socket,
        host: str,
        share: CpuShare,
        on_request: Callable[["Exchange", Request], None],
        on_closed: Callable[["Exchange"], None],
    ) -> None:
        self.is_local = sock.family == socket.AF_UNIX
        """Whether the client connected through a Unix socket."""
        self.host = host
        """The client's IP address, "" for a Unix socket."""
        self._socket = sock
        self._share = share
        self._on_request = on_request
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._http = _new_http()
        self._left_bytes = REQUEST_BYTES
        self._is_head = False
        self._is_received = False
        self._has_ended = False
        self._is_answered = False
        self._is_paused = False
        self._answering: asyncio.Task[object] | None = None
        self._unsent = b""
        self._timer = self._loop.call_later(REQUEST_S, share.run, self._time_out)

    def start(self) -> None:
        """Answer the request as soon as it has arrived, which may be at once."""
        self._socket.setblocking(False)
        self._read()
        self._watch()

    def pause(self) -> None:
        """Stop reading and writing until `resume`; timeouts continue to run."""
        self._is_paused = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)

    def resume(self) -> None:
        """Read and write again."""
        self._is_paused = False
        self._watch()

    @property
    def is_awaited(self) -> bool:
        """Whether the client waits for an answer that is still being prepared."""
        return self._answering is not None and not self._has_ended

    @property
    def _is_open(self) -> bool:
        return self._socket.fileno() >= 0

    def close(self) -> None:
        """Close now, even if the client has not received its answer."""
        if not self._is_open:
            return
        self._timer.cancel()
        if self._answering:
            self._answering.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._on_closed(self)

    def _watch(self) -> None:
        if not self._is_open or self._is_paused:
            return
        if not self._has_ended:
            self._loop.add_reader(self._socket, self._share.run, self._read)
        if self._unsent:
            self._loop.add_writer(self._socket, self._share.run, self._send)

    # -- the request -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            data = self._socket.recv(min(self._left_bytes, READ_BYTES))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        self._left_bytes -= len(data)
        if not data:
            self._has_ended = True
            self._loop.remove_reader(self._socket)  # at its end, a socket is always readable
        if not self._is_received:
            self._parse(data)
        elif not self._left_bytes or (self._has_ended and self._is_answered):
            self.close()

    def _parse(self, data: bytes) -> None:
        import h11

        self._http.receive_data(data)
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            self.reply(Answer(error.error_status_hint, f"{error}\n".encode()))
            return
        if isinstance(event, h11.Request):
            self._on_received()
            self._is_head = event.method == b"HEAD"
            self._on_request(self, Request(event.method.decode(), event.target.decode().partition("?")[0]))
        elif event is not h11.NEED_DATA:  # the client left without a request
            self.close()
        elif not self._left_bytes:
            self.reply(Answer(431, f"request longer than {REQUEST_BYTES} bytes\n".encode()))

    def _on_received(self) -> None:
        self._is_received = True
        self._left_bytes = BODY_BYTES
        self._timer.cancel()

    def _time_out(self) -> None:
        # Read first: the whole process may have been stopped while input arrived.
        self._read()
        if not self._is_received and self._is_open:
            self.reply(Answer(408, b"request not completed in time\n"))

    # -- the answer ------------------------------------------------------------------------------------------------

    def reply(self, answer: Answer) -> None:
        """Send the answer, and close once the client has it."""
        if not self._is_received:
            self._on_received()
        self._unsent = _rendered(answer, with_body=not self._is_head)
        self._end_after(REQUEST_S)
        self._send()
        if self._unsent:
            self._watch()

    def reply_later(self, answer: Coroutine[Any, Any, Answer]) -> None:
        """Send the answer when `answer` has produced it; `answer` must not raise."""
        self._answering = background_once(lambda: self._reply_when_ready(answer), "admin answer")
        # A task that is cancelled before its first step awaits nothing, and Python warns of a coroutine never awaited.
        self._answering.add_done_callback(lambda _: answer.close())

    async def _reply_when_ready(self, answer: Coroutine[Any, Any, Answer]) -> None:
        found = await answer
        self._answering = None
        self._share.run(self.reply, found)

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if self._unsent:
            return
        self._is_answered = True
        self._loop.remove_writer(self._socket)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        if self._has_ended:
            self.close()
        else:
            self._end_after(LINGER_S)

    def _end_after(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._share.run, self.close)


def _new_http() -> "h11.Connection":
    import h11

    return h11.Connection(h11.SERVER)


def _rendered(answer: Answer, *, with_body: bool) -> bytes:
    from http import HTTPStatus

    headers = [
        ("content-type", answer.content_type),
        ("content-length", str(len(answer.body))),
        ("cache-control", "no-store"),
        ("connection", "close"),
        *answer.headers,
    ]
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode() + (answer.body if with_body else b"")
