"""The commands that are no daemon: each says what came of it; which exit status that is, `__main__` knows.

Each imports what it needs, for a health check starts one every few hundred milliseconds.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from echod import cli, process
from echod.console import complain, show, show_line

if TYPE_CHECKING:
    from echod.address import Address
    from echod.sources import Sources

Environment = Mapping[str, str]


def answer(
    invocation: cli.Check | cli.ShowDefaults | cli.Ping | cli.AskStats | cli.AskReload, environment: Environment
) -> bool:
    """Do it; return whether it went well. Raises OSError if standard output can't be written."""
    match invocation:
        case cli.Check(sources):
            return _check(sources, environment)
        case cli.ShowDefaults():
            return _show_defaults()
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


def _show_defaults() -> bool:
    from echod import toml
    from echod.config import Config

    show(toml.render(Config(), with_comments=True))
    return True


def _ping(asked: cli.Ping) -> bool:
    from echod import dial, ping

    try:
        return ping.ping(asked.plan, show_line, as_json=asked.as_json)
    except dial.UnknownHostError as error:
        complain([f"echod: {error}"])
    except KeyboardInterrupt:  # one more, while the summary was written
        pass
    return False


def _ask(question: cli.AskStats | cli.AskReload, environment: Environment) -> bool:
    import json

    from echod import ask, settings
    from echod.table import table

    try:
        match question:
            case cli.AskStats(target, as_json):
                stats = ask.stats(_admin(target, environment))
                show(json.dumps(stats) + "\n" if as_json else table(stats))
            case cli.AskReload(target):
                changed = ask.reload(_admin(target, environment, for_reload=True))
                show_line(f"reload applied: {', '.join(changed) or 'nothing'} changed")
    except settings.ConfigError as error:
        complain(error.faults)
    except ask.RefusedError as error:
        complain([f"echod: reload refused: {fault}" for fault in error.faults])
    except ask.UnansweredError as error:
        complain([f"echod: {error}"])
    else:
        return True
    return False


def _admin(target: cli.Target, environment: Environment, *, for_reload: bool = False) -> "list[Address]":
    from echod import ask, startup
    from echod.sources import Sources

    if target.admin:
        return [target.admin]
    # What the daemon may open is its own business, not that of the shell here.
    loaded = startup.loader(Sources(target.file, ()), environment, process.UNLIMITED)()
    return ask.candidates(loaded.config.admin.listen, startup.runtime_admin(environment), for_reload=for_reload)
