"""The admin endpoint: what monitoring and operators may ask over HTTP, and that nobody who asks can hurt the service.

One code for TCP and Unix sockets. It is handed what it can say and do as callables, and knows nothing of the server.
"""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import structlog
from msgspec import Struct

from echod.aside import NoThreadError, aside
from echod.exchange import Answer, Exchange, Request
from echod.listeners import Listeners
from echod.sockets import Bound, Key, SockAddr

EXCHANGES = 8
"""Clients at once; one more takes the place of the oldest. Few, for they take descriptors from the 32 that echod keeps
for itself, and enough, for a request is answered as soon as it is there."""

SLICE_S = 0.001
"""After so much time of the processor that clients have cost, the service gets BREATH times as much before the next."""

BREATH = 4
"""So the endpoint takes a fifth of the loop at most, however many ask."""

WAITING = 32
"""Clients of Unix sockets that may wait for the verdict of a reload, beside the others."""

END_S = 0.25
"""How long the end waits for clients that are there still: they have their answer and don't go, or never asked."""

log = structlog.get_logger()


class Verdict(Struct, frozen=True):
    """What a reload came to: the keys that it changed, or every fault for which nothing has changed."""

    changed: tuple[str, ...] = ()
    restart_needed: tuple[str, ...] = ()
    """The keys whose values in the configuration are not in force yet, since this reload or an earlier one."""
    faults: tuple[str, ...] = ()


class Endpoint:
    """Answers on the listeners that `apply` gives it; made and used inside a running loop."""

    def __init__(self, snapshot: Callable[[], dict[str, Any]], reload: Callable[[], Awaitable[Verdict]]) -> None:
        self._snapshot = snapshot
        self._reload = reload
        self._pages: dict[str, Callable[[], Answer | Awaitable[Answer]]] = {
            "/healthz": lambda: Answer(200, b"ok\n"),
            "/readyz": self._readiness,
            "/stats": lambda: _json(200, snapshot()),
            "/metrics": self._metrics,
        }
        self._exposition: Callable[[dict[str, Any]], Answer] | None = None
        self._loop = asyncio.get_running_loop()
        self._listeners = Listeners(self._on_accept, self._on_starved)
        self._exchanges: dict[Exchange, None] = {}  # a set that keeps its order: the oldest first
        self._spent_s = 0.0
        self._gone = asyncio.Event()
        self._is_draining = False

    # -- what the lifecycle asks -----------------------------------------------------------------------------------

    @property
    def listening(self) -> dict[Key, Bound]:
        """The sockets of the listeners in force."""
        return self._listeners.bound

    def apply(self, sockets: Mapping[Key, Bound | None]) -> None:
        """Answer on these from now on: a socket is a new one, None stays as it is, the others retire."""
        before = self.listening.keys()
        self._listeners.apply(sockets, END_S)
        if self.listening.keys() != before:
            log.info("admin endpoint", listen=self._listeners.addresses)

    async def retired(self) -> None:
        """Return when each listener that went away has served its backlog and is closed."""
        await self._listeners.retired()

    async def rest(self) -> bool:
        """Accept nobody until `wake`, and return when the clients that are there have their answers, or had the time.

        False if some wait for the verdict of a reload still: they stay.
        """
        self._listeners.pause("resting")
        await self._emptied()
        return not self._exchanges

    def wake(self) -> None:
        """Accept clients again."""
        self._listeners.resume("resting")

    def start_draining(self) -> None:
        """Tell whoever asks that echod isn't ready for new clients any more."""
        self._is_draining = True

    async def close(self) -> None:
        """Answer who is there already, and close."""
        self._listeners.apply({}, END_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self.retired()
        await self._emptied()
        for exchange in [*self._exchanges]:
            exchange.close()
        self._listeners.close_now()

    async def _emptied(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                while self._exchanges:
                    self._gone.clear()
                    await self._gone.wait()
        for exchange in [*self._exchanges]:
            if not exchange.is_awaited:
                exchange.close()

    # -- answers ---------------------------------------------------------------------------------------------------

    def _answer(self, request: Request) -> Answer | Awaitable[Answer]:
        match request.method, request.path:
            case "POST", "/reload" if request.is_local:
                is_full = sum(exchange.is_awaited for exchange in self._exchanges) >= WAITING
                return Answer(503, b"too many wait for a reload\n") if is_full else self._verdict()
            case "POST", "/reload":
                return Answer(403, b"a reload is taken from the Unix socket alone\n")
            case "GET" | "HEAD", path if path in self._pages:
                return self._pages[path]()
            case _, "/reload":
                return _not_allowed("POST")
            case _, path if path in self._pages:
                return _not_allowed("GET, HEAD")
            case _:
                return Answer(404, f"there are {', '.join(self._pages)} and, to POST, /reload\n".encode())

    def _readiness(self) -> Answer:
        return Answer(503, b"draining\n") if self._is_draining else Answer(200, b"serving\n")

    def _metrics(self) -> Answer | Awaitable[Answer]:
        return self._exposition(self._snapshot()) if self._exposition else self._first_metrics()

    async def _first_metrics(self) -> Answer:
        try:
            self._exposition = await aside(_exposition)
        except (ImportError, NoThreadError) as error:
            return Answer(503, f"no metrics: {error}\n".encode())
        return self._exposition(self._snapshot())

    async def _verdict(self) -> Answer:
        verdict = await self._reload()
        if verdict.faults:
            return _json(409, {"errors": verdict.faults})
        return _json(200, {"changed": verdict.changed, "restart_needed": verdict.restart_needed})

    # -- clients come and go ---------------------------------------------------------------------------------------

    def _on_accept(self, descriptor: int, _: SockAddr) -> None:
        began = time.thread_time()
        self._make_room()
        exchange = Exchange(socket.socket(fileno=descriptor), self._answer, self._on_closed)
        self._exchanges[exchange] = None
        exchange.start()
        self._spent_s += time.thread_time() - began
        if self._spent_s >= SLICE_S:
            self._listeners.pause("breath")
            self._loop.call_later(BREATH * self._spent_s, self._listeners.resume, "breath")
            self._spent_s = 0.0

    def _make_room(self) -> None:
        others = [exchange for exchange in self._exchanges if not exchange.is_awaited]
        if len(others) >= EXCHANGES:
            others[0].close()

    def _on_closed(self, exchange: Exchange) -> None:
        del self._exchanges[exchange]
        self._gone.set()

    def _on_starved(self, error: OSError) -> None:
        log.warning("accepting paused", listener="admin", error=error.strerror)


def _exposition() -> Callable[[dict[str, Any]], Answer]:
    from echod import metrics

    return lambda stats: Answer(200, metrics.exposition(stats), metrics.CONTENT_TYPE_LATEST)


def _not_allowed(methods: str) -> Answer:
    return Answer(405, f"only {methods}\n".encode(), headers=(("allow", methods),))


def _json(status: int, content: object) -> Answer:
    # Not msgspec, which refuses a path that isn't UTF-8: a fault may name one.
    return Answer(status, json.dumps(content).encode() + b"\n", "application/json")
