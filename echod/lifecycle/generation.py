"""A generation: a configuration, and everything that is needed to put it in force.

A start, a reload and a preflight prepare it in the same way: they read and validate the configuration, open the log
file, and bind the listeners, including those of the admin endpoint. Until it is put in force nothing else has changed.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from msgspec import Struct, field

from echod.config.loader import ConfigError, Loaded, tls_settings
from echod.config.schema import Config, Listen, Log
from echod.net import bind, sockets
from echod.net.access import AccessRules
from echod.net.address import parse_address
from echod.net.sockets import BoundSocket, ListenerKey, ListenerSettings, Prepared
from echod.net.tls import Tls, TlsError
from echod.net.tls import load as load_tls
from echod.telemetry import logs


class PrepareError(ConfigError):
    """A valid configuration cannot be put in force here and now, for example because an address is in use."""


class Generation(Struct, frozen=True):
    """What `prepare` returns; if it is not put in force, call `discard`."""

    config: Config
    warnings: tuple[str, ...]
    listeners: Prepared
    """The listeners that serve clients, in the order of the configuration."""
    admin: Prepared
    """The listeners of the admin endpoint."""
    log_descriptor: int | None

    def give(self, uid: int, gid: int) -> None:
        """Give the files of Unix sockets to the user who will have to remove them; raises OSError."""
        for bound in self._sockets:
            bound.change_owner(uid, gid)

    def listen(self) -> None:
        """Start to listen on all new sockets; raises ListenError, and then the generation is to be discarded."""
        for bound in self._sockets:
            bound.listen()

    def try_listening(self) -> None:
        """Check whether `listen` would succeed, without a client noticing; call `discard` next. Raises ListenError."""
        for bound in self._sockets:
            bound.try_listening()

    @property
    def _sockets(self) -> list[BoundSocket]:
        return [*bind.new_sockets(self.listeners), *bind.new_sockets(self.admin)]

    @property
    def settings(self) -> dict[str, ListenerSettings]:
        """The settings of each listener by its name."""
        each = (one.settings if isinstance(one, BoundSocket) else one for one in self.listeners.values())
        return {settings.name: settings for settings in each}

    def discard(self) -> None:
        """Close everything that was opened for it."""
        bind.discard(self.listeners)
        bind.discard(self.admin)
        if self.log_descriptor is not None:
            os.close(self.log_descriptor)


class Kept(Struct, frozen=True):
    """The listeners that exist already, which are not bound again.

    The sockets are given only if nobody serves with them yet, so that their options may be changed.
    """

    listeners: Mapping[ListenerKey, BoundSocket | None] = field(default_factory=dict)
    admin: Mapping[ListenerKey, BoundSocket | None] = field(default_factory=dict)


NOTHING_KEPT = Kept()


def prepare(
    load: Callable[[], Loaded],
    kept: Kept = NOTHING_KEPT,
    *,
    inherited: Sequence[bind.InheritedSocket] = (),
    runtime_admin: str | None = None,
    open_log: Callable[[Log], int | None] = logs.open_file,
) -> Generation:
    """Do everything that can fail; may block on files and name servers.

    `inherited` are the sockets that a service manager passed to this process. `runtime_admin` is one more address of
    the admin endpoint, whatever the configuration says. Raise ConfigError if the configuration is invalid, and its
    subclass PrepareError if it cannot be put in force.
    """
    loaded = load()
    config = loaded.config
    try:
        descriptor = open_log(config.log)
    except OSError as error:
        raise PrepareError([f"log.file: {config.log.file}: {(error.strerror or str(error)).lower()}"]) from error
    errors: list[str] = []
    listeners: Prepared = {}
    admin: Prepared = {}
    with ExitStack() as undo:
        if descriptor is not None:
            undo.callback(os.close, descriptor)
        with _collected(errors, "listen"):
            listeners = bind.bind_all(_entries(loaded, inherited), kept.listeners, inherited)
            undo.callback(bind.discard, listeners)
        for name, address in (("admin.listen", config.admin.listen), ("$RUNTIME_DIRECTORY", runtime_admin)):
            if not address:
                continue
            with _collected(errors, name):
                # Both may name one socket, written in different ways: it is bound once.
                bound = bind.bind_all([_private(address)], {**kept.admin, **dict.fromkeys(admin)})
                undo.callback(bind.discard, bound)
                admin = {**admin, **{key: each for key, each in bound.items() if key not in admin}}
        if errors:
            raise PrepareError(errors)
        if admin:
            import h11  # noqa: F401 (17 ms: in the thread of a reload it delays nobody)
        undo.pop_all()
    return Generation(config, loaded.warnings, listeners, admin, descriptor)


@contextmanager
def _collected(errors: list[str], name: str) -> Iterator[None]:
    """Append the errors of binding to `errors`, with the name of what asks for it."""
    try:
        yield
    except ValueError as error:
        errors.append(f"{name}: {error}")
    except bind.BindErrors as error:
        errors += [f"{name}: {message}" for message in error.errors]


Listeners = Mapping[ListenerKey, BoundSocket]


def unchanged(config: Config, listeners: Listeners, admin: Listeners, errors: Sequence[str]) -> Generation:
    """Return a generation that continues with the predecessor's configuration, because of errors in the new one."""
    try:
        descriptor = logs.open_file(config.log)
    except OSError as error:
        errors = [*errors, f"log.file: {config.log.file}: {(error.strerror or str(error)).lower()}"]
        descriptor = None
    errors = [*errors]
    served = {key: _completed(bound.settings, config, errors) for key, bound in listeners.items()}
    warnings = tuple(f"the previous configuration stays in force: {message}" for message in errors)
    return Generation(config, warnings, served, {key: bound.settings for key, bound in admin.items()}, descriptor)


def _completed(settings: ListenerSettings, config: Config, errors: list[str]) -> ListenerSettings:
    """Return a predecessor's settings with what its state does not hold; without TLS, its clients are rejected."""
    for index, listen in enumerate(config.listen):
        if settings.name == f"listen[{index}]":
            tls = None
            if settings.is_tls:
                try:
                    tls = load_tls(tls_settings(listen))
                except TlsError as error:
                    errors.append(f"{settings.name}.{error}")
            return _listener_settings(index, listen, tls)
    return settings


def restart_needed(listeners: Iterable[BoundSocket]) -> list[str]:
    """Return the configuration keys whose values are not in force on these sockets, because only a bind sets them.

    Keys of an inherited socket are left out: the service manager that bound it has set its options.
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
            _listener_settings(index, listen, loaded.tls.get(index)),
        )
        for index, listen in enumerate(loaded.config.listen)
    ]
    return entries if loaded.is_listen_set else [entry for entry in entries if bind.is_possible(entry.address)]


def _listener_settings(index: int, listen: Listen, tls: Tls | None) -> ListenerSettings:
    return ListenerSettings(
        name=f"listen[{index}]",
        proxy_protocol=listen.proxy_protocol,
        reuse_port=listen.reuse_port,
        is_tls=bool(listen.tls_certificate),
        tls=tls,
        access=AccessRules(listen.allow, listen.deny) if listen.allow or listen.deny else None,
    )


def _private(address: str) -> bind.ListenEntry:
    try:
        return bind.ListenEntry(parse_address(address), ListenerSettings(is_private=True))
    except ValueError as error:
        raise ValueError(f"{address}: {error}") from error
