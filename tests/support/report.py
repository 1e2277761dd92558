"""The report that a suite prints at the end of the run: a line for each measurement."""

from collections.abc import Callable, Mapping

import pytest

ROWS = pytest.StashKey[list[str]]()

Report = Callable[..., None]
"""A function that takes a title, and figures by name."""


def row(figures: Mapping[str, object], between: str) -> str:
    """Return the figures as one line, each behind its name."""
    return " · ".join(f"{name}{between}{value}" for name, value in figures.items())
