"""TOML: parsed within bounds of time, and rendered so that people can read it and `loader.load` reads it back."""

import codecs
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Meta, Struct

from echod.config.schema import SECTIONS, Config

_KEY_PARTS = 100
"""The most parts of a dotted key. echod has two; the parser's time grows with their square (6 s for 20 000)."""

# Quoted parts are bounded; otherwise this search could take time that grows with the square of the text.
_KEY_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.){0,99}+"|'[^'\n]{0,99}+')[ \t]{0,9}+"""
_DEEP_KEY = re.compile(rf"(?<![\w-])(?:{_KEY_PART}\.[ \t]{{0,9}}+){{{_KEY_PARTS}}}")
_LONG_NUMBER = re.compile(r"[0-9](?:_?[0-9]){4299}")  # more digits are refused by int()


def parse(data: bytes) -> dict[str, Any]:
    """Return the document; raise ValueError with a message that says what is wrong and where."""
    import tomllib  # takes 3 ms, and only a file needs it

    if data.startswith(codecs.BOM_UTF8):
        raise ValueError("begins with a byte order mark: save it as UTF-8 without one")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid TOML: not UTF-8 (at byte {error.start})") from error
    if deep := _DEEP_KEY.search(text):
        raise ValueError(f"a key has more than {_KEY_PARTS} parts (at line {_line(text, deep)})")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not valid TOML: {error}") from error
    except RecursionError as error:
        raise ValueError("not valid TOML: arrays or tables nested too deep") from error
    except ValueError as error:  # the conversion of a number
        where = _LONG_NUMBER.search(text)
        raise ValueError(
            f"a number has too many digits{f' (at line {_line(text, where)})' if where else ''}"
        ) from error


def _line(text: str, found: "re.Match[str]") -> int:
    return text.count("\n", 0, found.start()) + 1


def render(config: Config, *, with_comments: bool = False) -> str:
    """Return the configuration as TOML that `loader.load` reads back; `with_comments` adds each key's description."""
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


def _toml(value: str | float | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A JSON string is a TOML basic string, except that TOML requires DEL to be escaped.
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    return repr(int(value) if value == int(value) else value)


def _description(kind: Any) -> str:
    notes = [note.description for note in kind.__metadata__ if isinstance(note, Meta)]
    return next(filter(None, reversed(notes)), "")


def _summary(struct: type[Struct]) -> str:
    text = (struct.__doc__ or "").rstrip(".")
    return text[:1].lower() + text[1:]
