"""The statistics as a person reads them: lines of cells that know what they mean, colours and widths coming last.

A daemon of another version may lack a figure or have more: what is missing is left out, what is unknown comes last.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from math import log10
from typing import Any, NamedTuple

from echod.cli.stats_rates import Rates, flat, number


class Meaning(Enum):
    """Why a cell stands out, and the escape sequence that shows it (ECMA-48, SGR)."""

    TITLE = "1"
    NOTHING = "2"
    GOOD = "32"
    WARNING = "33"
    BAD = "31"
    BAR = "36"


class Cell(NamedTuple):
    """Some text of a line."""

    text: str
    meaning: Meaning | None = None


Line = tuple[Cell, ...]

Format = Callable[[float], str]


class Row(NamedTuple):
    """A figure: `name` is that in the statistics, or with a star at its end all those below it."""

    label: str
    name: str
    format: Format
    warns_from: float = float("inf")
    is_bad_from: float = float("inf")


# -- figures -----------------------------------------------------------------------------------------------------------


def count(value: float) -> str:
    """A number of things."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """A number of bytes, in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def milliseconds(value: float) -> str:
    """A short time."""
    return f"{value:,.1f} ms"


def duration(seconds: float) -> str:
    """A long time, in its two largest units."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    return f"{h} h {m} min" if h else f"{m} min {s} s" if m else f"{s} s"


def bar(share: float, width: int = 20) -> str:
    """So much of a whole, from 0 to 1."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "█" * filled + "░" * (width - filled)


# -- lines -------------------------------------------------------------------------------------------------------------

SECTIONS: Mapping[str, Sequence[Row]] = {
    "connections": (
        Row("open", "connections.open", count),
        Row("accepted", "connections.accepted", count),
        Row("closed", "connections.closed.*", count),
        Row("rejected", "connections.rejected.*", count, warns_from=1),
    ),
    "traffic": (
        Row("lines", "lines", count),
        Row("in", "bytes_in", size),
        Row("out", "bytes_out", size),
    ),
    "process": (
        Row("loop lag", "loop_lag_ms", milliseconds, warns_from=100, is_bad_from=1000),
        Row("memory", "rss_bytes", size),
        Row("held for clients", "held_bytes", size),
        Row("open files", "open_files", count),
        Row("log dropped", "log_dropped", count, warns_from=1),
        Row("configuration", "config_generation", count),
        Row("reloads", "reloads.*", count),
        Row("upgrades", "upgrades", count),
    ),
}

TITLE = ("version", "pid", "state", "uptime_s", "fast_path")
LAST_ERROR = "reloads.last_error"


def table(stats: Mapping[str, Any], rates: Rates | None = None) -> list[Line]:
    """A title and a line for each figure, in sections; with `rates` also how fast it grows."""
    figures = flat(stats)
    lines: list[Line] = [_title(figures)]
    told = {*TITLE, LAST_ERROR}
    for section, rows in SECTIONS.items():
        found = [(row, names) for row in rows if (names := _names(row, figures))]
        if found:
            lines += [(), (Cell(section, Meaning.TITLE),)]
        for row, names in found:
            lines.append(_line(row, names, figures, rates))
            told.update(names)
    if error := figures.get(LAST_ERROR):
        lines.append((Cell(f"  last reload: {printable(error)}", Meaning.BAD),))
    others = [name for name in figures if name not in told]
    if others:
        lines += [(), (Cell("more", Meaning.TITLE),)]
    lines += [(Cell(f"  {printable(name):<17}"), Cell(f"{printable(figures[name]):>12}")) for name in others]
    return lines


def _title(figures: Mapping[str, Any]) -> Line:
    state = printable(figures.get("state"))
    uptime = number(figures.get("uptime_s"))
    return (
        Cell(f"echod {printable(figures.get('version'))}", Meaning.TITLE),
        Cell(f"   pid {printable(figures.get('pid'))}   "),
        Cell(state, Meaning.GOOD if state == "serving" else Meaning.WARNING),
        Cell(f"   up {duration(uptime)}" if uptime is not None else ""),
        Cell({"True": "   fast path", "False": "   no fast path"}.get(str(figures.get("fast_path")), "")),
    )


def _names(row: Row, figures: Mapping[str, Any]) -> list[str]:
    if not row.name.endswith("*"):
        return [row.name] if row.name in figures else []
    return [name for name in figures if name.startswith(row.name[:-1]) and name != LAST_ERROR]


def _line(row: Row, names: Sequence[str], figures: Mapping[str, Any], rates: Rates | None) -> Line:
    numbers = [number(figures[name]) for name in names]
    label = Cell(f"  {row.label:<17}")
    if None in numbers:
        return (label, Cell(f"{printable(figures[names[0]]):>12}", Meaning.WARNING))
    value = sum(figures[name] for name in names)
    cells = [label, Cell(f"{row.format(value):>12}", _meaning(row, value))]
    if rates:
        grows = sum(rates.per_second.get(name, 0.0) for name in names)
        cells.append(Cell(f"{_rate(row, grows):>14}"))
    cells += _notes(row, names, figures, rates)
    return tuple(cells)


def _meaning(row: Row, value: float) -> Meaning | None:
    if value >= row.is_bad_from:
        return Meaning.BAD
    if value >= row.warns_from:
        return Meaning.WARNING
    return None if value else Meaning.NOTHING


def _rate(row: Row, grows: float) -> str:
    if not grows:
        return ""
    return f"{row.format(grows)}/s" if row.format is size or grows >= 100 else f"{grows:.1f}/s"


def _notes(row: Row, names: Sequence[str], figures: Mapping[str, Any], rates: Rates | None) -> Iterator[Cell]:
    """What stands behind a figure: what it is made of, or a bar."""
    if row.name.endswith("*"):
        parts = [f"{name.rpartition('.')[2]} {count(figures[name])}" for name in names if figures[name]]
        yield Cell("   " + printable(", ".join(parts)))
    elif rates and row.name == "connections.open":
        yield Cell("   " + bar(figures[row.name] / max(rates.peak_open, 1)), Meaning.BAR)
        yield Cell(f" peak {count(rates.peak_open)}")
    elif rates and row.name == "loop_lag_ms":
        lag_ms = figures[row.name]
        yield Cell("   " + bar(lag_share(lag_ms)), _meaning(row, lag_ms) or Meaning.BAR)


def lag_share(lag_ms: float) -> float:
    """How much of the bar a lag fills: nothing at 0.1 ms, all at the second from which the loop counts as stuck."""
    return log10(max(lag_ms, 0.1) / 0.1) / 4


def printable(value: Any) -> str:
    """A value of any kind, fit for a terminal."""
    if value is None:
        return "unknown"
    text = str(value)
    return text if text.isprintable() else repr(text)


# -- text --------------------------------------------------------------------------------------------------------------


def rendered(line: Line, width: int | None, *, in_colour: bool) -> str:
    """A line as text, cut where the terminal ends."""
    left = width
    shown = []
    for cell in line:
        text = cell.text if left is None else cell.text[:left]
        left = None if left is None else left - len(text)
        is_marked = in_colour and cell.meaning and text.strip()
        shown.append(f"\x1b[{cell.meaning.value}m{text}\x1b[0m" if is_marked and cell.meaning else text)
    return "".join(shown).rstrip()
