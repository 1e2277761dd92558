"""Fill in the generated blocks of docs/: the configuration keys, the statistics and the metrics, from the code itself.

A block is the text between `<!-- generated: NAME -->` and `<!-- generated: end -->`; everything around it is written by
hand. With --check, write nothing and exit with status 1 if a page is stale.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from echod.admin.metrics import exposition
from echod.config.schema import SECTIONS, Config, Listen
from echod.telemetry.stats import Stats, figures

DOCS = Path(__file__).resolve().parent.parent / "docs"

_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- generated: end -->)", re.DOTALL)


# -- configuration -----------------------------------------------------------------------------------------------------


def configuration() -> str:
    """A table of keys for each section."""
    tables = [_keys("[[listen]]", Listen), *(_keys(f"[{name}]", struct) for name, struct in SECTIONS.items())]
    return "\n".join(tables)


def _keys(name: str, struct: type[msgspec.Struct]) -> str:
    rows = [
        (f"`{field.name}`", _default(field), _values(field.type), _note(field.type, "description"))
        for field in msgspec.structs.fields(struct)
    ]
    return f"### `{name}`\n\n{struct.__doc__}\n\n" + _table(("key", "default", "values", "meaning"), rows)


def _default(field: msgspec.structs.FieldInfo) -> str:
    default = getattr(Config().listen[0], field.name) if field.required else field.default
    return f"`{msgspec.json.encode(default).decode()}`"


def _values(kind: Any) -> str:
    plain = kind
    while hasattr(plain, "__metadata__"):
        plain = plain.__origin__
    if get_origin(plain) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(plain))
    if plain in (int, float):
        return f"{_number(_note(kind, 'ge'))} to {_number(_note(kind, 'le'))}"
    return {bool: "`true`, `false`", str: "text", tuple[str, ...]: "networks"}[plain]


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _note(kind: Any, name: str) -> Any:
    """The innermost or outermost annotation of a type that says something about `name`."""
    while hasattr(kind, "__metadata__"):
        for note in kind.__metadata__:
            if isinstance(note, Meta) and getattr(note, name) is not None:
                return getattr(note, name)
        kind = kind.__origin__
    return ""


# -- statistics and metrics --------------------------------------------------------------------------------------------

_KINDS = {bool: "boolean", str: "text", float: "number", int: "integer"}


def _snapshot() -> dict[str, Any]:
    gauges = dict.fromkeys(("log_dropped", "rss_bytes", "open_files"), lambda: 1)
    return Stats(gauges).snapshot("serving", (), {"127.0.0.1:8888": 0.0})


def statistics() -> str:
    """A table of the statistics by their path."""
    groups = {name.rpartition(".")[0] for name in figures()}
    rows = []
    for name, figure in figures().items():
        if name not in groups:
            value: Any = _snapshot()
            for key in name.split("."):
                value = value[key]
            kind = f"numbers by {figure.label}" if figure.label else _KINDS[type(value)]
            rows.append((f"`{name}`", kind, figure.help))
    return _table(("statistic", "type", "meaning"), rows)


def metrics() -> str:
    """A table of the metrics as a scrape shows them."""
    text = exposition(_snapshot()).decode()
    rows = []
    for name, meaning, kind in re.findall(r"# HELP (\w+) (.*)\n# TYPE \w+ (\w+)", text):
        labels = sorted(set(re.findall(rf"^{name}\{{(\w+)=", text, re.MULTILINE)))
        rows.append((f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), meaning))
    return _table(("metric", "type", "label", "meaning"), rows)


# -- pages -------------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def renewed(page: str) -> str:
    """The page with each of its generated blocks filled in."""
    makers = {"configuration": configuration, "statistics": statistics, "metrics": metrics}
    return _BLOCK.sub(lambda block: f"{block[1]}\n{makers[block[2]]()}\n{block[3]}", page)


def main(arguments: Sequence[str]) -> int:
    """Renew the pages, or with --check name those that are stale; return the exit status."""
    pages = {path: path.read_text() for path in sorted(DOCS.glob("*.md"))}
    stale = {path: page for path, text in pages.items() if (page := renewed(text)) != text}
    for path, page in stale.items():
        if "--check" in arguments:
            print(f"docs/{path.name} is stale: run `make docs`", file=sys.stderr)
        else:
            path.write_text(page)
            print(f"docs/{path.name} renewed")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
