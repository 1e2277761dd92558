"""One generation: a configuration and everything it needs to be put in force without a failure.

A start and a reload prepare it alike, and only here can they fail: the configuration is read and valid, the log file
is open, the listeners are bound, those of the admin endpoint too. Until it is put in force nothing else has changed.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from msgspec import Struct, field

from echod.config.loader import ConfigError, Loaded
from echod.config.schema import Config, Log
from echod.net import bind, sockets
from echod.net.address import parse_address
from echod.telemetry import logs


class PrepareError(ConfigError):
    """A valid configuration cannot be put in force here and now, for example because an address is in use."""


class Generation(Struct, frozen=True):
    """What `prepare` made; whoever doesn't use it owes it a `discard`."""

    config: Config
    warnings: tuple[str, ...]
    listeners: Mapping[sockets.Key, sockets.Bound | None]
    """The listeners of the configuration, in its order; None is one that exists already."""
    admin: Mapping[sockets.Key, sockets.Bound | None]
    """The listeners of the admin endpoint, likewise."""
    proxied: frozenset[sockets.Key]
    """The listeners whose clients come with a PROXY header."""
    log_descriptor: int | None
    wanted: Mapping[sockets.Key, bind.Wanted] = {}
    """What the configuration's entry of each listener wants, whether it can be in force or not."""

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
    def _sockets(self) -> list[sockets.Bound]:
        return [bound for bound in (*self.listeners.values(), *self.admin.values()) if bound]

    def restart_needed(self, listening: Mapping[sockets.Key, sockets.Bound]) -> list[str]:
        """The keys that are not in force on the sockets that listen, for only a bind sets them.

        Not those of a socket that was handed over: whoever bound it has set its options.
        """
        names = {
            f"{how.name}.reuse_port": None  # once, if the address stands for several sockets
            for key, how in self.wanted.items()
            if not listening[key].is_inherited and sockets.is_port_shared(listening[key].socket) != how.reuse_port
        }
        return [*names]

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

    listeners: Mapping[sockets.Key, sockets.Bound | None] = field(default_factory=dict)
    admin: Mapping[sockets.Key, sockets.Bound | None] = field(default_factory=dict)


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
        wanted: dict[sockets.Key, bind.Wanted] = {}
        bind_listeners = partial(bind.bind_all, inherited=given.inherited, wanted=wanted)
        listeners = _bound("listen", partial(_wanted, loaded, given.inherited), kept.listeners, errors, bind_listeners)
        undo.callback(bind.discard, listeners)
        admin = _admin(config.admin.listen, given.runtime_admin, kept.admin, errors)
        undo.callback(bind.discard, admin)
        if errors:
            raise PrepareError(errors)
        undo.pop_all()
    proxied = frozenset(key for key, how in wanted.items() if how.proxy_protocol)
    return Generation(config, loaded.warnings, listeners, admin, proxied, descriptor, wanted)


def unchanged(config: Config, kept: Kept, proxied: frozenset[sockets.Key], errors: Sequence[str]) -> Generation:
    """What goes on with a configuration that was in force, because of the errors of the one that was to be."""
    try:
        descriptor = logs.open_file(config.log)
    except OSError as error:
        errors = [*errors, f"log.file: {config.log.file}: {(error.strerror or str(error)).lower()}"]
        descriptor = None
    warnings = tuple(f"the configuration of before goes on: {message}" for message in errors)
    return Generation(config, warnings, dict.fromkeys(kept.listeners), dict.fromkeys(kept.admin), proxied, descriptor)


Sockets = dict[sockets.Key, sockets.Bound | None]


def _wanted(loaded: Loaded, inherited: Sequence[bind.InheritedSocket]) -> list[bind.Wanted]:
    """What to listen on; who was handed sockets and is told of no address wants just those, not the default too.

    The default may be all addresses, and means those that there can be.
    """
    if inherited and not loaded.is_listen_set:
        return []
    wanted = [
        bind.Wanted(parse_address(entry.address), entry.reuse_port, entry.proxy_protocol, name=f"listen[{index}]")
        for index, entry in enumerate(loaded.config.listen)
    ]
    return wanted if loaded.is_listen_set else [each for each in wanted if bind.is_possible(each.address)]


def _admin(
    configured: str, runtime: str | None, kept: Mapping[sockets.Key, sockets.Bound | None], errors: list[str]
) -> Sockets:
    bound: Sockets = {}
    if configured:
        bound |= _bound("admin.listen", partial(_private, configured), kept, errors)
    if runtime:
        # It may be the one configured, written in another way.
        there = {**kept, **bound}
        more = _bound("$RUNTIME_DIRECTORY", partial(_private, runtime), there, errors)
        bound |= {key: each for key, each in more.items() if key not in bound}
    if bound:
        import h11  # noqa: F401 (17 ms; here a reload takes them aside, and not clients from the loop)
    return bound


def _private(address: str) -> list[bind.Wanted]:
    try:
        return [bind.Wanted(parse_address(address), is_private=True)]
    except ValueError as error:
        raise ValueError(f"{address}: {error}") from error


def _bound(
    name: str,
    wanted: Callable[[], list[bind.Wanted]],
    kept: Mapping[sockets.Key, sockets.Bound | None],
    errors: list[str],
    bind_all: Callable[..., Sockets] = bind.bind_all,
) -> Sockets:
    """The sockets of what is wanted; what is wrong goes to `errors`, under the name of who wants them."""
    try:
        return bind_all(wanted(), kept)
    except ValueError as error:
        errors.append(f"{name}: {error}")  # no key of the configuration, for that is valid
    except bind.BindErrors as error:
        errors += [f"{name}: {message}" for message in error.errors]
    return {}
