"""The composition root: parse, load, bind, run, exit. Nothing else in echod knows exit statuses or ends the process."""

# First of all, and before any import that takes time: hold the signals back, so that none ends the process by its
# default action while Python is importing. The C module, because `signal` itself imports enum (5 ms).
import _signal  # type: ignore[import-not-found]

_HELD = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGUSR1, _signal.SIGUSR2)
_signal.pthread_sigmask(_signal.SIG_BLOCK, _HELD)

import gc  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from contextlib import suppress  # noqa: E402
from functools import partial  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

from echod import cli, process, settings, toml  # noqa: E402
from echod.config import Config  # noqa: E402

if TYPE_CHECKING:
    from echod.generation import Generation
    from echod.guard import Guard
    from echod.reload import Prepare, Reloads
    from echod.server import Server
    from echod.signals import Mailbox

OK = 0
COULD_NOT_START = 1
CUT_OFF = 3
BAD_CONFIG = 78  # EX_CONFIG, sysexits.h

LOG_FLUSH_S = 1.0
"""How long the end waits for a log reader that is behind."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit status."""
    process.fill_standard_streams()
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (None if the descriptor was closed)
    try:
        try:
            invocation = cli.parse(sys.argv[1:] if arguments is None else arguments)
            status = OK if isinstance(invocation, cli.Serve) else _answer(invocation)
        finally:
            sys.stdout.flush()
    except OSError as error:
        return _output_failed(error)
    if isinstance(invocation, cli.Serve):
        return _serve(_loader(invocation.sources, process.raise_open_files()))
    return status


def _output_failed(error: OSError) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail once more
    if not isinstance(error, BrokenPipeError):  # a reader that has enough, as of `echod config | head -1`
        _complain([f"echod: standard output: {error.strerror}"])
    return COULD_NOT_START


def _answer(invocation: "cli.Check | cli.ShowDefaults") -> int:
    # Held only for a daemon; whoever started this with them blocked, as an entry point in a container may, means so.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, _HELD)
    match invocation:
        case cli.Check(sources):
            return _check(sources)
        case cli.ShowDefaults():
            _print(toml.render(Config(), with_comments=True))
            return OK


def _loader(sources: cli.Sources, open_files: int) -> "partial[settings.Loaded]":
    file = (os.environ.get("ECHOD_CONFIG") or None) if sources.file is None else sources.file
    return partial(settings.load, file, os.environ, sources.flags, open_files)


def _check(sources: cli.Sources) -> int:
    try:
        loaded = _loader(sources, process.allowed_open_files())()
    except settings.ConfigError as error:
        _complain(error.faults)
        return BAD_CONFIG
    _complain([f"warning: {warning}" for warning in loaded.warnings])
    _print(toml.render(loaded.config))
    return OK


def _print(text: str) -> None:
    """UTF-8 whatever the locale: that is what TOML is."""
    sys.stdout.buffer.write(text.encode())


def _serve(load: "partial[settings.Loaded]") -> int:
    # Imported here, for the other commands don't need them.
    from echod import generation, inheritance, signals, systemd
    from echod.guard import Guard

    if signals.stop_is_pending():
        return OK
    mailbox = signals.Mailbox()
    guard = Guard(mailbox.put, unserved=OK, cut_off=CUT_OFF)
    with signals.delivered(guard.deliver, guard.seconds_left):
        try:
            prepare = partial(
                generation.prepare, load, inheritance.adopt(systemd.take_sockets(os.environ, os.getpid()))
            )
            first = prepare()
        except inheritance.UnfitSocketError as error:
            return _could_not_start([f"echod: could not start: {error}"])
        except generation.PrepareError as error:
            if error.is_configuration:
                return _could_not_start(error.faults, BAD_CONFIG)
            return _could_not_start([f"echod: could not start: {fault}" for fault in error.faults])
        return _run(first, prepare, mailbox, guard)


def _could_not_start(faults: Sequence[str], status: int = COULD_NOT_START) -> int:
    from echod.systemd import Notifier

    _complain(faults)
    # Beside the log: of a service that will be tried again, `systemctl status` shows no line from before the failure.
    notifier = Notifier(os.environ.get("NOTIFY_SOCKET"))
    notifier.status("; ".join(faults))
    notifier.close()
    return status


def _run(first: "Generation", prepare: "Prepare", mailbox: "Mailbox", guard: "Guard") -> int:
    import asyncio

    import structlog
    import uvloop

    from echod import lifecycle
    from echod.greeting import greeting
    from echod.logs import STANDARD_ERROR, Logs
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
    except Exception:
        structlog.get_logger().exception("crashed")
    structlog.get_logger().info("stopped", exit_status=status)
    logs.sink.close(LOG_FLUSH_S)
    notifier.close()
    gc.freeze()  # the interpreter's end would look at every object once more: 40 ms in which nothing happens
    return status


def _complain(faults: Sequence[str]) -> None:
    text = "".join(f"{fault}\n" for fault in faults)
    with suppress(OSError):  # nobody reads standard error: the exit status says it all the same
        os.write(2, text.encode(errors="backslashreplace"))


if __name__ == "__main__":
    sys.exit(main())
