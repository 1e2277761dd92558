"""Reloads, one after the other: prepare a generation aside, then put it in force, or say why not.

Requests that come while one is under way become one more, never a queue; who wants to know gets the verdict of a reload
that began after the request.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any

import structlog
from msgspec import Struct

from echod.admin.endpoint import Endpoint, ReloadResult
from echod.config.loader import ConfigError
from echod.config.schema import changed_keys
from echod.lifecycle.generation import Generation, Kept, restart_needed
from echod.net.sockets import ListenError
from echod.process.worker_thread import NoThreadError, aside
from echod.server.server import Server
from echod.telemetry.logs import Logs
from echod.telemetry.stats import Stats

Prepare = Callable[[Kept], Generation]

DRAINING = ReloadResult(errors=("draining",))
"""What is told to who asks for a reload once a stop has begun, or whose reload it has interrupted."""

REST_S = 0.1
"""The shortest time between two reloads, so that a flood of requests does not take CPU time from clients."""

log = structlog.get_logger()


class Parts(Struct, frozen=True):
    """What a generation is put in force in."""

    server: Server
    endpoint: Endpoint
    logs: Logs

    def kept(self) -> Kept:
        """What a further generation finds in place."""
        return Kept(dict.fromkeys(self.server.listening), dict.fromkeys(self.endpoint.listening))


class Reloader:
    """Owns the configuration in force from the first generation on."""

    def __init__(self, first: Generation, prepare: Prepare, parts: Parts, stats: Stats) -> None:
        self.config = first.config
        self.restart_needed: tuple[str, ...] = ()
        """The keys whose configured values need a restart to take effect."""
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None
        self._prepare = prepare
        self._parts = parts
        self._stats = stats
        self._wanted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._origin: dict[str, Any] = {}
        self._asked: list[asyncio.Future[ReloadResult]] = []
        self._is_closing = False
        self._worker = asyncio.get_running_loop().create_task(self._work(), name="reloads")

    def request(self, **origin: Any) -> None:
        """Request a reload, after the current one if any. Of several requests, the log names the first `origin`."""
        if not self._wanted.is_set():
            self._origin = origin
        self._idle.clear()
        self._wanted.set()

    @property
    def is_idle(self) -> bool:
        """Whether no reload is under way or asked for."""
        return self._idle.is_set()

    async def idle(self) -> None:
        """Return when no reload is under way or asked for."""
        await self._idle.wait()

    async def verdict(self) -> ReloadResult:
        """Reload as `request` does, and return what came of it."""
        if self._is_closing:
            return DRAINING
        asked: asyncio.Future[ReloadResult] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        self.request(by="admin endpoint")
        return await asked

    async def close(self) -> None:
        """Reload no more; one that is only being prepared is given up."""
        self._is_closing = True
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        if self._wanted.is_set():
            log.info("reload ignored", why="draining")
        _tell(self._asked, DRAINING)

    async def _work(self) -> None:
        while not self._is_closing:
            await self._wanted.wait()
            self._wanted.clear()
            asked, self._asked = self._asked, []
            verdict = DRAINING
            log.info("reload started", **self._origin)
            self.on_begin()
            try:
                verdict = await self._reload()
            finally:
                self.on_end()
                _tell(asked, verdict)
                if not self._wanted.is_set():
                    self._idle.set()
            await asyncio.sleep(REST_S)

    async def _reload(self) -> ReloadResult:
        try:
            return await self._put_in_force(await aside(lambda: self._prepare(self._parts.kept()), Generation.discard))
        except ConfigError as error:
            return self._refuse(error.errors)
        except ListenError as error:
            return self._refuse([f"listen: {error}"])
        except NoThreadError as error:
            return self._refuse([str(error)])
        except asyncio.CancelledError:
            self._refuse(DRAINING.errors)
            raise
        except Exception as error:  # whatever it is, the old configuration serves on
            log.exception("reload failed")
            return self._refuse([repr(error)])

    def _refuse(self, errors: Collection[str]) -> ReloadResult:
        self._stats.reloads_refused += 1
        self._stats.reload_error = "; ".join(errors)
        log.error("reload refused", errors=[*errors])
        return ReloadResult(errors=tuple(errors))

    async def _put_in_force(self, generation: Generation) -> ReloadResult:
        try:
            generation.listen()
            self._parts.endpoint.apply(generation.admin)
            self._parts.server.apply(generation.config, generation.listeners)
        except BaseException:
            generation.discard()
            raise
        changed = changed_keys(self.config, generation.config)
        self.restart_needed = tuple(restart_needed(self._parts.server.listening.values()))
        self.config = generation.config
        self._parts.logs.apply(generation.config.log, generation.log_descriptor)
        self._stats.config_generation += 1
        self._stats.reloads_applied += 1
        self._stats.reload_error = ""
        for warning in generation.warnings:
            log.warning("configuration", warning=warning)
        with suppress(asyncio.CancelledError):  # a stop, which waits for those listeners itself
            await asyncio.gather(self._parts.server.retired(), self._parts.endpoint.retired())
        addresses = self._parts.server.addresses
        log.info("reload applied", changed=changed, restart_needed=self.restart_needed, listen=addresses)
        return ReloadResult(changed=tuple(changed), restart_needed=self.restart_needed)


def _tell(asked: Iterable["asyncio.Future[ReloadResult]"], verdict: ReloadResult) -> None:
    for each in asked:
        if not each.done():  # who asked may be gone
            each.set_result(verdict)
