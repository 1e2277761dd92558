"""Configuration values as the sources give them, before they are validated."""

import re
from typing import Annotated, Any, NamedTuple, get_args, get_origin


class Setting(NamedTuple):
    """The value that one source gives to one key; it is text unless it comes from a file."""

    source: str
    key: str
    value: Any
    is_text: bool = True


class Sources(NamedTuple):
    """The sources named on the command line: a file, if any, and the settings of the flags."""

    file: str | None
    flags: tuple[Setting, ...]


class Serve(NamedTuple):
    """The arguments of `echod serve`."""

    sources: Sources
    is_daemon: bool = False
    pidfile: str | None = None
    user: str | None = None
    group: str | None = None


def base(kind: Any) -> Any:
    """Return the type of a key without its range and description."""
    return base(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def as_number(value: Any, kind: Any) -> Any:
    """Return a value for a numeric key in a form that msgspec converts; return any other value unchanged.

    So 1000, 1_000 and 1e3 are the same number in every source, as they are in TOML.
    """
    if base(kind) not in (int, float):
        return value
    if isinstance(value, str):
        return re.sub(r"(?<=[0-9])_(?=[0-9])", "", value)
    return int(value) if base(kind) is int and isinstance(value, float) and value.is_integer() else value
