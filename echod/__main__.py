"""The composition root: parse, load, bind, run, exit. Nothing else in echod knows exit statuses or ends the process."""

# First of all, and before any import that takes time: hold the signals back, so that none ends the process by its
# default action while Python is importing. The C module, because `signal` itself imports enum (5 ms).
import _signal  # type: ignore[import-not-found]

_HELD = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGUSR1, _signal.SIGUSR2)
_signal.pthread_sigmask(_signal.SIG_BLOCK, _HELD)

import gc  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from contextlib import ExitStack, closing, suppress  # noqa: E402
from functools import partial  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

from echod import cli, process  # noqa: E402
from echod.console import complain  # noqa: E402

if TYPE_CHECKING:
    from echod.config import Config
    from echod.generation import Generation
    from echod.guard import Guard
    from echod.reload import Prepare, Reloads
    from echod.server import Server
    from echod.signals import Mailbox

OK = 0
COULD_NOT_START = 1
NO_ANSWER = 1  # of a running daemon, or one that refuses
CUT_OFF = 3
BAD_CONFIG = 78  # EX_CONFIG, sysexits.h

LOG_FLUSH_S = 1.0
"""How long the end waits for a log reader that is behind."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit status."""
    process.fill_standard_streams()
    _name_standard_streams()
    try:
        try:
            invocation = cli.parse(sys.argv[1:] if arguments is None else arguments)
            status = OK if isinstance(invocation, cli.Serve) else _answer(invocation)
        finally:
            sys.stdout.flush()
    except OSError as error:
        return _output_failed(error)
    if isinstance(invocation, cli.Serve):
        return _detach(invocation) if invocation.is_daemon else _serve(invocation, _tell_here)
    return status


def _name_standard_streams() -> None:
    """Python names a stream None if its descriptor was closed."""
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 (as long as the process)


def _output_failed(error: OSError) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail once more
    if not isinstance(error, BrokenPipeError):  # a reader that has enough, as of `echod config | head -1`
        complain([f"echod: standard output: {error.strerror}"])
    return COULD_NOT_START


def _answer(invocation: "cli.Check | cli.ShowDefaults | cli.Ping | cli.AskStats | cli.AskReload") -> int:
    from echod import commands

    _end_by(_HELD)  # held only for a daemon
    if isinstance(invocation, cli.Ping) or (isinstance(invocation, cli.AskStats) and invocation.is_watched):
        for number in (_signal.SIGINT, _signal.SIGTERM):  # they end in good order: with a summary, a clean terminal
            _signal.signal(number, _signal.default_int_handler)
    with suppress(KeyboardInterrupt):  # one more, or before there was anything
        if commands.answer(invocation, os.environ):
            return OK
    return BAD_CONFIG if isinstance(invocation, cli.Check) else NO_ANSWER


def _end_by(signals: Sequence[int]) -> None:
    """Let these signals end the process, even if it was started with them blocked, as in a container for a daemon."""
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, signals)


# -- serve -------------------------------------------------------------------------------------------------------------

Tell = Callable[[int, Sequence[str]], bool]
"""Says how the start went, to whoever asked for it: a status and lines to show. False if nobody waits any more."""


def _detach(serve: cli.Serve) -> int:
    from echod.detach import DetachError, detach

    try:
        folder = os.getcwd()
        caller = detach(partial(_end_by, (_signal.SIGTERM, _signal.SIGINT)), silent_end=COULD_NOT_START)
    except (OSError, DetachError) as error:
        return _refuse(_tell_here, [str(error)])
    try:
        status = _serve(serve, caller.tell, folder)
    except Exception as error:
        _refuse(caller.tell, [repr(error)])
        raise
    _refuse(caller.tell, ["the daemon ended before clients were served; the log may say why"])
    return status


def _tell_here(status: int, lines: Sequence[str]) -> bool:
    from echod.systemd import Notifier

    if status != OK:  # that all is well is in the log, which is here too
        complain(lines)
        # Beside it: of a service that will be tried again, `systemctl status` shows no line from before the failure.
        with closing(Notifier(os.environ.get("NOTIFY_SOCKET"))) as notifier:
            notifier.status("; ".join(lines))
    return True


def _refuse(tell: Tell, faults: Sequence[str]) -> int:
    tell(COULD_NOT_START, [f"echod: could not start: {fault}" for fault in faults])
    return COULD_NOT_START


def _serve(serve: cli.Serve, tell: Tell, folder: str = "") -> int:
    # Imported here, for the other commands don't need them.
    from echod import generation, inheritance, pidfile, privileges, signals, startup
    from echod.guard import Guard

    load = startup.loader(serve.sources, os.environ, process.raise_open_files(), folder)
    if signals.stop_is_pending():
        return OK
    mailbox = signals.Mailbox()
    guard = Guard(mailbox.put, unserved=OK, cut_off=CUT_OFF)
    try:  # around all, for who hears that there is no daemon may start the next one at once
        with signals.delivered(guard.deliver, guard.seconds_left), ExitStack() as at_end:
            if serve.pidfile is not None:
                at_end.callback(pidfile.acquire(os.path.join(folder, serve.pidfile)).release)
            heirs = inheritance.inherit(os.environ, os.getpid())
            prepare = partial(generation.prepare, load, generation.Given(heirs, startup.runtime_admin(os.environ)))
            first = startup.prepare_as(privileges.find(serve.user, serve.group), prepare)
            return _run(first, prepare, mailbox, guard, tell)
    except generation.PrepareError as error:
        if not error.is_configuration:
            return _refuse(tell, error.faults)
        tell(BAD_CONFIG, error.faults)
        return BAD_CONFIG
    except pidfile.PidFileError as error:
        return _refuse(tell, [f"--pidfile: {error}"])
    except (privileges.PrivilegeError, inheritance.UnfitSocketError) as error:
        return _refuse(tell, [str(error)])


def _run(first: "Generation", prepare: "Prepare", mailbox: "Mailbox", guard: "Guard", tell: Tell) -> int:
    import asyncio

    import structlog
    import uvloop

    from echod import lifecycle
    from echod.greeting import greeting
    from echod.logs import STANDARD_ERROR, Logs
    from echod.signals import Command, Order
    from echod.sockets import ListenError
    from echod.stats import Stats
    from echod.systemd import Notifier, watchdog_s

    process.rss_bytes()  # opens what it needs as long as there are descriptors
    logs = Logs(first.config.log, first.log_descriptor)
    stats = Stats(
        {
            "log_dropped": lambda: logs.sink.dropped,
            "rss_bytes": process.rss_bytes,
            "open_files": process.open_files,
        }
    )

    def on_serving(server: "Server", reloads: "Reloads") -> None:
        guard.serving(lambda: reloads.config.timeouts.drain, last_words=lambda: logs.sink.close(LOG_FLUSH_S))
        if logs.is_at_terminal:
            logs.sink.write(greeting(server.addresses, os.getpid()).encode())
        elif os.isatty(STANDARD_ERROR):  # the log is a file, the person is here
            os.write(STANDARD_ERROR, greeting(server.addresses, os.getpid()).encode())
        if not tell(OK, [f"warning: {warning}" for warning in (*first.warnings, *_warnings_of_a_daemon(first.config))]):
            structlog.get_logger().warning("start called off", why="whoever asked for it doesn't wait any more")
            mailbox.put(Order(Command.STOP, "PIPE", 0))

    notifier = Notifier(os.environ.get("NOTIFY_SOCKET"))
    around = lifecycle.Surroundings(
        mailbox.get,
        prepare,
        logs,
        stats,
        process.allowed_open_files(),
        notifier,
        watchdog_s(os.environ, os.getpid()),
        on_serving,
    )
    status = COULD_NOT_START
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(lifecycle.run(first, around))
        status = CUT_OFF if outcome is lifecycle.Outcome.CUT_OFF else OK
    except ListenError as error:
        _refuse(tell, [f"listen: {error}"])
    except Exception:
        structlog.get_logger().exception("crashed")
    structlog.get_logger().info("stopped", exit_status=status)
    logs.sink.close(LOG_FLUSH_S)
    notifier.close()
    gc.freeze()  # the interpreter's end would look at every object once more: 40 ms in which nothing happens
    return status


def _warnings_of_a_daemon(config: "Config") -> list[str]:
    return [] if config.log.file else ["log.file is empty: a daemon has no standard error, so its log goes nowhere"]


if __name__ == "__main__":
    sys.exit(main())
