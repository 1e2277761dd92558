"""One generation: a configuration and everything it needs to be put in force without a failure.

A start and a reload prepare it alike, and only here can they fail: the configuration is read and valid, the log file
is open, the listeners are bound. Until it is put in force nothing else has changed.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from echod import binding, logs, sockets
from echod.address import parse_address
from echod.config import Config, Log
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
    log_descriptor: int | None

    def give(self, uid: int, gid: int) -> None:
        """Make the files of Unix sockets another user's, who will have to remove them; raises OSError."""
        for bound in self.listeners.values():
            if bound:
                bound.give(uid, gid)

    def discard(self) -> None:
        """Close what was opened for it."""
        binding.discard(self.listeners)
        if self.log_descriptor is not None:
            os.close(self.log_descriptor)


def prepare(
    load: Callable[[], Loaded],
    heirs: Sequence[binding.Heir] = (),
    kept: Collection[sockets.Key] = (),
    open_log: Callable[[Log], int | None] = logs.open_file,
) -> Generation:
    """Do everything that can fail; may block on files and name servers. Raises PrepareError with every fault.

    `heirs` are the sockets that a service manager handed over. `kept` are the listeners that exist: those that the new
    configuration wants too are not bound again.
    """
    try:
        loaded = load()
    except ConfigError as error:
        raise PrepareError(error.faults, is_configuration=True) from error
    log = loaded.config.log
    try:
        descriptor = open_log(log)
    except OSError as error:
        raise PrepareError([f"log.file: {log.file}: {(error.strerror or str(error)).lower()}"]) from error
    with ExitStack() as undo:
        if descriptor is not None:
            undo.callback(os.close, descriptor)
        try:
            listeners = binding.bind_all(_wanted(loaded, heirs), kept, heirs)
        except binding.BindErrors as error:
            raise PrepareError([f"listen: {fault}" for fault in error.faults]) from error
        undo.pop_all()
    return Generation(loaded.config, loaded.warnings, listeners, descriptor)


def _wanted(loaded: Loaded, heirs: Sequence[binding.Heir]) -> list[binding.Wanted]:
    """What to listen on; who was handed sockets and is told of no address wants just those, not the default too."""
    if heirs and not loaded.is_listen_set:
        return []
    return [binding.Wanted(parse_address(entry.address), entry.reuse_port) for entry in loaded.config.listen]
