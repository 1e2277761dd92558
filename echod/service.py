"""The composition root of a service: puts its parts together and runs it to its end.

`__main__` passes in the arguments, the exit statuses, and what ends or replaces the process.
"""

import gc
import os
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module

import msgspec
import structlog
from msgspec import Struct

from echod import __version__
from echod.config.environment import runtime_admin
from echod.config.loader import ConfigError, reader
from echod.config.schema import Config, Log
from echod.config.sources import Serve
from echod.lifecycle import generation, run
from echod.lifecycle.generation import Generation, Kept
from echod.lifecycle.reload import Reloader
from echod.lifecycle.runtime import Runtime
from echod.net import socket_activation
from echod.net.sockets import ListenError
from echod.process import limits, pidfile, privileges, signals
from echod.process.force_exit import LOG_S, ForcedExit
from echod.process.phase import Life, Phase
from echod.process.sd_notify import Notifier, watchdog_s
from echod.process.signals import Action, SignalEvent, SignalQueue
from echod.server import fastpath
from echod.server.server import Server
from echod.telemetry import logs as log_files
from echod.telemetry.logs import STANDARD_ERROR, Logs
from echod.telemetry.stats import Stats
from echod.upgrade import snapshot
from echod.upgrade.coordinator import Handover
from echod.upgrade.exec import NextProgram
from echod.upgrade.snapshot import Predecessor
from echod.upgrade.state_file import ProcessState, State

LOG_FLUSH_S = 1.0
"""How long the process waits at its end for a log reader that is behind."""

_IMPORTED_LATE = (
    "asyncio",
    "difflib",
    "structlog",
    "traceback",
    "uvloop",
    "echod.lifecycle.run",
    "echod.telemetry.greeting",
)

ReportStart = Callable[[int, Sequence[str]], bool]
"""Reports how the start went: an exit status and lines to show. Returns False if nobody waits for it any more."""


class ExitStatuses(Struct, frozen=True, kw_only=True):
    """How the process ends: the exit statuses."""

    ok: int
    could_not_start: int
    aborted: int


class Start(Struct, frozen=True, kw_only=True):
    """What a service is started with."""

    options: Serve
    environment: MutableMapping[str, str]
    directory: str
    """The directory that relative paths refer to."""
    statuses: ExitStatuses
    report: ReportStart
    predecessor: Predecessor | None
    """What the program that ran in this process before has left, after a live upgrade."""
    next_program: NextProgram


def preflight(options: Serve, environment: MutableMapping[str, str], state: State) -> None:
    """Do everything that taking over requires, except serving; raises ConfigError, and whatever an import raises."""
    import uvloop

    load = reader(options.sources, environment, limits.raise_open_files(), state.process.directory)
    outline = snapshot.outline(state)
    prepared = generation.prepare(
        load,
        Kept(outline.listeners, outline.admin_listeners),
        inherited=outline.inherited,
        runtime_admin=runtime_admin(environment),
    )
    try:
        prepared.try_listening()
    except ListenError as error:
        raise generation.PrepareError([f"listen: {error}"]) from error
    finally:
        prepared.discard()
    uvloop.new_event_loop().close()


def serve(start: Start) -> int:
    """Serve until told to stop; return the exit status. Raises what keeps a service from starting."""
    predecessor = start.predecessor
    load = reader(start.options.sources, start.environment, limits.raise_open_files(), start.directory)
    signal_queue = SignalQueue()
    forced_exit = ForcedExit(signal_queue.put, unserved=start.statuses.ok, aborted=start.statuses.aborted)
    if predecessor:
        _take_over_signals(predecessor, forced_exit)
    # The lock is held until the service has ended: once it is released, the next daemon may start.
    with signals.delivered(forced_exit.deliver, forced_exit.seconds_left) as delivery, ExitStack() as at_end:
        lock = _lock(start)
        if lock:
            at_end.callback(lock.release)
        inherited = predecessor.inherited if predecessor else socket_activation.inherit(start.environment, os.getpid())
        prepare = partial(generation.prepare, load, inherited=inherited, runtime_admin=runtime_admin(start.environment))
        first = _first(start, prepare)
        with suppress(OSError):  # no /proc
            limits.rss_bytes()  # opens what it needs while there are free descriptors
        logs = Logs(first.config.log, first.log_descriptor)
        first = msgspec.structs.replace(first, log_descriptor=None)  # from now on the log owns it
        process = ProcessState(
            pid=os.getpid(),
            version=__version__,
            stopped_at=0.0,
            directory=start.directory,
            inherited=[(each.name, each.socket.fileno()) for each in inherited],
            pidfile=(lock.path, lock.descriptor) if lock else None,
            log_dropped=predecessor.state.process.log_dropped if predecessor else 0,
        )
        runtime = Runtime(
            life=Life(),
            signals=signal_queue,
            stop_began_at=lambda: forced_exit.stop_began_at,
            prepare=prepare,
            logs=logs,
            stats=_stats(logs, predecessor),
            open_files=limits.allowed_open_files(),
            notifier=Notifier(start.environment.get("NOTIFY_SOCKET")),
            watchdog_s=watchdog_s(start.environment, os.getpid()),
            handover=Handover(
                next_program=start.next_program,
                process=process,
                delivery=delivery,
                signals=signal_queue,
                log_writer=logs.sink,
            ),
            predecessor=predecessor,
        )
        return _run(start, first, runtime, forced_exit)


def _take_over_signals(predecessor: Predecessor, forced_exit: ForcedExit) -> None:
    """Queue the signals that the predecessor did not handle, before those that the kernel has kept meanwhile."""
    stop_s = _stop_s(predecessor.config)
    forced_exit.serving(lambda: stop_s, flush_log=lambda: None)
    for name, sender_pid in predecessor.state.process.signals:
        if event := signals.event_of(name, sender_pid):
            forced_exit.deliver(event)


def _lock(start: Start) -> pidfile.PidFile | None:
    if start.predecessor and (held := start.predecessor.state.process.pidfile):
        path, descriptor = held
        os.set_inheritable(descriptor, False)
        return pidfile.PidFile(path, descriptor)
    name = start.options.pidfile
    return None if name is None else pidfile.acquire(os.path.join(start.directory, name))


def _first(start: Start, prepare: Callable[..., Generation]) -> Generation:
    """Prepare the first generation."""
    if start.predecessor is None:
        return _prepare_as(privileges.find(start.options.user, start.options.group), prepare)
    # The preflight has succeeded, so an error is new; the predecessor's clients have to be served all the same.
    before = start.predecessor
    try:
        first = prepare(Kept(before.listeners, before.admin_listeners))
    except ConfigError as error:
        return generation.unchanged(before.config, before.listeners, before.admin_listeners, error.errors)
    try:
        first.listen()
    except ListenError as error:
        first.discard()
        return generation.unchanged(before.config, before.listeners, before.admin_listeners, [f"listen: {error}"])
    return first


def _prepare_as(user: privileges.Identity | None, prepare: Callable[..., Generation]) -> Generation:
    """Prepare the first generation, then become `user` for good."""
    if user is None:
        return prepare()

    def open_log(log: Log) -> int | None:
        return privileges.open_for(user, partial(log_files.open_path, log.file)) if log.file else None

    first = prepare(open_log=open_log)
    try:
        for module in _IMPORTED_LATE:  # the user need not be allowed to read them
            import_module(module)
        if first.admin:
            import_module("echod.admin.metrics")
        privileges.drop(user, first.give)
    except BaseException:
        first.discard()
        raise
    return first


def _stats(logs: Logs, predecessor: Predecessor | None) -> Stats:
    dropped_before = predecessor.state.process.log_dropped if predecessor else 0
    stats = Stats(
        {
            "log_dropped": lambda: dropped_before + logs.sink.dropped,
            "rss_bytes": limits.rss_bytes,
            "open_files": limits.open_files,
        },
        is_fast_path=fastpath.IS_COMPILED,
    )
    if predecessor:
        stats.restore(predecessor.state.service.stats)
        stats.upgrades += 1
        stats.config_generation += 1
    return stats


def _run(start: Start, first: Generation, runtime: Runtime, forced_exit: ForcedExit) -> int:
    import asyncio

    import uvloop

    def on_serving(server: Server, reloads: Reloader) -> None:
        gc.freeze()  # what exists now stays, and need not be searched for garbage again and again
        gc.enable()
        forced_exit.serving(lambda: _stop_s(reloads.config), flush_log=lambda: runtime.logs.sink.close(LOG_S))
        if not start.predecessor:
            _announce(start, first, runtime, server.addresses)

    status = start.statuses.could_not_start
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(run.run(first, runtime, on_serving))
        status = start.statuses.aborted if outcome is run.Outcome.ABORTED else start.statuses.ok
    except ListenError as error:
        start.report(status, [f"echod: could not start: listen: {error}"])
    except Exception:
        structlog.get_logger().exception("crashed")
    runtime.life.enter(Phase.STOPPED)
    forced_exit.ended(status)
    structlog.get_logger().info("stopped", exit_status=status)
    left_s = forced_exit.remaining_s() - LOG_S
    runtime.logs.sink.close(min(LOG_FLUSH_S, max(LOG_S, left_s)))
    runtime.notifier.close()
    gc.freeze()  # or the interpreter's end would search every object for garbage: 40 ms
    return status


def _announce(start: Start, first: Generation, runtime: Runtime, addresses: Sequence[str]) -> None:
    """Report that clients are served; stop if nobody waits for that report any more."""
    if os.isatty(STANDARD_ERROR):
        from echod.telemetry.greeting import greeting

        text = greeting(addresses, os.getpid()).encode()
        if runtime.logs.is_at_terminal:
            runtime.logs.sink.write(text)
        else:  # the log is a file
            os.write(STANDARD_ERROR, text)
    warnings = [*first.warnings]
    if start.options.is_daemon and not first.config.log.file:
        warnings.append("log.file is empty: a daemon has no standard error, so its log goes nowhere")
    if not start.report(start.statuses.ok, [f"warning: {warning}" for warning in warnings]):
        structlog.get_logger().warning("start called off", why="nobody waits for the result of the start any more")
        runtime.signals.put(SignalEvent(Action.STOP, "PIPE", 0))


def _stop_s(config: Config) -> float:
    """Return how long a stop may take, apart from what the forced exit adds."""
    return config.timeouts.lame_duck + config.timeouts.drain
