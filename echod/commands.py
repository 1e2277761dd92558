"""The commands that are no daemon: each says what came of it; which exit status that is, `__main__` knows.

Each imports what it needs, for a health check starts one every few hundred milliseconds.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from echod import cli, process
from echod.console import STANDARD_OUTPUT, complain, is_screen, show, show_line, wants_colour

if TYPE_CHECKING:
    from echod.address import Address
    from echod.sources import Sources

Environment = Mapping[str, str]

WATCH_ANSWER_S = 2.0
"""How long `--watch` waits for one answer before it says that there is none."""


def answer(
    invocation: cli.Check | cli.ShowDefaults | cli.Ping | cli.AskStats | cli.AskReload, environment: Environment
) -> bool:
    """Do it; return whether it went well. Raises OSError if standard output can't be written."""
    match invocation:
        case cli.Check(sources):
            return _check(sources, environment)
        case cli.ShowDefaults():
            return _show_defaults(environment)
        case cli.Ping():
            return _ping(invocation)
        case cli.AskStats() | cli.AskReload():
            return _ask(invocation, environment)


def _check(sources: "Sources", environment: Environment) -> bool:
    from echod import settings, startup, toml

    try:
        loaded = startup.loader(sources, environment, process.allowed_open_files())()
    except settings.ConfigError as error:
        complain(error.faults)
        return False
    complain([f"warning: {warning}" for warning in loaded.warnings])
    show(toml.render(loaded.config))
    return True


def _show_defaults(environment: Environment) -> bool:
    from echod import settings, toml

    try:
        show(toml.render(settings.defaults(environment), with_comments=True))
    except settings.ConfigError as error:
        complain(error.faults)
        return False
    return True


def _ping(asked: cli.Ping) -> bool:
    from echod import dial, ping

    try:
        return ping.ping(asked.plan, show_line, as_json=asked.as_json)
    except dial.UnknownHostError as error:
        complain([f"echod: {error}"])
    return False


def _ask(question: cli.AskStats | cli.AskReload, environment: Environment) -> bool:
    from echod import ask, settings

    try:
        match question:
            case cli.AskStats():
                _stats(question, environment)
            case cli.AskReload(target):
                changed, waiting = ask.reload(_admin(target, environment, for_reload=True))
                show_line(f"reload applied: {', '.join(changed) or 'nothing'} changed")
                if waiting:
                    show_line(f"not in force before a restart or an upgrade: {', '.join(waiting)}")
    except settings.ConfigError as error:
        complain(error.faults)
    except ask.RefusedError as error:
        complain([f"echod: reload refused: {fault}" for fault in error.faults])
    except ask.UnansweredError as error:
        complain([f"echod: {error}"])
    else:
        return True
    return False


def _stats(asked: cli.AskStats, environment: Environment) -> None:
    from echod import ask

    addresses = _admin(asked.target, environment)
    if asked.is_watched:
        with suppress(KeyboardInterrupt):
            _watch(partial(ask.stats, addresses, WATCH_ANSWER_S), environment, as_json=asked.as_json)
        return
    stats = ask.stats(addresses)
    if asked.as_json:
        import json

        show_line(json.dumps(stats))
    else:
        from echod.table import rendered, table

        in_colour = wants_colour(environment)
        show("".join(f"{rendered(line, None, in_colour=in_colour)}\n" for line in table(stats)))


def _watch(ask: Callable[[], dict[str, Any]], environment: Environment, *, as_json: bool) -> None:
    from echod.follow import JsonLines, Tables, follow
    from echod.screen import Paper, screen

    first = ask()
    if as_json:
        follow(first, ask, JsonLines(show_line, lambda why: complain([f"echod: {why}"])))
    elif is_screen(environment):
        with screen(show, STANDARD_OUTPUT, in_colour=wants_colour(environment)) as sheet:
            follow(first, ask, Tables(sheet))
    else:
        follow(first, ask, Tables(Paper(show)))


def _admin(target: cli.Target, environment: Environment, *, for_reload: bool = False) -> "list[Address]":
    from echod import ask, startup
    from echod.sources import Sources

    if target.admin:
        return [target.admin]
    # What the daemon may open is its own business, not that of the shell here.
    loaded = startup.loader(Sources(target.file, ()), environment, process.UNLIMITED)()
    return ask.candidates(loaded.config.admin.listen, startup.runtime_admin(environment), for_reload=for_reload)
