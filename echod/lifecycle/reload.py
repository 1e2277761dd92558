"""Reloads, one after the other: prepare a generation in a thread, then put it in force, or say why not.

Requests that arrive during a reload become one more reload, never a queue.
"""

import asyncio
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import structlog

from echod.admin.endpoint import AdminServer, ReloadResult
from echod.config.loader import ConfigError
from echod.config.schema import changed_keys
from echod.lifecycle.generation import Generation, Kept, restart_needed
from echod.lifecycle.runtime import Runtime
from echod.lifecycle.status import status_line
from echod.net.sockets import ListenError
from echod.process import tasks
from echod.process.worker_thread import NoThreadError, in_thread
from echod.server.server import Server

DRAINING = ReloadResult(errors=("draining",))
"""The result of a reload that is requested after a stop has begun, or that the stop interrupts."""

PAUSE_S = 0.1
"""The shortest time between two reloads, so that a flood of requests does not take CPU time from clients."""

log = structlog.get_logger()


class Reloader:
    """Owns the configuration in force from the first generation on."""

    def __init__(self, first: Generation, server: Server, admin_server: AdminServer, runtime: Runtime) -> None:
        self.config = first.config
        self.restart_needed: tuple[str, ...] = ()
        """The keys whose configured values need a restart to take effect."""
        self._server = server
        self._admin_server = admin_server
        self._runtime = runtime
        self._stats = runtime.stats
        self._wanted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._origin: dict[str, Any] = {}
        self._waiting: list[asyncio.Future[ReloadResult]] = []
        self._worker = tasks.background(self._work, "reloads")

    @property
    def status(self) -> str:
        """The status line for the service manager."""
        return status_line(self._server, self._stats, self.restart_needed)

    @property
    def is_idle(self) -> bool:
        """Whether no reload is running or requested."""
        return self._idle.is_set()

    async def idle(self) -> None:
        """Return when no reload is running or requested."""
        await self._idle.wait()

    def request(self, **origin: Any) -> None:
        """Request a reload, after the current one if any. Of several requests, the log names the first `origin`."""
        if not self._wanted.is_set():
            self._origin = origin
        self._idle.clear()
        self._wanted.set()

    async def reload(self, **origin: Any) -> ReloadResult:
        """Request a reload, and return the result of one that began after this request."""
        log.debug("reload requested", **origin)
        if self._runtime.life.is_leaving:
            return DRAINING
        waiting: asyncio.Future[ReloadResult] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self.request(**origin)
        return await waiting

    async def close(self) -> None:
        """Stop reloading because a stop has begun; a reload that is still being prepared is abandoned."""
        await tasks.end([self._worker])
        if self._wanted.is_set():
            log.info("reload ignored", why="draining")
        _resolve(self._waiting, DRAINING)

    async def _work(self) -> None:
        task = asyncio.current_task()
        # `_apply` finishes although it is cancelled, by a stop or by the end of the event loop after a crash.
        while not (self._runtime.life.is_leaving or (task and task.cancelling())):
            await self._wanted.wait()
            self._wanted.clear()
            waiting, self._waiting = self._waiting, []
            result = DRAINING
            log.info("reload started", **self._origin)
            self._runtime.notifier.reloading()
            try:
                result = await self._reload()
            finally:
                self._runtime.notifier.ready(self.status)
                _resolve(waiting, result)
                if not self._wanted.is_set():
                    self._idle.set()
            await asyncio.sleep(PAUSE_S)

    async def _reload(self) -> ReloadResult:
        kept = Kept(dict.fromkeys(self._server.listening), dict.fromkeys(self._admin_server.listening))
        try:
            return await self._apply(await in_thread(lambda: self._runtime.prepare(kept), Generation.discard))
        except ConfigError as error:
            return self._refuse(error.errors)
        except ListenError as error:
            return self._refuse([f"listen: {error}"])
        except NoThreadError as error:
            return self._refuse([str(error)])
        except asyncio.CancelledError:
            self._refuse(DRAINING.errors)
            raise
        except Exception as error:  # whatever it is, the old configuration stays in force
            log.exception("reload failed")
            return self._refuse([repr(error)])

    def _refuse(self, errors: Collection[str]) -> ReloadResult:
        self._stats.reloads_refused += 1
        self._stats.reload_error = "; ".join(errors)
        log.error("reload refused", errors=[*errors])
        return ReloadResult(errors=tuple(errors))

    async def _apply(self, generation: Generation) -> ReloadResult:
        put_in_force(generation, self._server, self._admin_server)
        changed = changed_keys(self.config, generation.config)
        self.restart_needed = tuple(restart_needed(self._server.listening.values()))
        self.config = generation.config
        self._runtime.logs.apply(generation.config.log, generation.log_descriptor)
        self._stats.config_generation += 1
        self._stats.reloads_applied += 1
        self._stats.reload_error = ""
        for warning in generation.warnings:
            log.warning("configuration", warning=warning)
        with suppress(asyncio.CancelledError):  # a stop waits for retiring listeners itself
            await asyncio.gather(self._server.retired(), self._admin_server.retired())
        addresses = self._server.addresses
        log.info("reload applied", changed=changed, restart_needed=self.restart_needed, listen=addresses)
        return ReloadResult(changed=tuple(changed), restart_needed=self.restart_needed)


def put_in_force(generation: Generation, server: Server, admin_server: AdminServer) -> None:
    """Serve with this generation; if that fails, discard it, with nothing changed. Raises ListenError."""
    try:
        generation.listen()
        # Entering a context does everything that can fail; leaving it puts the listeners in force.
        with admin_server.change(generation.admin), server.change(generation.config, generation.listeners):
            pass
    except BaseException:
        generation.discard()
        raise


def _resolve(waiting: "Collection[asyncio.Future[ReloadResult]]", result: ReloadResult) -> None:
    for each in waiting:
        if not each.done():  # the client that waited may be gone
            each.set_result(result)
