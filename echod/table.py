"""The statistics as a person reads them: a name and a value on each line."""

from collections.abc import Iterator, Mapping
from typing import Any


def table(stats: Mapping[str, Any]) -> str:
    """Each value on a line, behind its name; a name inside another one is joined to it by a dot."""
    rows = [*_rows(stats, "")]
    width = max((len(name) for name, _ in rows), default=0) + 2
    return "".join(f"{name:<{width}}{_shown(value)}".rstrip() + "\n" for name, value in rows)


def _rows(stats: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in stats.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: Any) -> str:
    if value is None:
        return "unknown"
    text = str(value)
    return text if text.isprintable() else repr(text)
