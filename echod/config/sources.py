"""What configures echod, as each source says it, and the ways to write a number."""

import re
from typing import Annotated, Any, NamedTuple, get_args, get_origin


class Setting(NamedTuple):
    """One value that a source gives to one key; the value is still text unless it comes from a file."""

    source: str
    key: str
    value: Any
    is_text: bool = True


class Sources(NamedTuple):
    """Where the configuration comes from: a file, if one is named, and what the flags set."""

    file: str | None
    flags: tuple[Setting, ...]


class Serve(NamedTuple):
    """`echod serve`"""

    sources: Sources
    is_daemon: bool = False
    pidfile: str | None = None
    user: str | None = None
    group: str | None = None


def base(kind: Any) -> Any:
    """The type of a key without its range and description."""
    return base(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def as_number(value: Any, kind: Any) -> Any:
    """The value as a key of this kind takes it, if that is a number: 1000, 1_000 and 1e3 are the same in every source.

    TOML has all three ways to write a number.
    """
    if base(kind) not in (int, float):
        return value
    if isinstance(value, str):
        return re.sub(r"(?<=[0-9])_(?=[0-9])", "", value)
    return int(value) if base(kind) is int and isinstance(value, float) and value.is_integer() else value
