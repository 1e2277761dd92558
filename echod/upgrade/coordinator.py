"""Live upgrades: the next program proves itself in a child, then execve(2) replaces this one in the same process.

The steps are those of `Upgrader._upgrade`, from top to bottom. Until the execve succeeds nothing has changed that is
not undone, so whatever fails, this program serves on.
"""

import asyncio
import os
import time
from typing import Protocol

import msgspec
import structlog
from msgspec import Struct

from echod.admin.endpoint import AdminServer
from echod.config.schema import Config
from echod.process import tasks
from echod.process.signals import Action, Delivery, SignalEvent, SignalQueue
from echod.server.server import Server
from echod.telemetry.log_writer import LogWriter
from echod.telemetry.stats import Stats
from echod.upgrade import preflight, snapshot, state_file
from echod.upgrade.exec import NextProgram
from echod.upgrade.preflight import PreflightError
from echod.upgrade.state_file import ProcessState, ServiceState, State

FINISH_S = 5.0
"""How long an upgrade waits for a reload, a retiring listener or an admin client, which cannot cross, to finish."""

FLUSH_S = 0.2
"""How long clients may wait for a log reader that is behind; what it has not taken by then is lost, and counted."""

log = structlog.get_logger()


class Reloads(Protocol):
    """What an upgrade needs to know about reloads."""

    config: Config
    """The configuration in force."""

    @property
    def is_idle(self) -> bool:
        """Whether no reload is running or requested."""

    async def idle(self) -> None:
        """Return when no reload is running or requested."""


class Handover(Struct, frozen=True, kw_only=True):
    """The parts of the process that an upgrade stops, or hands over, whatever is being served."""

    next_program: NextProgram
    process: ProcessState
    delivery: Delivery
    signals: SignalQueue
    log_writer: LogWriter


class Upgrader:
    """Upgrades on request, one upgrade after the other."""

    def __init__(
        self, handover: Handover, server: Server, admin_server: AdminServer, reloads: Reloads, stats: Stats
    ) -> None:
        self._handover = handover
        self._server = server
        self._admin_server = admin_server
        self._reloads = reloads
        self._stats = stats
        self._wanted = asyncio.Event()
        self._worker = tasks.background(self._work, "upgrades")

    def request(self) -> None:
        """Upgrade soon; requests that arrive during an upgrade become one more."""
        self._wanted.set()

    async def close(self) -> None:
        """Stop upgrading because a stop has begun; refuse an upgrade that is running or requested."""
        await tasks.end([self._worker])
        if self._wanted.is_set():
            _refuse("draining")

    async def _work(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._upgrade()
            except PreflightError as error:
                _refuse(*error.errors)
            except TimeoutError:
                _refuse(f"a reload, a retiring listener or an admin client did not finish within {FINISH_S:g} s")
            except OSError as error:
                _refuse(f"{error.filename or 'execve'}: {(error.strerror or str(error)).lower()}")
            except asyncio.CancelledError:
                self._wanted.set()  # for `close`, which refuses it
                raise
            except Exception as error:  # whatever it is, this program serves on
                log.exception("upgrade failed")
                _refuse(repr(error))

    async def _upgrade(self) -> None:
        """Return or raise only if this program serves on."""
        log.info("upgrade proven", by=await self._prove())
        try:
            await self._finish_what_cannot_cross()
            self._replace()
        finally:
            self._admin_server.resume()
            self._server.resume_tls()

    async def _prove(self) -> str:
        """Let the next program show that it could take over; return its name and version.

        Raises PreflightError if it could not, TimeoutError if reloads do not end.
        """
        while True:
            async with asyncio.timeout(FINISH_S):
                await self._reloads.idle()
            generation = self._stats.config_generation
            try:
                return await self._run_preflight()
            except PreflightError:
                if self._reloads.is_idle and generation == self._stats.config_generation:
                    raise
                # A reload has changed the listeners meanwhile, so the next program was given outdated ones.

    async def _run_preflight(self) -> str:
        program = self._handover.next_program
        state = state_file.save(State(self._handover.process, self._service_state()))
        try:
            # It inherits neither listeners nor locks: if we are killed, a child that hangs would keep them.
            return await preflight.prove(program.preflight, program.environment_with(state), [state])
        finally:
            os.close(state)

    async def _finish_what_cannot_cross(self) -> None:
        """Finish TLS connections, reloads, retiring listeners and admin clients; the admin endpoint stays paused."""
        while True:
            if finished := await self._server.finish_tls():
                log.info("TLS connections finished", connections=finished, why="they cannot cross an upgrade")
            async with asyncio.timeout(FINISH_S):
                await self._finish_quick()
            if not self._server.clients.has_tls:  # a reload may have added a listener
                return
            self._admin_server.resume()

    async def _finish_quick(self) -> None:
        """Finish what takes moments: reloads, retiring listeners and admin clients."""
        while True:
            await self._reloads.idle()
            # A client in the backlog of a retiring listener would be reset.
            await asyncio.gather(self._server.retired(), self._admin_server.retired())
            if await self._admin_server.pause() and self._reloads.is_idle:
                return
            self._admin_server.resume()

    def _replace(self) -> None:
        """Save the state and execute the next program; if that fails, raise OSError with nothing changed.

        The event loop does not turn meanwhile, and the kernel keeps the signals.
        """
        stopped_at = time.monotonic()
        self._server.clients.sample()  # the next sweep is the next program's
        with self._handover.delivery.paused():
            pending = self._handover.signals.take()
            again = [SignalEvent(Action.UPGRADE, "USR2", 0)] if self._wanted.is_set() else []
            try:
                self._execute(stopped_at, [*pending, *again])
            finally:
                for event in pending:
                    self._handover.signals.put(event)

    def _execute(self, stopped_at: float, unhandled: list[SignalEvent]) -> None:
        handover, clients = self._handover, self._server.clients
        lost = handover.log_writer.flush(FLUSH_S) + handover.log_writer.dropped
        process = msgspec.structs.replace(
            handover.process,
            stopped_at=stopped_at,
            signals=[(event.signal, event.sender_pid) for event in unhandled],
            log_dropped=handover.process.log_dropped + lost,
        )
        state = State(process, self._service_state())
        saved = state_file.save(state, snapshot.clients(clients))
        try:
            handover.next_program.execute(saved, [*state.descriptors, *snapshot.descriptors(clients)])
        finally:
            os.close(saved)

    def _service_state(self) -> ServiceState:
        return ServiceState(
            listeners=snapshot.listeners(self._server.listening),
            admin_listeners=snapshot.listeners(self._admin_server.listening),
            config=msgspec.to_builtins(self._reloads.config),
            stats=self._stats.save(),
            self_probes=[snapshot.saved_address(name) for name in self._server.clients.self_probe.names],
        )


def _refuse(*errors: str) -> None:
    log.error("upgrade refused", errors=[*errors])
