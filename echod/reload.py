"""Reloads, one after the other: prepare a generation aside, then put it in force, or say why not.

Requests that come while one is under way become one more, never a queue.
"""

import asyncio
import threading
from collections.abc import Callable, Collection
from contextlib import suppress

import structlog

from echod.config import changed_keys, restart_needed
from echod.generation import Generation, PrepareError
from echod.logs import Logs
from echod.server import Server
from echod.sockets import Key, ListenError
from echod.stats import Stats

Prepare = Callable[[Collection[Key]], Generation]

log = structlog.get_logger()


class Reloads:
    """Owns the configuration in force from the first generation on."""

    def __init__(self, first: Generation, prepare: Prepare, server: Server, logs: Logs, stats: Stats) -> None:
        self.config = first.config
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None
        self._prepare = prepare
        self._server = server
        self._logs = logs
        self._stats = stats
        self._wanted = asyncio.Event()
        self._is_closing = False
        self._worker = asyncio.get_running_loop().create_task(self._work(), name="reloads")

    def request(self) -> None:
        """Reload, soon: after the one under way, if one is."""
        self._wanted.set()

    async def close(self) -> None:
        """Reload no more; one that is only being prepared is given up."""
        self._is_closing = True
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        while not self._is_closing:
            await self._wanted.wait()
            self._wanted.clear()
            self.on_begin()
            try:
                await self._reload()
            finally:
                self.on_end()

    async def _reload(self) -> None:
        try:
            await self._put_in_force(await _aside(lambda: self._prepare(self._server.keys)))
        except PrepareError as error:
            self._refuse(error.faults)
        except ListenError as error:
            self._refuse([f"listen: {error}"])
        except asyncio.CancelledError:
            self._refuse(["stopping"])
            raise
        except Exception as error:  # whatever it is, the old configuration serves on
            log.exception("reload failed")
            self._refuse([repr(error)])

    def _refuse(self, faults: Collection[str]) -> None:
        self._stats.reloads_refused += 1
        self._stats.reload_error = "; ".join(faults)
        log.error("reload refused", errors=[*faults])

    async def _put_in_force(self, generation: Generation) -> None:
        try:
            self._server.apply(generation.config, generation.listeners)
        except BaseException:
            generation.discard()
            raise
        changed = changed_keys(self.config, generation.config)
        restart = restart_needed(self.config, generation.config)
        self.config = generation.config
        self._logs.apply(generation.config.log, generation.log_descriptor)
        self._stats.config_generation += 1
        self._stats.reloads_applied += 1
        self._stats.reload_error = ""
        for warning in generation.warnings:
            log.warning("configuration", warning=warning)
        with suppress(asyncio.CancelledError):  # a stop, which waits for those listeners itself
            await self._server.retired()
        log.info("reload applied", changed=changed, restart_needed=restart, listen=self._server.addresses)


async def _aside(prepare: Callable[[], Generation]) -> Generation:
    """Run `prepare` in a thread: a slow name server or disk must delay neither clients nor a stop.

    The thread is a daemon and no executor's, which the end of the loop would wait for.
    """
    loop = asyncio.get_running_loop()
    prepared: asyncio.Future[Generation] = loop.create_future()

    def work() -> None:
        try:
            generation = prepare()
        except Exception as error:
            _deliver(loop, _fail, prepared, error)
        else:
            if not _deliver(loop, _fulfil, prepared, generation):
                generation.discard()

    threading.Thread(target=work, name="reload", daemon=True).start()
    try:
        return await prepared
    except asyncio.CancelledError:
        if prepared.done() and not prepared.cancelled() and not prepared.exception():
            prepared.result().discard()  # it arrived in the very turn of the loop that brought the stop
        raise


def _deliver(loop: asyncio.AbstractEventLoop, settle: Callable[..., None], *arguments: object) -> bool:
    """Hand a result to the loop from another thread; False if the loop is closed."""
    try:
        loop.call_soon_threadsafe(settle, *arguments)
    except RuntimeError:
        return False
    return True


def _fulfil(prepared: "asyncio.Future[Generation]", generation: Generation) -> None:
    if prepared.cancelled():
        generation.discard()
    else:
        prepared.set_result(generation)


def _fail(prepared: "asyncio.Future[Generation]", error: Exception) -> None:
    if not prepared.cancelled():
        prepared.set_exception(error)
