"""TOML: read within bounds, and written so that a person can read it and `settings.load` reads it back."""

import codecs
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Meta, Struct

from echod.config.schema import SECTIONS, Config

_KEY_PARTS = 100
"""Most parts of a dotted key: echod has two, and the parser's time grows with the square of them (20 000: 6 s)."""

# Quoted parts are bounded, or an odd text would take time that grows with its square here.
_KEY_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.){0,99}+"|'[^'\n]{0,99}+')[ \t]{0,9}+"""
_DEEP_KEY = re.compile(rf"(?<![\w-])(?:{_KEY_PART}\.[ \t]{{0,9}}+){{{_KEY_PARTS}}}")
_LONG_NUMBER = re.compile(r"[0-9](?:_?[0-9]){4299}")  # more digits are refused by int()


class TomlError(Exception):
    """Why a text can't be read as TOML."""


def parse(data: bytes) -> dict[str, Any]:
    """Return the document; raises TomlError."""
    import tomllib  # 3 ms that only a file needs

    if data.startswith(codecs.BOM_UTF8):
        raise TomlError("begins with a byte order mark: save it as UTF-8 without one")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise TomlError(f"not valid TOML: not UTF-8 (at byte {error.start})") from error
    if deep := _DEEP_KEY.search(text):
        raise TomlError(f"a key of more than {_KEY_PARTS} parts (at line {_line(text, deep)})")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TomlError(f"not valid TOML: {error}") from error
    except RecursionError as error:
        raise TomlError("not valid TOML: arrays or tables nested too deep") from error
    except ValueError as error:
        where = _LONG_NUMBER.search(text)
        raise TomlError(f"a number of too many digits{f' (at line {_line(text, where)})' if where else ''}") from error


def _line(text: str, found: "re.Match[str]") -> int:
    return text.count("\n", 0, found.start()) + 1


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
