"""Reloads, one after the other: prepare a generation aside, then put it in force, or say why not.

Requests that come while one is under way become one more, never a queue.
"""

import asyncio
import threading
from collections.abc import Callable, Collection

import structlog

from echod.config import changed_keys
from echod.generation import Generation, PrepareError
from echod.logs import Logs
from echod.server import Server
from echod.sockets import Key
from echod.stats import Stats

Prepare = Callable[[Collection[Key]], Generation]

log = structlog.get_logger()


class Reloads:
    """Owns the configuration in force from the first generation on."""

    def __init__(self, first: Generation, prepare: Prepare, server: Server, logs: Logs, stats: Stats) -> None:
        self.config = first.config
        self._prepare = prepare
        self._server = server
        self._logs = logs
        self._stats = stats
        self._wanted = asyncio.Event()
        self._worker = asyncio.get_running_loop().create_task(self._work(), name="reloads")

    def request(self) -> None:
        """Reload, soon: after the one under way, if one is."""
        self._wanted.set()

    async def close(self) -> None:
        """Reload no more; one that is only being prepared is given up."""
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                generation = await _aside(lambda: self._prepare(self._server.keys))
            except PrepareError as error:
                self._refuse(error.faults)
            except Exception as error:  # whatever it is, the old configuration serves on
                log.exception("reload failed")
                self._refuse([repr(error)])
            else:
                await self._put_in_force(generation)

    def _refuse(self, faults: Collection[str]) -> None:
        self._stats.reloads_refused += 1
        self._stats.reload_error = "; ".join(faults)
        log.error("reload refused", errors=[*faults])

    async def _put_in_force(self, generation: Generation) -> None:
        changed = changed_keys(self.config, generation.config)
        self.config = generation.config
        self._logs.apply(generation.config.log, generation.log_descriptor)
        self._server.apply(generation.config, generation.listeners)
        self._stats.config_generation += 1
        self._stats.reloads_applied += 1
        self._stats.reload_error = ""
        for warning in generation.warnings:
            log.warning("configuration", warning=warning)
        try:
            await self._server.retired()
        finally:
            log.info("reload applied", changed=changed, listen=self._server.addresses)


async def _aside(prepare: Callable[[], Generation]) -> Generation:
    """Run `prepare` in a thread: a slow name server or disk must delay neither clients nor a stop.

    The thread is a daemon and no executor's, which the end of the loop would wait for.
    """
    loop = asyncio.get_running_loop()
    prepared: asyncio.Future[Generation] = loop.create_future()

    def deliver(generation: Generation | None, error: Exception | None) -> None:
        if prepared.cancelled():
            if generation:
                generation.discard()
        elif generation:
            prepared.set_result(generation)
        elif error:
            prepared.set_exception(error)

    def work() -> None:
        try:
            generation, failed = prepare(), None
        except Exception as error:
            generation, failed = None, error
        try:
            loop.call_soon_threadsafe(deliver, generation, failed)
        except RuntimeError:  # the loop is closed
            if generation:
                generation.discard()

    threading.Thread(target=work, name="reload", daemon=True).start()
    return await prepared
