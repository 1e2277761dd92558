"""The statistics as a table for people: lines of cells with a meaning, from which `rendered` makes text and colours.

A daemon of another version may have other statistics: a missing one is left out, an unknown one is listed last.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from math import log10
from typing import Any, NamedTuple

from echod.cli.stats_rates import Rates, flat, number
from echod.net.tls import WARN_BEFORE_S
from echod.telemetry.stats import Figure, figures


class Meaning(Enum):
    """Why a cell is highlighted; the value is the parameter of its escape sequence (ECMA-48, SGR)."""

    TITLE = "1"
    NOTHING = "2"
    GOOD = "32"
    WARNING = "33"
    BAD = "31"
    BAR = "36"


class Cell(NamedTuple):
    """A part of a line with one meaning."""

    text: str
    meaning: Meaning | None = None


Line = tuple[Cell, ...]

Format = Callable[[float], str]


# -- numbers -----------------------------------------------------------------------------------------------------------


def count(value: float) -> str:
    """Format a count."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Format a number of bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def milliseconds(value: float) -> str:
    """Format a short time."""
    return f"{value:,.1f} ms"


def duration(seconds: float) -> str:
    """Format a long time in its two largest units."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    return f"{h} h {m} min" if h else f"{m} min {s} s" if m else f"{s} s"


def bar(share: float, width: int = 20) -> str:
    """Draw a bar for a share from 0 to 1."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "█" * filled + "░" * (width - filled)


# -- lines -------------------------------------------------------------------------------------------------------------

_FORMATS: Mapping[str, Format] = {"": count, "bytes": size, "milliseconds": milliseconds}

TITLE = ("version", "pid", "state", "uptime_s", "fast_path")
LAST_ERROR = "reloads.last_error"
CERTIFICATE_ENDS = "tls.certificate_ends"


def table(stats: Mapping[str, Any], rates: Rates | None = None) -> list[Line]:
    """Return a title and a line for each statistic, in sections; with `rates` also how fast each counter grows."""
    values = flat(stats)
    lines: list[Line] = [_title(values)]
    shown = {*TITLE, LAST_ERROR}
    last_section = ""
    for name, figure in figures().items():
        names = _names(name, figure, values)
        if not names:
            continue
        if name.startswith("tls.") and not any(values[each] for each in names):
            shown.update(names)  # no listener speaks TLS
            continue
        if figure.section != last_section:
            last_section = figure.section
            lines += [(), (Cell(figure.section, Meaning.TITLE),)]
        lines.append(_line(name, figure, {each: values[each] for each in names}, rates))
        shown.update(names)
    if error := values.get(LAST_ERROR):
        lines.append((Cell(f"  last reload: {printable(error)}", Meaning.BAD),))
    others = [name for name in values if name not in shown]
    if others:
        lines += [(), (Cell("more", Meaning.TITLE),)]
    lines += [(Cell(f"  {printable(name):<17}"), Cell(f"{printable(values[name]):>12}")) for name in others]
    return lines


def _title(values: Mapping[str, Any]) -> Line:
    state = printable(values.get("state"))
    uptime = number(values.get("uptime_s"))
    return (
        Cell(f"echod {printable(values.get('version'))}", Meaning.TITLE),
        Cell(f"   pid {printable(values.get('pid'))}   "),
        Cell(state, Meaning.GOOD if state == "serving" else Meaning.WARNING),
        Cell(f"   up {duration(uptime)}" if uptime is not None else ""),
        Cell({"True": "   fast path", "False": "   no fast path"}.get(str(values.get("fast_path")), "")),
    )


def _names(name: str, figure: Figure, values: Mapping[str, Any]) -> list[str]:
    """Return the flat names whose values the row of a statistic adds up."""
    if not figure.row:
        return []
    if figure.label:
        return [each for each in values if each.startswith(f"{name}.") and each != LAST_ERROR]
    return [name] if name in values else []


def _line(name: str, figure: Figure, values: Mapping[str, Any], rates: Rates | None) -> Line:
    label = Cell(f"  {figure.row:<17}")
    if None in map(number, values.values()):
        return (label, Cell(f"{printable(next(iter(values.values()))):>12}", Meaning.WARNING))
    if name == CERTIFICATE_ENDS:
        return (label, *_next_end(values))
    value = sum(values.values())
    cells = [label, Cell(f"{_FORMATS[figure.unit](value):>12}", _meaning(figure, value))]
    if rates:
        cells.append(Cell(f"{_rate(figure, sum(rates.per_second.get(each, 0.0) for each in values)):>14}"))
    cells += _notes(name, figure, values, rates)
    return tuple(cells)


def _next_end(ends: Mapping[str, float]) -> Iterator[Cell]:
    """Yield the time until the first certificate ends, and its listener."""
    name, end = min(ends.items(), key=lambda item: item[1])
    left_s = end - time.time()
    meaning = Meaning.BAD if left_s <= 0 else Meaning.WARNING if left_s <= WARN_BEFORE_S else None
    yield Cell(f"{'has ended' if left_s <= 0 else f'in {duration(left_s)}':>12}", meaning)
    yield Cell("   " + printable(name.removeprefix(f"{CERTIFICATE_ENDS}.")))


def _meaning(figure: Figure, value: float) -> Meaning | None:
    if value >= figure.bad_from:
        return Meaning.BAD
    if value >= figure.warn_from:
        return Meaning.WARNING
    return None if value else Meaning.NOTHING


def _rate(figure: Figure, per_second: float) -> str:
    if not per_second:
        return ""
    is_whole = figure.unit == "bytes" or per_second >= 100
    return f"{_FORMATS[figure.unit](per_second)}/s" if is_whole else f"{per_second:.1f}/s"


def _notes(name: str, figure: Figure, values: Mapping[str, Any], rates: Rates | None) -> Iterator[Cell]:
    """Yield what follows a value: what a sum consists of, or a bar."""
    if figure.label:
        parts = [f"{each.removeprefix(f'{name}.')} {count(value)}" for each, value in values.items() if value]
        yield Cell("   " + printable(", ".join(parts)))
    elif rates and name == "connections.open":
        yield Cell("   " + bar(values[name] / max(rates.peak_open, 1)), Meaning.BAR)
        yield Cell(f" peak {count(rates.peak_open)}")
    elif rates and name == "loop_lag_ms":
        yield Cell("   " + bar(lag_share(values[name])), _meaning(figure, values[name]) or Meaning.BAR)


def lag_share(lag_ms: float) -> float:
    """Return the share of the bar that a lag fills, on a logarithmic scale: 0 at 0.1 ms, 1 at a second."""
    return log10(max(lag_ms, 0.1) / 0.1) / 4


def printable(value: Any) -> str:
    """Return a value of any type as text without control characters."""
    if value is None:
        return "unknown"
    text = str(value)
    return text if text.isprintable() else repr(text)


# -- text --------------------------------------------------------------------------------------------------------------


def rendered(line: Line, width: int | None, *, in_colour: bool) -> str:
    """Return a line as text, cut to the width of the terminal if there is one."""
    left = width
    shown = []
    for cell in line:
        text = cell.text if left is None else cell.text[:left]
        left = None if left is None else left - len(text)
        is_marked = in_colour and cell.meaning and text.strip()
        shown.append(f"\x1b[{cell.meaning.value}m{text}\x1b[0m" if is_marked and cell.meaning else text)
    return "".join(shown).rstrip()
