"""The command line: arguments to what shall be done. Reads no file and does nothing itself."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from echod import __version__
from echod.client.probe import Plan
from echod.config.sources import Serve, Setting, Sources
from echod.net.address import Address, SystemdAddress, TcpAddress, UnixAddress, parse_address

LONGEST_LINE = 16_777_216
"""What limits.line_bytes can be at most."""

A_DAY_S = 86_400


class Check(NamedTuple):
    """`echod check`"""

    sources: Sources


class ShowDefaults(NamedTuple):
    """`echod config`"""


class Ping(NamedTuple):
    """`echod ping`"""

    plan: Plan
    as_json: bool


class Target(NamedTuple):
    """Which daemon to ask: at an address, or the one that a configuration file tells of."""

    admin: Address | None
    file: str | None


class AskStats(NamedTuple):
    """`echod stats`"""

    target: Target
    as_json: bool
    is_watched: bool = False


class AskReload(NamedTuple):
    """`echod reload`"""

    target: Target


Invocation = Serve | Check | ShowDefaults | Ping | AskStats | AskReload


def parse(arguments: Sequence[str]) -> Invocation:
    """What the arguments ask for. Wrong ones, --help and --version end the process as argparse does: 2, 0, 0."""
    options = _parser(arguments[0] if arguments else "").parse_args(arguments)
    match options.command:
        case "serve":
            return Serve(_sources(options), options.daemon, options.pidfile, options.user, options.group)
        case "check":
            return Check(_sources(options))
        case "ping":
            plan = Plan(options.target, options.count, options.interval, options.wait, options.size)
            return Ping(plan, options.json)
        case "stats":
            return AskStats(Target(options.admin, options.config), options.json, options.watch)
        case "reload":
            return AskReload(Target(options.admin, options.config))
        case _:
            return ShowDefaults()


class _CommandParser(argparse.ArgumentParser):
    """The arguments of one command: what it doesn't know is told with its own usage, not that of all commands."""

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:  # argparse calls this one for a command
        namespace, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


class _Formatter(argparse.HelpFormatter):
    """As wide as the terminal. argparse would import shutil to learn that, at each start."""

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
    """What the help says of a command, and its options."""

    help: str
    description: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]


def _parser(command: str) -> argparse.ArgumentParser:
    """A parser of every command; only `command`, if it is one, gets its options: each costs a start 0.1 ms."""
    parser = argparse.ArgumentParser(
        prog="echod",
        description="A TCP daemon that answers every line in upper case.",
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


def _add_serve_options(serve: argparse.ArgumentParser) -> None:
    _add_sources(serve)
    _add_process(serve)


def _add_stats_options(stats: argparse.ArgumentParser) -> None:
    stats.add_argument("--json", action="store_true", help="one line of JSON")
    stats.add_argument("--watch", action="store_true", help="each second, with how fast it grows, until Ctrl-C")
    _add_target(stats)


def _add_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument("-c", "--config", metavar="FILE", help="read this TOML file (else ECHOD_CONFIG, else none)")
    command.add_argument(
        "-l",
        "--listen",
        metavar="ADDRESS",
        action="append",
        help="host:port, [v6]:port, unix:/path or systemd:NAME; repeatable, replaces the file's",
    )
    for flag, key, choices in (
        ("--log-level", "log.level", "debug, info, warning, error"),
        ("--log-format", "log.format", "auto, console, json"),
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
        help="any key but those of a [[listen]], such as limits.connections=100; repeatable",
    )


def _add_process(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--daemon",
        action="store_true",
        help="detach, and return once clients are served (exit status 0) or it is known why they won't be; "
        "set log.file, for a daemon has no standard error",
    )
    serve.add_argument(
        "--pidfile",
        metavar="FILE",
        type=_name,
        help="write the pid to FILE, and refuse to start if the one that did is still running",
    )
    serve.add_argument(
        "--user", metavar="USER", type=_name, help="become this user, name or number, once the ports are bound"
    )
    serve.add_argument("--group", metavar="GROUP", type=_name, help="and this group, instead of the user's own")


def _name(text: str) -> str:
    """An option's value that must say something: an empty one is a variable that nobody has set."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a name (got {text!r})")
    return text


def _add_plan(ping: argparse.ArgumentParser) -> None:
    ping.add_argument("target", metavar="ADDRESS", type=_to_connect_to, help="host:port, [v6]:port or unix:/path")
    ping.add_argument(
        "-c", dest="count", metavar="COUNT", type=_count, help="stop after COUNT round trips (else Ctrl-C)"
    )
    ping.add_argument(
        "-i", dest="interval", metavar="SECONDS", type=_seconds, default=1.0, help="between two of them (1)"
    )
    ping.add_argument("-W", dest="wait", metavar="SECONDS", type=_wait, default=5.0, help="wait for a reply (5)")
    ping.add_argument(
        "-s", dest="size", metavar="BYTES", type=_size, default=56, help="of the line to send, without its LF (56)"
    )
    ping.add_argument("--json", action="store_true", help="a line of JSON for each, and one for the whole")


def _to_connect_to(text: str) -> TcpAddress | UnixAddress:
    match _address(text):
        case SystemdAddress():
            raise argparse.ArgumentTypeError(f"only the process that was handed the socket knows where it is ({text})")
        case TcpAddress(port=0):
            raise argparse.ArgumentTypeError(f"port 0 can't be connected to (got {text!r})")
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
        help="its admin endpoint, unix:/path or host:port (else admin.listen in FILE, else $RUNTIME_DIRECTORY/admin)",
    )
    command.add_argument("-c", "--config", metavar="FILE", help="its TOML file (else ECHOD_CONFIG, else none)")


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
        "run until a signal, in the foreground or as a daemon",
        "Run until a signal. TERM and INT drain and stop, HUP reloads, USR1 logs the statistics, "
        "USR2 upgrades in place.",
        "exit status: 0 every client got what it was owed, 3 some client was cut off, "
        "1 could not start, 78 bad configuration, 2 usage",
        _add_serve_options,
    ),
    "check": _Command(
        "read the configuration as serve would; print it, or every fault",
        "Read the configuration as serve would, bind nothing; print it (TOML), or every fault.",
        "exit status: 0 valid, 78 not",
        _add_sources,
    ),
    "config": _Command(
        "print the default configuration, every key with a comment",
        "Print the default configuration, every key with a comment.",
        "exit status: 0",
        lambda _: None,
    ),
    "ping": _Command(
        "ask an echod again and again, and tell how long each reply took, as ping(8)",
        "Ask an echod again and again, check every reply, and tell how long it took, as ping(8).",
        "exit status: 0 all answered right, 1 otherwise, 2 usage",
        _add_plan,
    ),
    "stats": _Command(
        "print the statistics of a running echod",
        "Print the statistics of a running echod.",
        "exit status: 0, 1 nobody answers, 2 usage",
        _add_stats_options,
    ),
    "reload": _Command(
        "have a running echod reload its configuration; print what changed, or every fault",
        "Have a running echod reload its configuration, wait for the verdict and print it.",
        "exit status: 0 in force, 1 refused or nobody answers, 2 usage",
        _add_target,
    ),
}
