"""A configuration as TOML that a person can read and `settings.load` reads back."""

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Meta, Struct

from echod.config import SECTIONS, Config


def render(config: Config, *, with_comments: bool = False) -> str:
    """The configuration as TOML that `load` reads back."""
    lines: list[str] = []
    for listen in config.listen:
        lines += ["[[listen]]", *_rendered_keys(listen, with_comments=with_comments), ""]
    for section, struct in SECTIONS.items():
        note = f"  # {_summary(struct)}" if with_comments else ""
        lines += [f"[{section}]{note}", *_rendered_keys(getattr(config, section), with_comments=with_comments), ""]
    return "\n".join(lines)


def _rendered_keys(struct: Struct, *, with_comments: bool) -> Iterator[str]:
    for field in msgspec.structs.fields(type(struct)):
        line = f"{field.name} = {_toml(getattr(struct, field.name))}"
        yield f"{line:<32}# {_description(field.type)}" if with_comments else line


def _toml(value: str | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    return repr(int(value) if value == int(value) else value)


def _description(kind: Any) -> str:
    notes = [note.description for note in kind.__metadata__ if isinstance(note, Meta)]
    return next(filter(None, reversed(notes)), "")


def _summary(struct: type[Struct]) -> str:
    return (struct.__doc__ or "").rstrip(".").lower()
