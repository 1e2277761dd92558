"""The admin endpoint: HTTP for monitoring and operators, on TCP and Unix sockets, bounded to protect the service.

The endpoint knows nothing of the server: its owner passes what it can report and do as callables.

The endpoint uses at most a fifth of the event loop's time, however many clients it has and however they behave. All CPU
time that its clients cause is charged to one of three shares, and work whose share is used up pauses. The shares are
separate so that health checks do not wait for scrapes, which cost twenty times as much, and echod's own user, on a Unix
socket, does not wait for TCP clients.
"""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import structlog
from msgspec import Struct

from echod.admin.cpu_share import CpuShare
from echod.admin.http import Answer, Exchange, Request
from echod.net.listener_set import ListenerSet
from echod.net.sockets import BoundSocket, ListenerKey, ListenerSettings, Prepared, RawAddress
from echod.process.phase import Life
from echod.process.worker_thread import NoThreadError, in_thread

TCP_SHARE = 0.12
"""The share of the loop for TCP clients: to accept them, read requests, give cheap answers, and close."""

UNIX_SHARE = 0.03
"""The share of the loop for clients of Unix sockets: to accept them, read requests, give cheap answers, and close."""

COSTLY_SHARE = 0.05
"""The share of the loop for the answers to COSTLY requests of all clients."""

COSTLY = {"/stats", "/metrics", "/reload"}
"""The paths whose requests are queued: clients of Unix sockets are answered first, then in the order of arrival."""

EXCHANGES = 8
"""How many clients may be connected at once without waiting for an answer. Another one replaces the oldest client of
the TCP address that has most of them. The number is small because these clients use descriptors from the 32 that echod
reserves for itself. It suffices because a request is answered as soon as it is complete."""

IN_TURN = 12
"""How many TCP clients may be queued for COSTLY in addition. Beyond that, the last one of the address that has most of
them gets a 503, because a retry is better than a long wait."""

WAITING = 32
"""How many clients of Unix sockets may be queued in addition, and as many again may wait for the result of a reload."""

END_S = 0.25
"""How long `pause` and `close` wait for clients that have their answer or have sent no request."""

log = structlog.get_logger()


class ReloadResult(Struct, frozen=True):
    """The result of a reload: the keys that changed, or the errors because of which nothing changed."""

    changed: tuple[str, ...] = ()
    restart_needed: tuple[str, ...] = ()
    """The keys whose configured values need a restart to take effect, changed by this reload or an earlier one."""
    errors: tuple[str, ...] = ()


class AdminServer:
    """Answers HTTP requests on its listeners; create and use it inside a running event loop."""

    def __init__(
        self, snapshot: Callable[[], dict[str, Any]], reload: Callable[[], Awaitable[ReloadResult]], life: Life
    ) -> None:
        self._life = life
        self._snapshot = snapshot
        self._reload = reload
        self._pages: dict[str, Callable[[], Answer | Coroutine[Any, Any, Answer]]] = {
            "/healthz": lambda: Answer(200, b"ok\n"),
            "/readyz": self._readiness,
            "/stats": lambda: _json(200, snapshot()),
            "/metrics": self._metrics,
        }
        self._exposition: Callable[[dict[str, Any]], Answer] | None = None
        self._loop = asyncio.get_running_loop()
        self._exchanges: dict[Exchange, None] = {}  # an ordered set, oldest first
        self._turns: dict[Exchange, Callable[[], Answer | Coroutine[Any, Any, Answer]]] = {}
        self._costly = CpuShare(COSTLY_SHARE, lambda: None, partial(self._loop.call_soon, self._take_turns))
        self._sides = (self._side(TCP_SHARE, is_local=False), self._side(UNIX_SHARE, is_local=True))
        self._gone = asyncio.Event()

    def _side(self, share: float, *, is_local: bool) -> "_Side":
        def exchanges() -> list[Exchange]:
            return [each for each in self._exchanges if each.is_local == is_local]

        return _Side(share, exchanges, self._admit, self._on_starved, is_local=is_local)

    # -- for the lifecycle -----------------------------------------------------------------------------------------

    @property
    def listening(self) -> dict[ListenerKey, BoundSocket]:
        """The sockets of the current listeners."""
        return {key: bound for side in self._sides for key, bound in side.listeners.bound.items()}

    @contextmanager
    def change(self, listeners: Prepared) -> Iterator[None]:
        """Answer on exactly these listeners once the context ends; if it ends with an error, nothing has changed.

        Raises ListenError when it is entered.
        """
        before = self.listening.keys()
        with ExitStack() as sides:
            for side in self._sides:
                families = (socket.AF_UNIX,) if side.is_local else (socket.AF_INET, socket.AF_INET6)
                of_side = {key: each for key, each in listeners.items() if key.address.family in families}
                sides.enter_context(side.change(of_side))
            yield
        if self.listening.keys() != before:
            log.info("admin endpoint", listen=[each for side in self._sides for each in side.listeners.addresses])

    async def retired(self) -> None:
        """Wait until each removed listener has served its backlog and is closed."""
        for side in self._sides:
            await side.listeners.retired()

    async def pause(self) -> bool:
        """Accept nobody until `resume`, and return when every client has its answer or has had END_S to ask.

        Return False if clients still wait for the result of a reload; they stay connected.
        """
        for side in self._sides:
            side.listeners.pause("upgrade")
        await self._emptied()
        return not self._exchanges

    def resume(self) -> None:
        """Accept clients again after `pause`."""
        for side in self._sides:
            side.listeners.resume("upgrade")

    async def close(self) -> None:
        """Stop listening, answer the clients that are connected, and close."""
        for side in self._sides:
            side.listeners.apply({}, END_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self.retired()
        await self._emptied()
        for exchange in [*self._exchanges]:
            exchange.close()
        for side in self._sides:
            side.listeners.close_now()

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

    def _on_request(self, exchange: Exchange, request: Request) -> None:
        find = partial(self._answer, request, is_local=exchange.is_local)
        if request.path not in COSTLY:
            self._give(exchange, find)
            return
        self._turns[exchange] = find
        self._loop.call_soon(self._take_turns)
        waiting = [each for each in self._turns if each.is_local == exchange.is_local]
        if len(waiting) > (WAITING if exchange.is_local else IN_TURN):
            refused = _of_largest_group(reversed(waiting))
            del self._turns[refused]
            refused.reply(Answer(503, b"too many requests, try again\n", headers=(("retry-after", "1"),)))

    def _take_turns(self) -> None:
        """Answer queued requests until the share is used up; called again when it has caught up."""
        while self._turns and not self._costly.is_suspended:
            exchange = next((each for each in self._turns if each.is_local), next(iter(self._turns)))
            self._costly.run(self._give, exchange, self._turns.pop(exchange))

    def _give(self, exchange: Exchange, find: Callable[[], Answer | Coroutine[Any, Any, Answer]]) -> None:
        answer = find()
        if isinstance(answer, Answer):
            exchange.reply(answer)
        else:
            exchange.reply_later(answer)

    def _answer(self, request: Request, *, is_local: bool) -> Answer | Coroutine[Any, Any, Answer]:
        match request.method, request.path:
            case "POST", "/reload" if is_local:
                is_full = sum(exchange.is_awaited for exchange in self._exchanges) >= WAITING
                return Answer(503, b"too many clients wait for a reload\n") if is_full else self._reload_answer()
            case "POST", "/reload":
                return Answer(403, b"a reload is accepted only on the Unix socket\n")
            case "GET" | "HEAD", path if path in self._pages:
                return self._pages[path]()
            case _, "/reload":
                return _not_allowed("POST")
            case _, path if path in self._pages:
                return _not_allowed("GET, HEAD")
            case _:
                return Answer(404, f"not found: GET {', '.join(self._pages)}, POST /reload\n".encode())

    def _readiness(self) -> Answer:
        return Answer(503, b"draining\n") if self._life.is_leaving else Answer(200, b"serving\n")

    def _metrics(self) -> Answer | Coroutine[Any, Any, Answer]:
        return self._exposition(self._snapshot()) if self._exposition else self._first_metrics()

    async def _first_metrics(self) -> Answer:
        try:
            self._exposition = await in_thread(_exposition)
        except (ImportError, NoThreadError) as error:
            return Answer(503, f"metrics unavailable: {error}\n".encode())
        return self._exposition(self._snapshot())

    async def _reload_answer(self) -> Answer:
        result = await self._reload()
        if result.errors:
            return _json(409, {"errors": result.errors})
        return _json(200, {"changed": result.changed, "restart_needed": result.restart_needed})

    # -- clients ---------------------------------------------------------------------------------------------------

    def _admit(self, descriptor: int, peer: RawAddress, share: CpuShare) -> None:
        self._make_room()
        host = peer[0] if isinstance(peer, tuple) else ""
        exchange = Exchange(socket.socket(fileno=descriptor), host, share, self._on_request, self._on_closed)
        self._exchanges[exchange] = None
        exchange.start()

    def _make_room(self) -> None:
        awaited = {each for each in self._exchanges if each.is_local and each.is_awaited}
        others = [each for each in self._exchanges if each not in self._turns and each not in awaited]
        if len(others) >= EXCHANGES:
            _of_largest_group([each for each in others if not each.is_local] or others).close()

    def _on_closed(self, exchange: Exchange) -> None:
        del self._exchanges[exchange]
        self._turns.pop(exchange, None)
        self._gone.set()

    def _on_starved(self, error: OSError) -> None:
        log.warning("accepting paused", listener="admin", error=error.strerror)


class _Side:
    """The listeners of one kind, TCP or Unix, and the share of the loop that their clients may use."""

    def __init__(
        self,
        share: float,
        exchanges: Callable[[], list[Exchange]],
        admit: Callable[[int, RawAddress, CpuShare], None],
        on_starved: Callable[[OSError], None],
        *,
        is_local: bool,
    ) -> None:
        self.is_local = is_local
        self.listeners = ListenerSet(self._on_accept, on_starved)
        self._exchanges = exchanges
        self._admit = admit
        self._share = CpuShare(share, self._pause, self._resume)

    @contextmanager
    def change(self, listeners: Prepared) -> Iterator[None]:
        """Listen on exactly these listeners once the context ends; all others retire."""
        with self.listeners.change(listeners, END_S):
            yield
        if self._share.is_suspended:
            self.listeners.pause("share")  # so that new listeners pause too

    def _on_accept(self, descriptor: int, peer: RawAddress, _: ListenerSettings) -> None:
        self._share.run(self._admit, descriptor, peer, self._share)

    def _pause(self) -> None:
        self.listeners.pause("share")
        for exchange in self._exchanges():
            exchange.pause()

    def _resume(self) -> None:
        self.listeners.resume("share")
        for exchange in self._exchanges():
            exchange.resume()


def _of_largest_group(exchanges: Iterable[Exchange]) -> Exchange:
    """Return the first exchange of the address that has the most, so that a flooding address loses its places first."""
    found = [*exchanges]
    [(host, _)] = Counter(each.host for each in found).most_common(1)
    return next(each for each in found if each.host == host)


def _exposition() -> Callable[[dict[str, Any]], Answer]:
    from echod.admin import metrics

    return lambda stats: Answer(200, metrics.exposition(stats), metrics.CONTENT_TYPE_LATEST)


def _not_allowed(methods: str) -> Answer:
    return Answer(405, f"only {methods} allowed\n".encode(), headers=(("allow", methods),))


def _json(status: int, content: object) -> Answer:
    # Not msgspec, which cannot encode a path that is not UTF-8; an error may name one.
    return Answer(status, json.dumps(content).encode() + b"\n", "application/json")
