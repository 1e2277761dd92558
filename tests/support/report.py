"""What a suite prints at the end of the run: a line for each thing that it measured."""

from collections.abc import Callable, Mapping

import pytest

ROWS = pytest.StashKey[list[str]]()

Report = Callable[..., None]
"""Takes what was done, and figures by name."""


def row(figures: Mapping[str, object], between: str) -> str:
    """The figures in a line, each behind its name."""
    return " · ".join(f"{name}{between}{value}" for name, value in figures.items())
