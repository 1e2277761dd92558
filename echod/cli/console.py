"""What a command says: its answer on standard output, what is wrong on standard error."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

STANDARD_OUTPUT = 1


def is_screen(environment: Mapping[str, str]) -> bool:
    """Whether standard output is a terminal that knows escape sequences."""
    return os.isatty(STANDARD_OUTPUT) and environment.get("TERM", "dumb") != "dumb"


def wants_colour(environment: Mapping[str, str]) -> bool:
    """Whether who looks at standard output would see colours, and wants to (no-color.org)."""
    return is_screen(environment) and not environment.get("NO_COLOR")


def show(text: str) -> None:
    """UTF-8 whatever the locale, at once. Raises OSError if it can't be written."""
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def show_line(text: str) -> None:
    """The same, and the end of the line."""
    show(f"{text}\n")


def complain(errors: Sequence[str]) -> None:
    """Each on a line of its own."""
    text = "".join(f"{message}\n" for message in errors)
    with suppress(OSError):  # nobody reads standard error: the exit status says it all the same
        os.write(2, text.encode(errors="backslashreplace"))
