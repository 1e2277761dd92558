"""Parse the command line into an `Invocation`; read no file and do nothing else."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from echod import __version__
from echod.client.probe import Plan, TlsOptions
from echod.config.sources import Serve, Setting, Sources
from echod.net.address import Address, SystemdAddress, TcpAddress, UnixAddress, parse_address

LONGEST_LINE = 16_777_216
"""The largest value of limits.line_bytes."""

A_DAY_S = 86_400


class Check(NamedTuple):
    """The arguments of `echod check`."""

    sources: Sources


class ShowDefaults(NamedTuple):
    """`echod config`, which has no arguments."""


class Ping(NamedTuple):
    """The arguments of `echod ping`."""

    plan: Plan
    as_json: bool


class Target(NamedTuple):
    """The daemon to ask: the address of its admin endpoint, or its configuration file."""

    admin: Address | None
    file: str | None


class AskStats(NamedTuple):
    """The arguments of `echod stats`."""

    target: Target
    as_json: bool
    is_watched: bool = False


class AskReload(NamedTuple):
    """The arguments of `echod reload`."""

    target: Target


Invocation = Serve | Check | ShowDefaults | Ping | AskStats | AskReload


def parse(arguments: Sequence[str]) -> Invocation:
    """Parse the arguments. As with argparse, wrong ones exit with status 2, and --help and --version with 0."""
    options = _parser(arguments[0] if arguments else "").parse_args(arguments)
    match options.command:
        case "serve":
            return Serve(_sources(options), options.daemon, options.pidfile, options.user, options.group)
        case "check":
            return Check(_sources(options))
        case "ping":
            plan = Plan(
                options.target, options.count, options.interval, options.wait, options.size, _tls_options(options)
            )
            return Ping(plan, options.json)
        case "stats":
            return AskStats(Target(options.admin, options.config), options.json, options.watch)
        case "reload":
            return AskReload(Target(options.admin, options.config))
        case _:
            return ShowDefaults()


class _CommandParser(argparse.ArgumentParser):
    """The parser of one command; for an unknown argument it shows its own usage, not that of all commands."""

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:  # argparse calls it for a subcommand
        namespace, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


class _Formatter(argparse.HelpFormatter):
    """A formatter with the width of the terminal, without argparse's import of shutil at each start."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_terminal_width() - 2)


def _terminal_width() -> int:
    columns = os.getenv("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    with suppress(OSError, ValueError):
        return os.get_terminal_size().columns or 80
    return 80


class _Command(NamedTuple):
    """The help texts of a command, and the function that adds its options."""

    help: str
    description: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]


def _parser(command: str) -> argparse.ArgumentParser:
    """Return a parser of all commands. Only `command` gets its options, because each costs 0.1 ms of every start."""
    parser = argparse.ArgumentParser(
        prog="echod",
        description="A TCP daemon that answers every line in upper case.",
        epilog="echod COMMAND --help shows the options of a command.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"echod {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_CommandParser)
    for name, about in _COMMANDS.items():
        options = commands.add_parser(
            name,
            help=about.help,
            description=about.description,
            epilog=about.epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        if name == command:
            about.add_options(options)
            options.add_argument("--version", action="version", version=f"echod {__version__}")
    return parser


def _add_stats_options(stats: argparse.ArgumentParser) -> None:
    stats.add_argument("--json", action="store_true", help="print one line of JSON")
    stats.add_argument("--watch", action="store_true", help="print them every second, with rates, until Ctrl-C")
    _add_target(stats)


def _add_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-c", "--config", metavar="FILE", help="read this TOML file (default: $ECHOD_CONFIG, else none)"
    )
    command.add_argument(
        "-l",
        "--listen",
        metavar="ADDRESS",
        action="append",
        help="listen on host:port, [v6]:port, unix:/path or systemd:NAME; repeatable, replaces those of the file",
    )
    for flag, key, choices in (
        ("--log-level", "log.level", "log events from this level on: debug, info, warning, error"),
        ("--log-format", "log.format", "log as auto (console on a terminal, else json), console or json"),
    ):
        command.add_argument(
            flag,
            metavar=key.partition(".")[2].upper(),
            dest="set",
            action="append",
            default=[],
            type=partial(Setting, flag, key),
            help=choices,
        )
    command.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        type=_assignment,
        help="set any key except those of a [[listen]], such as limits.connections=100; repeatable",
    )


def _add_serve_options(serve: argparse.ArgumentParser) -> None:
    _add_sources(serve)
    serve.add_argument(
        "--daemon",
        action="store_true",
        help="detach, and return once clients are served or the start has failed; "
        "set log.file, because a daemon has no standard error",
    )
    serve.add_argument(
        "--pidfile",
        metavar="FILE",
        type=_name,
        help="write the pid to FILE, and refuse to start while another process holds it",
    )
    serve.add_argument(
        "--user", metavar="USER", type=_name, help="become this user (name or number) once the ports are bound"
    )
    serve.add_argument("--group", metavar="GROUP", type=_name, help="become this group instead of the user's own")


def _name(text: str) -> str:
    """Reject an empty value, which usually comes from an unset variable of a script."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a name (got {text!r})")
    return text


def _add_ping_options(ping: argparse.ArgumentParser) -> None:
    ping.add_argument("target", metavar="ADDRESS", type=_to_connect_to, help="host:port, [v6]:port or unix:/path")
    ping.add_argument(
        "-c", dest="count", metavar="COUNT", type=_count, help="stop after COUNT round trips (default: at Ctrl-C)"
    )
    ping.add_argument(
        "-i",
        dest="interval",
        metavar="SECONDS",
        type=_seconds,
        default=1.0,
        help="interval between round trips (default: 1)",
    )
    ping.add_argument(
        "-W", dest="wait", metavar="SECONDS", type=_wait, default=5.0, help="time to wait for a reply (default: 5)"
    )
    ping.add_argument(
        "-s",
        dest="size",
        metavar="BYTES",
        type=_size,
        default=56,
        help="length of the line to send, without its LF (default: 56)",
    )
    ping.add_argument(
        "--json", action="store_true", help="print a line of JSON for each round trip and for the summary"
    )
    ping.add_argument("--tls", action="store_true", help="use TLS, and verify the server's certificate")
    for flag, metavar, what in (
        ("--ca", "FILE", "trust the CAs in this PEM file (default: those of the system)"),
        ("--cert", "FILE", "present this client certificate, in PEM"),
        ("--key", "FILE", "private key of --cert, in PEM (default: in the same file)"),
        ("--server-name", "NAME", "expect this name in the server's certificate (default: the host of ADDRESS)"),
    ):
        ping.add_argument(flag, metavar=metavar, type=_name, help=what)
    ping.add_argument("--insecure", action="store_true", help="accept any certificate")
    ping.set_defaults(usage_error=ping.error)


def _tls_options(options: argparse.Namespace) -> TlsOptions | None:
    """Return the TLS options of ping; options that do not go together are wrong usage, which ends the process."""
    host = options.target.host if isinstance(options.target, TcpAddress) else ""
    given = (options.ca, options.cert, options.key, options.server_name)
    ca, certificate, key, name = (text or "" for text in given)
    tls = TlsOptions(ca, certificate, key, name or host, options.insecure)
    if not options.tls:
        if any(given) or options.insecure:
            options.usage_error("--ca, --cert, --key, --server-name and --insecure need --tls")
        return None
    if tls.key and not tls.certificate:
        options.usage_error("--key needs --cert")
    if tls.ca and tls.is_insecure:
        options.usage_error("--insecure accepts any certificate: leave out --ca")
    if not (tls.server_name or tls.is_insecure):
        options.usage_error("a Unix socket has no name that a certificate could be for: give --server-name")
    return tls


def _to_connect_to(text: str) -> TcpAddress | UnixAddress:
    match _address(text):
        case SystemdAddress():
            raise argparse.ArgumentTypeError(
                f"only the process that inherited the socket knows its address (got {text!r})"
            )
        case TcpAddress(port=0):
            raise argparse.ArgumentTypeError(f"cannot connect to port 0 (got {text!r})")
        case address:
            return address


def _count(text: str) -> int:
    return int(_number(text, 1, 10**18, is_whole=True))


def _size(text: str) -> int:
    return int(_number(text, 0, LONGEST_LINE, is_whole=True))


def _seconds(text: str) -> float:
    return _number(text, 0, A_DAY_S)


def _wait(text: str) -> float:
    return _number(text, 0.001, A_DAY_S)


def _number(text: str, least: float, most: float, *, is_whole: bool = False) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most or (is_whole and not number.is_integer()):
        kind = "a whole number" if is_whole else "a number"
        raise argparse.ArgumentTypeError(f"expected {kind} from {least:g} to {most} (got {text!r})")
    return number


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--admin",
        metavar="ADDRESS",
        type=_address,
        help="admin endpoint of the daemon, unix:/path or host:port "
        "(default: admin.listen of its configuration, else $RUNTIME_DIRECTORY/admin)",
    )
    command.add_argument(
        "-c", "--config", metavar="FILE", help="TOML file of the daemon (default: $ECHOD_CONFIG, else none)"
    )


def _address(text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} (got {text!r})") from error


def _assignment(text: str) -> Setting:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, such as limits.connections=100 (got {text!r})")
    return Setting("--set", key.strip(), value)


def _sources(options: argparse.Namespace) -> Sources:
    flags = [*options.set]
    if options.listen:
        flags.append(Setting("--listen", "listen", options.listen))
    return Sources(options.config, tuple(flags))


_COMMANDS = {
    "serve": _Command(
        "serve clients until a signal, in the foreground or as a daemon",
        "Serve clients until a signal. TERM and INT drain and stop, HUP reloads, USR1 logs the statistics, "
        "USR2 upgrades in place.",
        "exit status: 0 every client got every reply it was owed, 3 some client was aborted, "
        "1 could not start, 78 bad configuration, 2 wrong usage",
        _add_serve_options,
    ),
    "check": _Command(
        "validate the configuration; print it, or every error",
        "Read the configuration as serve would, without binding anything; print it as TOML, or every error.",
        "exit status: 0 valid, 78 invalid, 2 wrong usage",
        _add_sources,
    ),
    "config": _Command(
        "print the default configuration, with a comment for every key",
        "Print the default configuration, with a comment for every key.",
        "exit status: 0",
        lambda _: None,
    ),
    "ping": _Command(
        "measure round trips to an echod, as ping(8) does",
        "Send lines to an echod, check every reply and report the round-trip times, as ping(8) does.",
        "exit status: 0 all answered correctly, 1 otherwise, 2 wrong usage",
        _add_ping_options,
    ),
    "stats": _Command(
        "print the statistics of a running echod",
        "Print the statistics of a running echod.",
        "exit status: 0 printed, 1 nobody answers, 2 wrong usage",
        _add_stats_options,
    ),
    "reload": _Command(
        "make a running echod reload its configuration; print what changed, or every error",
        "Make a running echod reload its configuration, wait for the result and print it.",
        "exit status: 0 in force, 1 refused or nobody answers, 2 wrong usage",
        _add_target,
    ),
}
