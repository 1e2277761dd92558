"""One HTTP request and its answer on one socket: read within bounds, answered once, closed without a reset.

The socket is read and written by hand: a request that came while its client waited to be accepted is answered at once,
so that no crowd of silent clients can push it out. What the answer is the owner knows; h11 knows HTTP, and is
imported by the first request.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from msgspec import Struct

from echod.sockets import LINGER_S

if TYPE_CHECKING:
    import h11

REQUEST_BYTES = 8192
"""Longest head of a request; a body is never looked at."""

REQUEST_S = 5.0
"""How long a client may take to ask, and again to take its answer."""


class Request(Struct, frozen=True):
    """What a client asks for."""

    method: str
    path: str
    is_local: bool
    """Whether it came through a Unix socket."""


class Answer(Struct, frozen=True):
    """What a client is told."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


class Exchange:
    """Owns an accepted socket until `on_closed`; neither `answer` nor what it returns to be awaited may raise."""

    def __init__(
        self,
        sock: socket.socket,
        answer: Callable[[Request], Answer | Awaitable[Answer]],
        on_closed: Callable[["Exchange"], None],
    ) -> None:
        self._socket = sock
        self._answer = answer
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._http = _new_http()
        self._room = REQUEST_BYTES
        self._is_head = False
        self._is_heard = False
        self._has_ended = False
        self._answering: asyncio.Future[None] | None = None
        self._unsent = b""
        self._timer = self._loop.call_later(REQUEST_S, self._time_out)

    def start(self) -> None:
        """Answer if the request is there, or as soon as it is."""
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._read)
        self._read()

    @property
    def is_awaited(self) -> bool:
        """Whether its client waits for an answer that is still being found."""
        return self._answering is not None and not self._has_ended

    def close(self) -> None:
        """End now, whatever the client has or hasn't got."""
        if self._socket.fileno() < 0:
            return
        self._timer.cancel()
        if self._answering:
            self._answering.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._on_closed(self)

    # -- the request -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            data = self._socket.recv(REQUEST_BYTES if self._is_heard else self._room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if not data:
            self._has_ended = True
            self._loop.remove_reader(self._socket)  # it would stay readable for ever
        if not self._is_heard:
            self._hear(data)
        elif self._has_ended and not self._answering and not self._unsent:
            self.close()

    def _hear(self, data: bytes) -> None:
        import h11

        self._room -= len(data)
        self._http.receive_data(data)
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            self._reply(Answer(error.error_status_hint, f"{error}\n".encode()))
            return
        if isinstance(event, h11.Request):
            self._ask(event.method.decode(), event.target.decode().partition("?")[0])
        elif event is not h11.NEED_DATA:  # it came and went without a word
            self.close()
        elif not self._room:
            self._reply(Answer(431, f"request longer than {REQUEST_BYTES} bytes\n".encode()))

    def _ask(self, method: str, path: str) -> None:
        self._is_heard = True
        self._is_head = method == "HEAD"
        self._timer.cancel()
        answer = self._answer(Request(method, path, is_local=self._socket.family == socket.AF_UNIX))
        if isinstance(answer, Answer):
            self._reply(answer)
        else:
            self._answering = asyncio.ensure_future(self._reply_later(answer))

    async def _reply_later(self, answer: Awaitable[Answer]) -> None:
        found = await answer
        self._answering = None
        self._reply(found)

    def _time_out(self) -> None:
        # What has arrived and waits for us, as after a pause of the whole process, is not the client's delay.
        self._read()
        if not self._is_heard and self._socket.fileno() >= 0:
            self._reply(Answer(408, b"request not finished in time\n"))

    # -- the answer ------------------------------------------------------------------------------------------------

    def _reply(self, answer: Answer) -> None:
        self._is_heard = True
        self._unsent = _rendered(self._http, answer, with_body=not self._is_head)
        self._end_after(REQUEST_S)
        self._send()

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close()
            return
        if self._unsent:
            self._loop.add_writer(self._socket, self._send)
            return
        self._loop.remove_writer(self._socket)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        if self._has_ended:
            self.close()
        else:
            self._end_after(LINGER_S)

    def _end_after(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self.close)


def _new_http() -> "h11.Connection":
    import h11

    return h11.Connection(h11.SERVER)


def _rendered(http: "h11.Connection", answer: Answer, *, with_body: bool) -> bytes:
    from http import HTTPStatus

    import h11

    headers = [
        ("content-type", answer.content_type),
        ("content-length", str(len(answer.body))),
        ("cache-control", "no-store"),
        ("connection", "close"),
        *answer.headers,
    ]
    reason = HTTPStatus(answer.status).phrase
    response = h11.Response(status_code=answer.status, reason=reason, headers=headers)
    body = answer.body if with_body else b""
    return b"".join(filter(None, (http.send(response), http.send(h11.Data(body)), http.send(h11.EndOfMessage()))))
