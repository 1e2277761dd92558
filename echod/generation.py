"""One generation: a configuration and everything it needs to be put in force without a failure.

A start and a reload prepare it alike, and only here can they fail: the configuration is read and valid, the log file
is open, the listeners are bound, those of the admin endpoint too. Until it is put in force nothing else has changed.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from echod import logs, sockets
from echod.address import parse_address
from echod.config import Config
from echod.settings import ConfigError, Loaded


class PrepareError(Exception):
    """Why there is no new generation: every fault found, and whether they are the configuration's."""

    def __init__(self, faults: Sequence[str], *, is_configuration: bool = False) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)
        self.is_configuration = is_configuration


@dataclass(frozen=True, slots=True)
class Generation:
    """What `prepare` made; whoever doesn't use it owes it a `discard`."""

    config: Config
    warnings: tuple[str, ...]
    listeners: Mapping[sockets.Key, sockets.Bound | None]
    """The listeners of the configuration, in its order; None is one that exists already."""
    admin: Mapping[sockets.Key, sockets.Bound | None]
    """The listeners of the admin endpoint, likewise."""
    log_descriptor: int | None

    def discard(self) -> None:
        """Close what was opened for it."""
        sockets.discard(self.listeners)
        sockets.discard(self.admin)
        if self.log_descriptor is not None:
            os.close(self.log_descriptor)


@dataclass(frozen=True, slots=True)
class Kept:
    """The listeners that exist: those that a new configuration wants too are not bound again."""

    listeners: Collection[sockets.Key] = ()
    admin: Collection[sockets.Key] = ()


NOTHING_KEPT = Kept()


def prepare(load: Callable[[], Loaded], runtime_admin: str | None = None, kept: Kept = NOTHING_KEPT) -> Generation:
    """Do everything that can fail; may block on files and name servers. Raises PrepareError with every fault.

    `runtime_admin` is where the admin endpoint answers whatever the configuration says.
    """
    try:
        loaded = load()
    except ConfigError as error:
        raise PrepareError(error.faults, is_configuration=True) from error
    config = loaded.config
    try:
        descriptor = logs.open_file(config.log)
    except OSError as error:
        raise PrepareError([f"log.file: {config.log.file}: {(error.strerror or str(error)).lower()}"]) from error
    with ExitStack() as undo:
        if descriptor is not None:
            undo.callback(os.close, descriptor)
        faults: list[str] = []
        listeners = _bound("listen", [entry.address for entry in config.listen], kept.listeners, faults)
        undo.callback(sockets.discard, listeners)
        admin = _admin(config.admin.listen, runtime_admin, kept.admin, faults)
        undo.callback(sockets.discard, admin)
        if faults:
            raise PrepareError(faults)
        undo.pop_all()
    return Generation(config, loaded.warnings, listeners, admin, descriptor)


Sockets = dict[sockets.Key, sockets.Bound | None]


def _admin(configured: str, runtime: str | None, kept: Collection[sockets.Key], faults: list[str]) -> Sockets:
    bound: Sockets = {}
    if configured:
        bound |= _bound("admin.listen", [configured], kept, faults, is_private=True)
    if runtime and runtime != configured:
        bound |= _bound("$RUNTIME_DIRECTORY", [runtime], kept, faults, is_private=True)
    if bound:
        import h11  # noqa: F401 (17 ms; here a reload takes them aside, and not clients from the loop)
    return bound


def _bound(
    name: str, addresses: Sequence[str], kept: Collection[sockets.Key], faults: list[str], *, is_private: bool = False
) -> Sockets:
    """The listeners of the addresses; what is wrong goes to `faults`, under the name of who wants them."""
    try:
        return sockets.listen_all([parse_address(address) for address in addresses], kept, is_private=is_private)
    except ValueError as error:
        faults.append(f"{name}: {addresses[0]}: {error}")  # no key of the configuration, for that is valid
    except sockets.BindErrors as error:
        faults += [f"{name}: {fault}" for fault in error.faults]
    return {}
