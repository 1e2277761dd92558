"""One generation: a configuration and everything it needs to be put in force without a failure.

A start and a reload prepare it alike, and only here can they fail: the configuration is read and valid, the log file
is open, the listeners are bound, those of the admin endpoint too. Until it is put in force nothing else has changed.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from msgspec import Struct, field

from echod.config.loader import ConfigError, Loaded
from echod.config.schema import Config, Log
from echod.net import bind, sockets
from echod.net.address import parse_address
from echod.net.sockets import BoundSocket, ListenerKey, ListenerSettings, Prepared
from echod.telemetry import logs


class PrepareError(ConfigError):
    """A valid configuration cannot be put in force here and now, for example because an address is in use."""


class Generation(Struct, frozen=True):
    """What `prepare` made; whoever doesn't use it owes it a `discard`."""

    config: Config
    warnings: tuple[str, ...]
    listeners: Prepared
    """The listeners that serve clients, in the order of the configuration."""
    admin: Prepared
    """The listeners of the admin endpoint."""
    log_descriptor: int | None

    def give(self, uid: int, gid: int) -> None:
        """Make the files of Unix sockets another user's, who will have to remove them; raises OSError."""
        for bound in self._sockets:
            bound.give(uid, gid)

    def listen(self) -> None:
        """Let clients come, on all of its sockets; raises ListenError, and the generation is fit to be discarded."""
        for bound in self._sockets:
            bound.listen()

    def try_listening(self) -> None:
        """See whether `listen` can go well, before a `discard` and noticed by no client; raises ListenError."""
        for bound in self._sockets:
            bound.try_listening()

    @property
    def _sockets(self) -> list[BoundSocket]:
        return [*bind.new_sockets(self.listeners), *bind.new_sockets(self.admin)]

    def discard(self) -> None:
        """Close what was opened for it."""
        bind.discard(self.listeners)
        bind.discard(self.admin)
        if self.log_descriptor is not None:
            os.close(self.log_descriptor)


class Given(Struct, frozen=True):
    """What the process was given at its start, whatever the configuration says."""

    inherited: Sequence[bind.InheritedSocket] = ()
    """Listening sockets that a service manager handed over."""
    runtime_admin: str | None = None
    """Where the admin endpoint answers, too."""


class Kept(Struct, frozen=True):
    """The listeners that exist: those that a new configuration wants too are not bound again.

    With their sockets where an option may be changed that otherwise only a bind sets: nobody serves with them yet.
    """

    listeners: Mapping[ListenerKey, BoundSocket | None] = field(default_factory=dict)
    admin: Mapping[ListenerKey, BoundSocket | None] = field(default_factory=dict)


NOTHING_GIVEN = Given()
NOTHING_KEPT = Kept()


def prepare(
    load: Callable[[], Loaded],
    given: Given = NOTHING_GIVEN,
    kept: Kept = NOTHING_KEPT,
    open_log: Callable[[Log], int | None] = logs.open_file,
) -> Generation:
    """Do everything that can fail; may block on files and name servers.

    Raise ConfigError if the configuration is invalid, and its subclass PrepareError if it cannot be put in force.
    """
    loaded = load()
    config = loaded.config
    try:
        descriptor = open_log(config.log)
    except OSError as error:
        raise PrepareError([f"log.file: {config.log.file}: {(error.strerror or str(error)).lower()}"]) from error
    with ExitStack() as undo:
        if descriptor is not None:
            undo.callback(os.close, descriptor)
        errors: list[str] = []
        bind_listeners = partial(bind.bind_all, inherited=given.inherited)
        listeners = _bound("listen", partial(_entries, loaded, given.inherited), kept.listeners, errors, bind_listeners)
        undo.callback(bind.discard, listeners)
        admin = _admin(config.admin.listen, given.runtime_admin, kept.admin, errors)
        undo.callback(bind.discard, admin)
        if errors:
            raise PrepareError(errors)
        undo.pop_all()
    return Generation(config, loaded.warnings, listeners, admin, descriptor)


Listeners = Mapping[ListenerKey, BoundSocket]


def unchanged(config: Config, listeners: Listeners, admin: Listeners, errors: Sequence[str]) -> Generation:
    """What goes on with a configuration that was in force, because of the errors of the one that was to be."""
    try:
        descriptor = logs.open_file(config.log)
    except OSError as error:
        errors = [*errors, f"log.file: {config.log.file}: {(error.strerror or str(error)).lower()}"]
        descriptor = None
    warnings = tuple(f"the configuration of before goes on: {message}" for message in errors)
    return Generation(config, warnings, _settings(listeners), _settings(admin), descriptor)


def _settings(listeners: Listeners) -> Prepared:
    return {key: bound.settings for key, bound in listeners.items()}


def restart_needed(listeners: Iterable[BoundSocket]) -> list[str]:
    """Return the configuration keys whose values are not in force on these sockets, because only a bind sets them.

    Keys of an inherited socket are left out: whoever bound it has set its options.
    """
    keys = {
        f"{bound.settings.name}.reuse_port": None  # once, if the address stands for several sockets
        for bound in listeners
        if bound.settings.name
        and not bound.is_inherited
        and sockets.is_port_shared(bound.socket) != bound.settings.reuse_port
    }
    return [*keys]


def _entries(loaded: Loaded, inherited: Sequence[bind.InheritedSocket]) -> list[bind.ListenEntry]:
    """Return what to listen on: with inherited sockets and no explicit `listen`, only those are served.

    The default `listen` may name every address; those of a family that the kernel lacks are left out.
    """
    if inherited and not loaded.is_listen_set:
        return []
    entries = [
        bind.ListenEntry(
            parse_address(listen.address),
            ListenerSettings(
                name=f"listen[{index}]", proxy_protocol=listen.proxy_protocol, reuse_port=listen.reuse_port
            ),
        )
        for index, listen in enumerate(loaded.config.listen)
    ]
    return entries if loaded.is_listen_set else [entry for entry in entries if bind.is_possible(entry.address)]


def _admin(
    configured: str, runtime: str | None, kept: Mapping[ListenerKey, BoundSocket | None], errors: list[str]
) -> Prepared:
    prepared: Prepared = {}
    if configured:
        prepared = _bound("admin.listen", partial(_private, configured), kept, errors)
    if runtime:
        # It may be the one configured, written in another way.
        there = {**kept, **dict.fromkeys(prepared)}
        prepared = {**_bound("$RUNTIME_DIRECTORY", partial(_private, runtime), there, errors), **prepared}
    if prepared:
        import h11  # noqa: F401 (17 ms; here a reload takes them aside, and not clients from the loop)
    return prepared


def _private(address: str) -> list[bind.ListenEntry]:
    try:
        return [bind.ListenEntry(parse_address(address), ListenerSettings(is_private=True))]
    except ValueError as error:
        raise ValueError(f"{address}: {error}") from error


def _bound(
    name: str,
    entries: Callable[[], list[bind.ListenEntry]],
    kept: Mapping[ListenerKey, BoundSocket | None],
    errors: list[str],
    bind_all: Callable[..., Prepared] = bind.bind_all,
) -> Prepared:
    """Bind the entries; append every error to `errors`, with the name of the configuration key."""
    try:
        return bind_all(entries(), kept)
    except ValueError as error:
        errors.append(f"{name}: {error}")  # no key of the configuration, for that is valid
    except bind.BindErrors as error:
        errors += [f"{name}: {message}" for message in error.errors]
    return {}
