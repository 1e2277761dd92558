"""Read every source into one frozen `Config`, or report every error at once.

The sources are the defaults, the file, the environment and the command line; a later one wins. A bad value is always an
error, never replaced by a default.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct

from echod.config.environment import EXPECTED, is_of_kubernetes, warnings_of
from echod.config.schema import (
    KEYS,
    LISTEN_KEYS,
    RESERVED_FILES,
    SECTIONS,
    Admin,
    Config,
    Limits,
    Listen,
    Log,
    Timeouts,
)
from echod.config.sources import Setting, Sources, as_number, base
from echod.net.access import wrong_network
from echod.net.address import SystemdAddress, TcpAddress, identity, parse_address
from echod.net.tls import Tls, TlsError, TlsSettings, warning_of_end
from echod.net.tls import load as load_tls
from echod.process import files

DEFAULT_LISTEN = "ECHOD_DEFAULT_LISTEN"
"""The variable with the default of `listen`, for packages such as the Docker image."""


class ConfigError(Exception):
    """Every error of a configuration, each as `SOURCE: key.path: what is wrong (got VALUE)`."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = tuple(map(_printable, errors))
        super().__init__("\n".join(self.errors))


def _printable(text: str) -> str:
    """Escape control characters, because the name of a key or file may contain any and an error is one line."""
    return "".join([letter if letter.isprintable() else repr(letter)[1:-1] for letter in text])


class Loaded(Struct, frozen=True):
    """A valid configuration, and warnings for the operator."""

    config: Config
    warnings: tuple[str, ...]
    is_listen_set: bool = False
    """Whether a source sets `listen`; False if the default holds."""
    tls: Mapping[int, Tls] = {}
    """What was made of the certificate files of each entry of `listen` that speaks TLS, by its index."""


def load(
    file: str | None,
    environment: Mapping[str, str],
    flags: Iterable[Setting],
    open_files: int,
    directory: str = "",
) -> Loaded:
    """Read every source, a later one winning: default, `file`, `environment`, `flags`; and the certificates they name.

    `open_files` is the number of descriptors that this process may have. Paths are relative to `directory`. Raise
    ConfigError with every error of every source.
    """
    errors: list[str] = []
    settings = [*_packed(environment), *_from_file(file, errors), *_from_environment(environment, errors), *flags]
    values: dict[str, Any] = {}
    last: dict[str, Setting] = {}
    for setting in settings:
        last[setting.key] = setting
        _convert(setting, values, errors)
    if "listen" in values:
        values["listen"] = tuple(_with_paths(listen, directory) for listen in values["listen"])
    tls = dict(_load_tls(values.get("listen", ()), last["listen"].source if "listen" in last else "", errors))
    if errors:
        raise ConfigError(errors)
    config = Config(
        listen=values.get("listen", Config().listen),
        limits=Limits(**_section(values, "limits")),
        timeouts=Timeouts(**_section(values, "timeouts")),
        log=Log(**_section(values, "log")),
        admin=Admin(**_section(values, "admin")),
    )
    _check_admin(config, last.get("admin.listen"), errors)
    _check_memory(config.limits, last.get("limits.held_bytes"), errors)
    fitting, warnings = _fit(config, last.get("limits.connections"), open_files, errors)
    if errors:
        raise ConfigError(errors)
    warnings = (*warnings_of(environment), *warnings, *_tls_warnings(config, tls))
    is_listen_set = "listen" in last and last["listen"].source != DEFAULT_LISTEN
    return Loaded(fitting, warnings, is_listen_set, tls)


def _with_paths(listen: Listen, directory: str) -> Listen:
    names = ("tls_certificate", "tls_key", "tls_client_ca")
    paths = {name: os.path.join(directory, path) for name in names if (path := getattr(listen, name))}
    return msgspec.structs.replace(listen, **paths) if paths else listen


def _load_tls(listens: Sequence[Listen], source: str, errors: list[str]) -> Iterator[tuple[int, Tls]]:
    for index, listen in enumerate(listens):
        if listen.tls_certificate and listen.tls_key:
            try:
                yield index, load_tls(tls_settings(listen))
            except TlsError as error:
                errors.append(f"{source}: listen[{index}].{error}")


def tls_settings(listen: Listen) -> TlsSettings:
    """Return the TLS settings of an entry that has a certificate and a key."""
    return TlsSettings(
        certificate=listen.tls_certificate,
        key=listen.tls_key,
        client_ca=listen.tls_client_ca,
        minimum=listen.tls_minimum,
    )


def _tls_warnings(config: Config, tls: Mapping[int, Tls]) -> Iterator[str]:
    for index, each in tls.items():
        yield from (f"listen[{index}].{warning}" for warning in each.warnings)
        if warning := warning_of_end(config.listen[index].address, each.not_after, time.time()):
            yield warning


Load = Callable[[], Loaded]


def reader(sources: Sources, environment: Mapping[str, str], open_files: int, directory: str = "") -> Load:
    """Return a function that reads the configuration each time it is called; paths are relative to `directory`."""
    file = (environment.get("ECHOD_CONFIG") or None) if sources.file is None else sources.file
    path = os.path.join(directory, file) if file else file

    def read() -> Loaded:
        loaded = load(path, environment, sources.flags, open_files, directory)
        log = loaded.config.log
        if not log.file:
            return loaded
        log = msgspec.structs.replace(log, file=os.path.join(directory, log.file))
        return msgspec.structs.replace(loaded, config=msgspec.structs.replace(loaded.config, log=log))

    return read


def defaults(environment: Mapping[str, str]) -> Config:
    """Return the configuration without any source; raise ConfigError if the package's default of `listen` is bad."""
    packed = {name: value for name, value in environment.items() if name == DEFAULT_LISTEN}
    return load(None, packed, (), RESERVED_FILES + 2 * Config().limits.connections).config


# -- sources -----------------------------------------------------------------------------------------------------------


def _packed(environment: Mapping[str, str]) -> list[Setting]:
    default = environment.get(DEFAULT_LISTEN)
    return [Setting(DEFAULT_LISTEN, "listen", default)] if default else []


def _from_file(file: str | None, errors: list[str]) -> Iterator[Setting]:
    if file is None:
        return
    from echod.config import toml

    try:
        document = toml.parse(files.read_bounded(file))
    except (OSError, ValueError) as error:
        errors.append(f"{file}: {error}")
        return
    for name, value in document.items():
        if name == "listen":
            yield Setting(file, name, value, is_text=False)
        elif name not in SECTIONS:
            errors.append(f"{file}: {name}: unknown key{_nearest(name, [*SECTIONS, 'listen'])}{_got(value)}")
        elif not isinstance(value, dict):
            errors.append(f"{file}: {name}: expected a table{_got(value)}")
        else:
            yield from (Setting(file, f"{name}.{key}", item, is_text=False) for key, item in value.items())


_NO_KEYS = ("ECHOD_CONFIG", "ECHOD_FASTPATH")
"""Variables that echod reads but that set no key."""


def _from_environment(environment: Mapping[str, str], errors: list[str]) -> Iterator[Setting]:
    known = {f"ECHOD_{key.replace('.', '_').upper()}": key for key in [*KEYS, "listen"]}
    for name, value in environment.items():
        if name in known:
            yield Setting(name, known[name], value)
        elif name.startswith("ECHOD_") and name not in (*_NO_KEYS, DEFAULT_LISTEN, *EXPECTED):
            if is_of_kubernetes(name):
                continue
            # Report a misspelt key, but not every variable of another program that happens to start with ECHOD_.
            meant = re.sub("^ECHOD_CONFIG_(FILE|PATH)$", "ECHOD_CONFIG", name)
            nearest = _nearest(meant, [*known, *_NO_KEYS], cutoff=0.8)
            if nearest or name.removeprefix("ECHOD_").partition("_")[0].lower() in {*SECTIONS, "listen"}:
                errors.append(f"{name}: unknown key{nearest}{_got(value)}")


# -- one setting -------------------------------------------------------------------------------------------------------


def _convert(setting: Setting, values: dict[str, Any], errors: list[str]) -> None:
    """Add the setting's value to `values`, or what is wrong with it to `errors`."""
    if setting.key == "listen":
        values["listen"] = tuple(_listens(setting, errors))
        return
    if setting.key not in KEYS:
        errors.append(f"{setting.source}: {setting.key}: unknown key{_nearest_key(setting.key)}{_got(setting.value)}")
        return
    if wrong := _unfit_text(setting.value):
        errors.append(f"{setting.source}: {setting.key}: {wrong}{_got(setting.value)}")
        return
    try:
        value = as_number(setting.value, KEYS[setting.key])
        values[setting.key] = msgspec.convert(value, KEYS[setting.key], strict=not setting.is_text)
    except msgspec.ValidationError as error:
        wrong = _explain(KEYS[setting.key], setting.value, error)
        errors.append(f"{setting.source}: {setting.key}: {wrong}{_got(setting.value)}")
        return
    if setting.key == "admin.listen" and setting.value and (wrong := _wrong_address(setting.value, set())):
        errors.append(f"{setting.source}: {setting.key}: {wrong}{_got(setting.value)}")


def _listens(setting: Setting, errors: list[str]) -> Iterator[Listen]:
    if setting.is_text:
        texts = setting.value if isinstance(setting.value, list) else setting.value.split(",")
        entries: Any = [{"address": text.strip()} for text in texts]
    else:
        entries = setting.value
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        errors.append(f"{setting.source}: listen: expected a [[listen]] table for each address{_got(entries)}")
        return
    if not entries:
        errors.append(f"{setting.source}: listen: expected at least one address{_got(entries)}")
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        path = f"{setting.source}: listen[{index}]"
        for key in entry.keys() - LISTEN_KEYS.keys():
            errors.append(f"{path}.{key}: unknown key{_nearest(key, LISTEN_KEYS)}{_got(entry[key])}")
        before = len(errors)
        if "address" not in entry:
            errors.append(f"{path}.address: missing")
        for key in LISTEN_KEYS.keys() & entry.keys():
            if wrong := _wrong_listen_value(key, entry[key], seen):
                errors.append(f"{path}.{key}: {wrong}{_got(entry[key])}")
        if len(errors) == before and (listen := msgspec.convert(entry, Listen)):
            errors += [f"{path}.{wrong}" for wrong in _wrong_combinations(listen)]
            yield listen


def _wrong_listen_value(key: str, value: Any, seen: set[str]) -> str:
    """Say what is wrong with the value of a key of a [[listen]]; "" if nothing is."""
    if key == "address":
        return _wrong_address(value, seen)
    if wrong := next(filter(None, map(_unfit_text, value if isinstance(value, list) else [value])), ""):
        return wrong
    try:
        msgspec.convert(value, LISTEN_KEYS[key])
    except msgspec.ValidationError as error:
        return _explain(LISTEN_KEYS[key], value, error)
    if key in ("allow", "deny"):
        return next(filter(None, map(wrong_network, value)), "")
    return ""


def _wrong_combinations(listen: Listen) -> Iterator[str]:
    if listen.tls_certificate and not listen.tls_key:
        yield "tls_key: missing, tls_certificate needs it"
    if listen.tls_key and not listen.tls_certificate:
        yield "tls_certificate: missing, tls_key needs it"
    if listen.tls_client_ca and not (listen.tls_certificate and listen.tls_key):
        yield "tls_client_ca: needs tls_certificate and tls_key"


def _wrong_address(address: Any, seen: set[str]) -> str:
    if not isinstance(address, str):
        return "expected str"
    if wrong := _unfit_text(address):
        return wrong
    try:
        parsed = parse_address(address)
    except ValueError as error:
        return str(error)
    # Compared as text, because named tuples of different types are equal if their elements are.
    name = str(identity(parsed))
    if name in seen and not (isinstance(parsed, TcpAddress) and parsed.port == 0):
        return "listed twice"
    seen.add(name)
    return ""


def _unfit_text(value: Any) -> str:
    """Say why no key may have this text: NUL ends a path in the kernel, and TOML cannot represent invalid UTF-8."""
    if not isinstance(value, str):
        return ""
    if "\0" in value:
        return "contains a NUL character"
    return "" if _is_utf8(value) else "expected valid UTF-8"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _explain(kind: Any, value: Any, error: msgspec.ValidationError) -> str:
    if get_origin(base(kind)) is Literal:
        choices = get_args(base(kind))
        return f"expected one of {', '.join(choices)}{_nearest(value, choices) if isinstance(value, str) else ''}"
    words = str(error).partition(", got")[0].replace("`", "").replace("Expected float", "Expected number")
    return re.sub(r"(?<=[0-9])\.0$", "", words[:1].lower() + words[1:])


def _nearest_key(key: str) -> str:
    """Suggest a known key, from the same section if that exists."""
    section = key.partition(".")[0]
    prefix = f"{section}." if section in SECTIONS else ""
    names = [name.removeprefix(prefix) for name in [*KEYS, "listen"] if name.startswith(prefix)]
    return _nearest(key.removeprefix(prefix), names, prefix=prefix)


def _nearest(name: str, names: Iterable[str], *, cutoff: float = 0.6, prefix: str = "") -> str:
    from difflib import get_close_matches  # takes 3 ms, and only an error needs it

    if re.match(r"ECHOD_LISTEN_|listen[.\[]", name):
        return ", the keys of a [[listen]] can be set only in the file"
    matches = get_close_matches(name, names, n=1, cutoff=cutoff)
    return f", did you mean {prefix}{matches[0]}?" if matches else ""


def _got(value: Any) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # a hexadecimal number of thousands of digits, tables in tables
        shown = "a value too long or nested too deep to show"
    return f" (got {shown if len(shown) <= 80 else shown[:77] + '...'})"


# -- the whole ---------------------------------------------------------------------------------------------------------


def _check_admin(config: Config, setting: Setting | None, errors: list[str]) -> None:
    """Add an error if the admin endpoint has an address that clients are served at, or that only `listen` may have."""
    if not setting or not setting.value:
        return
    admin = parse_address(setting.value)
    if isinstance(admin, SystemdAddress):
        errors.append(f"{setting.source}: admin.listen: expected host:port or unix:/path{_got(setting.value)}")
        return
    is_any_port = isinstance(admin, TcpAddress) and admin.port == 0
    clients = [str(identity(parse_address(entry.address))) for entry in config.listen]
    if not is_any_port and str(identity(admin)) in clients:
        wrong = "clients are served at this address, choose another"
        errors.append(f"{setting.source}: admin.listen: {wrong}{_got(setting.value)}")


def _check_memory(limits: Limits, setting: Setting | None, errors: list[str]) -> None:
    """Add an error if a single client could not complete the longest line within `limits.held_bytes`."""
    if setting and 0 < limits.held_bytes < limits.line_bytes:
        wrong = f"expected 0 or at least limits.line_bytes, {limits.line_bytes}"
        errors.append(f"{setting.source}: limits.held_bytes: {wrong}{_got(limits.held_bytes)}")


def _fit(config: Config, setting: Setting | None, open_files: int, errors: list[str]) -> tuple[Config, tuple[str, ...]]:
    """Check that `limits.connections` fits under the limit of open files; lower the default if it does not."""
    fits = open_files - RESERVED_FILES - len(config.listen)
    wanted = config.limits.connections
    if wanted <= fits:
        return config, ()
    reason = f"only {open_files} open files are allowed (ulimit -n, LimitNOFILE=)"
    if setting or fits < 1:
        source = setting.source if setting else "default"
        fit = (
            f"at most {fits} connections fit: lower the value or raise the hard limit"
            if fits > 0
            else f"at least {RESERVED_FILES + len(config.listen) + 1} are needed: raise the hard limit"
        )
        errors.append(f"{source}: limits.connections: {reason}, {fit}{_got(wanted)}")
        return config, ()
    lowered = msgspec.structs.replace(config, limits=msgspec.structs.replace(config.limits, connections=fits))
    return lowered, (f"limits.connections: {reason}, so the default of {wanted} is lowered to {fits}",)


def _section(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{section}.")}
