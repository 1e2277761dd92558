"""What comes before clients are served: where the configuration is read from, and the way from root to a user.

Decides no exit status and ends nothing; `__main__` puts it together.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from msgspec.structs import replace

from echod import settings
from echod.config import Log

if TYPE_CHECKING:
    from echod.generation import Generation
    from echod.privileges import Identity
    from echod.sources import Sources

_IMPORTED_LATE = ("asyncio", "difflib", "structlog", "traceback", "uvloop", "echod.greeting", "echod.lifecycle")

Load = Callable[[], settings.Loaded]


def loader(sources: "Sources", environment: Mapping[str, str], open_files: int, folder: str = "") -> Load:
    """What reads the configuration, again and again; relative paths are meant from `folder`."""
    file = (environment.get("ECHOD_CONFIG") or None) if sources.file is None else sources.file
    path = os.path.join(folder, file) if file else file
    return partial(_load, folder, partial(settings.load, path, environment, sources.flags, open_files))


def _load(folder: str, load: Load) -> settings.Loaded:
    loaded = load()
    log = loaded.config.log
    if log.file:
        log = replace(log, file=os.path.join(folder, log.file))
    return settings.Loaded(replace(loaded.config, log=log), loaded.warnings, loaded.is_listen_set)


def runtime_admin(environment: Mapping[str, str]) -> str | None:
    """The admin endpoint that there is whatever the configuration says: in the folder that systemd makes for us."""
    folder = environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return f"unix:{folder}/admin" if folder else None


def prepare_as(user: "Identity | None", prepare: "Callable[..., Generation]") -> "Generation":
    """The first generation; what it needed root for is done, and we are the user for good."""
    from echod import privileges

    if user is None:
        return prepare()
    first = prepare(open_log=partial(_open_log, user))
    try:
        for module in _IMPORTED_LATE:  # the user need not be allowed to read them
            import_module(module)
        privileges.drop(user, first.give)
    except BaseException:
        first.discard()
        raise
    return first


def _open_log(user: "Identity", log: Log) -> int | None:
    from echod import logs, privileges

    return privileges.open_for(user, partial(logs.open_path, log.file)) if log.file else None
