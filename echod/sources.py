"""What configures echod, as it was said: nothing here is read or understood yet."""

from typing import Any, NamedTuple


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
