"""Every command except `serve`. A command returns whether it succeeded; `__main__` chooses the exit status.

Each command imports only what it needs, because a health check starts one every few hundred milliseconds.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from echod.cli import args
from echod.cli.console import STANDARD_OUTPUT, complain, is_screen, show, show_line, wants_colour
from echod.process import limits

if TYPE_CHECKING:
    from echod.config.sources import Sources
    from echod.net.address import Address

Environment = Mapping[str, str]

WATCH_ANSWER_S = 2.0
"""How long `--watch` waits for an answer before it reports that nobody answers."""


def answer(
    invocation: args.Check | args.ShowDefaults | args.Ping | args.AskStats | args.AskReload, environment: Environment
) -> bool:
    """Run the command; return whether it succeeded. Raise OSError if standard output cannot be written."""
    match invocation:
        case args.Check(sources):
            return _check(sources, environment)
        case args.ShowDefaults():
            return _show_defaults(environment)
        case args.Ping():
            return _ping(invocation)
        case args.AskStats() | args.AskReload():
            return _ask(invocation, environment)


def _check(sources: "Sources", environment: Environment) -> bool:
    from echod.config import loader, toml

    try:
        loaded = loader.reader(sources, environment, limits.allowed_open_files())()
    except loader.ConfigError as error:
        complain(error.errors)
        return False
    complain([f"warning: {warning}" for warning in loaded.warnings])
    show(toml.render(loaded.config))
    return True


def _show_defaults(environment: Environment) -> bool:
    from echod.config import loader, toml

    try:
        show(toml.render(loader.defaults(environment), with_comments=True))
    except loader.ConfigError as error:
        complain(error.errors)
        return False
    return True


def _ping(asked: args.Ping) -> bool:
    from echod.client import dial, ping

    try:
        return ping.ping(asked.plan, show_line, as_json=asked.as_json)
    except (dial.UnknownHostError, dial.UnusableFileError) as error:
        complain([f"echod: {error}"])
    return False


def _ask(question: args.AskStats | args.AskReload, environment: Environment) -> bool:
    from echod.client import admin
    from echod.config import loader

    try:
        match question:
            case args.AskStats():
                _stats(question, environment)
            case args.AskReload(target):
                changed, waiting = admin.reload(_admin(target, environment, for_reload=True))
                show_line(f"reload applied: {', '.join(changed) or 'nothing'} changed")
                if waiting:
                    show_line(f"not in force before a restart or an upgrade: {', '.join(waiting)}")
    except loader.ConfigError as error:
        complain(error.errors)
    except admin.RefusedError as error:
        complain([f"echod: reload refused: {message}" for message in error.errors])
    except admin.UnansweredError as error:
        complain([f"echod: {error}"])
    else:
        return True
    return False


def _stats(asked: args.AskStats, environment: Environment) -> None:
    from echod.client import admin

    addresses = _admin(asked.target, environment)
    if asked.is_watched:
        with suppress(KeyboardInterrupt):
            _watch(partial(admin.stats, addresses, WATCH_ANSWER_S), environment, as_json=asked.as_json)
        return
    stats = admin.stats(addresses)
    if asked.as_json:
        import json

        show_line(json.dumps(stats))
    else:
        from echod.cli.stats_table import rendered, table

        in_colour = wants_colour(environment)
        show("".join(f"{rendered(line, None, in_colour=in_colour)}\n" for line in table(stats)))


def _watch(ask: Callable[[], dict[str, Any]], environment: Environment, *, as_json: bool) -> None:
    from echod.cli.stats_watch import JsonLines, Tables, follow
    from echod.cli.terminal import Paper, screen

    first = ask()
    if as_json:
        follow(first, ask, JsonLines(show_line, lambda why: complain([f"echod: {why}"])))
    elif is_screen(environment):
        with screen(show, STANDARD_OUTPUT, in_colour=wants_colour(environment)) as sheet:
            follow(first, ask, Tables(sheet))
    else:
        follow(first, ask, Tables(Paper(show)))


def _admin(target: args.Target, environment: Environment, *, for_reload: bool = False) -> "list[Address]":
    from echod.client import admin
    from echod.config import loader
    from echod.config.environment import runtime_admin
    from echod.config.sources import Sources

    if target.admin:
        return [target.admin]
    # The limit of open files is that of the daemon, not of this process.
    loaded = loader.reader(Sources(target.file, ()), environment, limits.UNLIMITED)()
    return admin.candidates(loaded.config.admin.listen, runtime_admin(environment), for_reload=for_reload)
