"""A service put together and run to its end: its configuration, signals, log, statistics, and what it was left.

The other half of the composition root: exit statuses, arguments and what ends or replaces the process are handed in.
"""

import gc
import os
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module

import structlog
from msgspec import Struct

from echod import __version__
from echod.config.environment import runtime_admin
from echod.config.loader import ConfigError, reader
from echod.config.schema import Config, Log
from echod.config.sources import Serve
from echod.lifecycle import generation, run
from echod.lifecycle.generation import Generation, Given, Kept
from echod.lifecycle.reload import Prepare, Reloader
from echod.net import socket_activation
from echod.net.sockets import ListenError
from echod.process import limits, pidfile, privileges, signals
from echod.process.force_exit import LAST_WORDS_S, ForcedExit
from echod.process.sd_notify import Notifier, watchdog_s
from echod.process.signals import Action, Delivery, SignalEvent, SignalQueue
from echod.server import fastpath
from echod.server.server import Server
from echod.telemetry import logs as log_files
from echod.telemetry.greeting import greeting
from echod.telemetry.logs import STANDARD_ERROR, Logs
from echod.telemetry.stats import Stats
from echod.upgrade import snapshot
from echod.upgrade.exec import Moment, Replacement
from echod.upgrade.snapshot import Predecessor
from echod.upgrade.state_file import Process, State

LOG_FLUSH_S = 1.0
"""How long the end waits for a log reader that is behind."""

_IMPORTED_LATE = ("asyncio", "difflib", "structlog", "traceback", "uvloop", "echod.lifecycle.run")

Tell = Callable[[int, Sequence[str]], bool]
"""Says how the start went, to whoever asked for it: a status and lines to show. False if nobody waits any more."""


class ExitStatuses(Struct, frozen=True):
    """How the process ends: the exit statuses."""

    ok: int
    could_not_start: int
    aborted: int


class Start(Struct, frozen=True):
    """What a service is started with."""

    options: Serve
    environment: MutableMapping[str, str]
    directory: str
    """Where relative paths are meant from."""
    statuses: ExitStatuses
    tell: Tell
    predecessor: Predecessor | None
    """What the program before us in this process has left, if there was one."""
    command: tuple[tuple[str, ...], tuple[str, ...]]
    """How the next program in this process is started: command, arguments."""
    execute: Callable[..., object]
    """os.execve."""


def preflight(options: Serve, environment: MutableMapping[str, str], left: State) -> None:
    """Do all that a program does that takes over, but serve; raises ConfigError, and whatever an import raises."""
    import uvloop

    load = reader(options.sources, environment, limits.raise_open_files(), left.process.directory)
    there = snapshot.outline(left)
    given = Given(there.inherited, runtime_admin(environment))
    prepared = generation.prepare(load, given, Kept(there.listeners, there.admin))
    try:
        prepared.try_listening()
    except ListenError as error:
        raise generation.PrepareError([f"listen: {error}"]) from error
    finally:
        prepared.discard()
    uvloop.new_event_loop().close()


class _Parts(Struct, frozen=True):
    """What there is beside a generation."""

    start: Start
    signal_queue: SignalQueue
    guard: ForcedExit
    delivery: Delivery
    belongings: Process
    prepare: Prepare


def serve(start: Start) -> int:
    """Serve until told to stop; return the exit status. Raises what keeps a service from starting."""
    load = reader(start.options.sources, start.environment, limits.raise_open_files(), start.directory)
    signal_queue = SignalQueue()
    guard = ForcedExit(signal_queue.put, unserved=start.statuses.ok, aborted=start.statuses.aborted)
    if start.predecessor:  # whose clients are served, but for a moment
        _take_orders(start.predecessor, guard)
    # Around all, for who hears that there is no daemon may start the next one at once.
    with signals.delivered(guard.deliver, guard.seconds_left) as delivery, ExitStack() as at_end:
        lock = _lock(start)
        if lock:
            at_end.callback(lock.release)
        inherited = (
            start.predecessor.inherited
            if start.predecessor
            else socket_activation.inherit(start.environment, os.getpid())
        )
        prepare = partial(generation.prepare, load, Given(inherited, runtime_admin(start.environment)))
        belongings = Process(
            pid=os.getpid(),
            version=__version__,
            left_at=0.0,
            directory=start.directory,
            inherited=[(heir.name, heir.socket.fileno()) for heir in inherited],
            pidfile=(lock.path, lock.descriptor) if lock else None,
            log_dropped=start.predecessor.state.process.log_dropped if start.predecessor else 0,
        )
        return _run(_first(start, prepare), _Parts(start, signal_queue, guard, delivery, belongings, prepare))


def _take_orders(predecessor: Predecessor, guard: ForcedExit) -> None:
    """Follow what the program before us didn't, before what the kernel has kept; a stop may take as long as any."""
    stop_s = _stop_s(predecessor.config)
    guard.serving(lambda: stop_s, last_words=lambda: None)
    for order in filter(None, (signals.order(*each) for each in predecessor.state.process.orders)):
        guard.deliver(order)


def _lock(start: Start) -> pidfile.PidFile | None:
    if start.predecessor and (left := start.predecessor.state.process.pidfile):
        os.set_inheritable(left[1], False)
        return pidfile.PidFile(*left)
    name = start.options.pidfile
    return None if name is None else pidfile.acquire(os.path.join(start.directory, name))


def _first(start: Start, prepare: Callable[..., Generation]) -> Generation:
    if start.predecessor is None:
        return _prepare_as(privileges.find(start.options.user, start.options.group), prepare)
    # What fails now has become so since the preflight: clients have to be served all the same.
    before = start.predecessor
    try:
        first = prepare(Kept(before.listeners, before.admin))
    except ConfigError as error:
        return generation.unchanged(before.config, before.listeners, before.admin, error.errors)
    try:
        first.listen()
    except ListenError as error:
        first.discard()
        return generation.unchanged(before.config, before.listeners, before.admin, [f"listen: {error}"])
    return first


def _prepare_as(user: privileges.Identity | None, prepare: Callable[..., Generation]) -> Generation:
    """The first generation; what it needed root for is done, and we are the user for good."""
    if user is None:
        return prepare()
    first = prepare(open_log=partial(_open_log, user))
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


def _open_log(user: privileges.Identity, log: Log) -> int | None:

    return privileges.open_for(user, partial(log_files.open_path, log.file)) if log.file else None


def _run(first: Generation, parts: _Parts) -> int:
    import asyncio

    import uvloop

    start = parts.start
    with suppress(OSError):  # no /proc
        limits.rss_bytes()  # opens what it needs as long as there are descriptors
    logs = Logs(first.config.log, first.log_descriptor)
    notifier = Notifier(start.environment.get("NOTIFY_SOCKET"))
    around = run.Runtime(
        parts.signal_queue,
        lambda: parts.guard.stop_began_at,
        parts.prepare,
        logs,
        _stats(logs, start.predecessor),
        limits.allowed_open_files(),
        notifier,
        watchdog_s(start.environment, os.getpid()),
        _successor(parts, logs),
        start.predecessor,
        partial(_on_serving, first, parts, logs),
    )
    status = start.statuses.could_not_start
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(run.run(first, around))
        status = start.statuses.aborted if outcome is run.Outcome.ABORTED else start.statuses.ok
    except ListenError as error:
        start.tell(status, [f"echod: could not start: listen: {error}"])
    except Exception:
        structlog.get_logger().exception("crashed")
    parts.guard.ended(status)
    structlog.get_logger().info("stopped", exit_status=status)
    logs.sink.close(min(LOG_FLUSH_S, max(LAST_WORDS_S, parts.guard.remaining_s() - LAST_WORDS_S)))
    notifier.close()
    gc.freeze()  # the interpreter's end would look at every object once more: 40 ms in which nothing happens
    return status


def _stats(logs: Logs, predecessor: Predecessor | None) -> Stats:
    lost_before = predecessor.state.process.log_dropped if predecessor else 0
    stats = Stats(
        {
            "log_dropped": lambda: lost_before + logs.sink.dropped,
            "rss_bytes": limits.rss_bytes,
            "open_files": limits.open_files,
        },
        is_fast_path=fastpath.IS_COMPILED,
    )
    if predecessor:
        stats.resume(predecessor.state.service.stats)
        stats.upgrades += 1
        stats.config_generation += 1
    return stats


def _successor(parts: _Parts, logs: Logs) -> Replacement:
    start = parts.start
    moment = Moment(parts.delivery, parts.signal_queue, logs.sink)
    return Replacement(*start.command, start.environment, parts.belongings, moment, start.execute)


def _on_serving(first: Generation, parts: _Parts, logs: Logs, server: Server, reloads: Reloader) -> None:
    start = parts.start
    gc.freeze()  # what is there now stays: it needn't be looked at again and again
    gc.enable()
    parts.guard.serving(lambda: _stop_s(reloads.config), last_words=lambda: logs.sink.close(LAST_WORDS_S))
    if start.predecessor:
        return
    if logs.is_at_terminal:
        logs.sink.write(greeting(server.addresses, os.getpid()).encode())
    elif os.isatty(STANDARD_ERROR):  # the log is a file, the person is here
        os.write(STANDARD_ERROR, greeting(server.addresses, os.getpid()).encode())
    warnings = (*first.warnings, *_warnings_of_a_daemon(start, first.config))
    if not start.tell(start.statuses.ok, [f"warning: {warning}" for warning in warnings]):
        structlog.get_logger().warning("start called off", why="whoever asked for it doesn't wait any more")
        parts.signal_queue.put(SignalEvent(Action.STOP, "PIPE", 0))


def _stop_s(config: Config) -> float:
    """How long a stop may take, but for what the guard adds."""
    return config.timeouts.lame_duck + config.timeouts.drain


def _warnings_of_a_daemon(start: Start, config: Config) -> list[str]:
    if config.log.file or not start.options.is_daemon:
        return []
    return ["log.file is empty: a daemon has no standard error, so its log goes nowhere"]
