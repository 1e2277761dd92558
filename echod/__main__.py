"""The entry point: runs a command and chooses the exit status. Nothing else in echod knows exit statuses."""

from echod.process import blocked_signals  # isort: split

import _signal  # type: ignore[import-not-found]
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING

from echod import __version__
from echod.cli import args
from echod.cli.console import complain, show_line
from echod.config.sources import Serve
from echod.process import limits

if TYPE_CHECKING:
    from echod.service import ReportStart
    from echod.upgrade.snapshot import Predecessor

OK = 0
COULD_NOT_START = 1
NO_ANSWER = 1  # a running daemon did not answer, or it refused
ABORTED = 3
BAD_CONFIG = 78  # EX_CONFIG, sysexits.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit status."""
    limits.fill_standard_streams()
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    is_preflight = words[:1] == ["preflight"]  # run by an upgrade, not by people
    if is_preflight:
        del words[0]
    try:
        try:
            invocation = args.parse(words)
            status = OK if isinstance(invocation, Serve) else _answer(invocation)
        finally:
            sys.stdout.flush()
    except OSError as error:
        return _output_failed(error)
    if not isinstance(invocation, Serve):
        return status
    # Imports create objects by the ten thousand and no garbage, and each collection visits all of them: a tenth of the
    # start. `service` switches it on again once clients are served.
    gc.disable()
    if is_preflight:
        return _preflight(invocation)
    if invocation.is_daemon and not _is_upgraded():
        return _detach(invocation)
    return _serve(invocation, _report_here)


def _output_failed(error: OSError) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit would fail again
    if not isinstance(error, BrokenPipeError):  # the reader has closed, as in `echod config | head -1`
        complain([f"echod: standard output: {error.strerror}"])
    return COULD_NOT_START


def _answer(invocation: "args.Check | args.ShowDefaults | args.Ping | args.AskStats | args.AskReload") -> int:
    from echod.cli import commands

    _end_by(blocked_signals.BLOCKED)  # only a daemon handles them
    if isinstance(invocation, args.Ping) or (isinstance(invocation, args.AskStats) and invocation.is_watched):
        for number in (_signal.SIGINT, _signal.SIGTERM):  # they end with a summary and a clean terminal
            _signal.signal(number, _signal.default_int_handler)
    with suppress(KeyboardInterrupt):  # a second signal, or one before anything was printed
        if commands.answer(invocation, os.environ):
            return OK
    return BAD_CONFIG if isinstance(invocation, args.Check) else NO_ANSWER


def _end_by(signals: Sequence[int]) -> None:
    """Let these signals end the process, even if it was started with them blocked, as a container may do."""
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # Ctrl-C ends the process without a traceback
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, signals)


# -- serve -------------------------------------------------------------------------------------------------------------


def _detach(serve: Serve) -> int:
    from echod.process.daemonize import DetachError, detach

    try:
        directory = limits.working_directory()
        caller = detach(partial(_end_by, (_signal.SIGTERM, _signal.SIGINT)), silent_end=COULD_NOT_START)
    except (OSError, DetachError) as error:
        return _refuse(_report_here, [str(error)])
    try:
        status = _serve(serve, caller.tell, directory)
    except Exception as error:
        _refuse(caller.tell, [repr(error)])
        raise
    _refuse(caller.tell, ["the daemon ended before clients were served; the log may say why"])
    return status


def _report_here(status: int, lines: Sequence[str]) -> bool:
    from echod.process.sd_notify import Notifier

    if status != OK:  # success is reported by the log, on the same standard error
        complain(lines)
        # For `systemctl status`, which shows no log lines of a failed start once the unit is being restarted.
        with closing(Notifier(os.environ.get("NOTIFY_SOCKET"))) as notifier:
            notifier.status("; ".join(lines))
    return True


def _refuse(report: "ReportStart", errors: Sequence[str]) -> int:
    report(COULD_NOT_START, [f"echod: could not start: {message}" for message in errors])
    return COULD_NOT_START


def _serve(serve: Serve, report: "ReportStart", directory: str = "") -> int:
    # Imported here, because the other commands do not need them.
    from echod.config.loader import ConfigError
    from echod.lifecycle import generation
    from echod.net import socket_activation
    from echod.process import pidfile, privileges, signals
    from echod.upgrade import state_file

    if not _is_upgraded() and signals.stop_is_pending():
        return OK
    try:
        return _start(serve, report, directory)
    except generation.PrepareError as error:
        return _refuse(report, error.errors)
    except ConfigError as error:
        report(BAD_CONFIG, error.errors)
        return BAD_CONFIG
    except pidfile.PidFileError as error:
        return _refuse(report, [f"--pidfile: {error}"])
    except (privileges.PrivilegeError, socket_activation.UnusableSocketError, state_file.HandoverError) as error:
        return _refuse(report, [str(error)])


def _start(serve: Serve, report: "ReportStart", directory: str) -> int:
    from echod import service
    from echod.upgrade.exec import NextProgram, command_line

    # If our parent left SIGCHLD ignored, the kernel discards how a child ended (wait(2)), and Python would take a
    # preflight that failed for one that succeeded.
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    predecessor = _predecessor()
    directory = (predecessor.state.process.directory if predecessor else directory) or limits.working_directory()
    arguments = sys.argv[1:]
    next_program = NextProgram(
        command=command_line(sys.orig_argv, arguments, sys.executable, directory),
        arguments=tuple(arguments),
        environment=os.environ,
        execve=os.execve,
    )
    start = service.Start(
        options=serve,
        environment=os.environ,
        directory=directory,
        statuses=service.ExitStatuses(ok=OK, could_not_start=COULD_NOT_START, aborted=ABORTED),
        report=report,
        predecessor=predecessor,
        next_program=next_program,
    )
    return service.serve(start)


def _is_upgraded() -> bool:
    from echod.upgrade import state_file

    return bool(os.environ.get(state_file.VARIABLE))


def _predecessor() -> "Predecessor | None":
    from echod.upgrade import snapshot, state_file

    received = state_file.receive(os.environ, os.getpid())
    os.environ.pop(state_file.VARIABLE, None)  # children must not see it
    return snapshot.predecessor(*received) if received else None


def _preflight(serve: Serve) -> int:
    from echod import service
    from echod.config.loader import ConfigError
    from echod.lifecycle import generation
    from echod.upgrade import state_file

    _end_by(blocked_signals.BLOCKED)
    try:
        received = state_file.receive(os.environ, os.getppid())
        if not received:
            return _refuse(_report_here, ["preflight is part of an upgrade; send USR2 to a running echod"])
        del os.environ[state_file.VARIABLE]
        state, _ = received
        service.preflight(serve, os.environ, state)
    except ConfigError as error:
        complain(error.errors)
        return COULD_NOT_START if isinstance(error, generation.PrepareError) else BAD_CONFIG
    except state_file.HandoverError as error:
        return _refuse(_report_here, [str(error)])
    show_line(f"echod {__version__}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
