"""Output of the commands: results on standard output, errors on standard error."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

STANDARD_OUTPUT = 1


def is_screen(environment: Mapping[str, str]) -> bool:
    """Whether standard output is a terminal that supports escape sequences."""
    return os.isatty(STANDARD_OUTPUT) and environment.get("TERM", "dumb") != "dumb"


def wants_colour(environment: Mapping[str, str]) -> bool:
    """Whether standard output shows colours and the user has not disabled them (no-color.org)."""
    return is_screen(environment) and not environment.get("NO_COLOR")


def show(text: str) -> None:
    """Write text to standard output and flush, as UTF-8 in any locale; raise OSError if that fails."""
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def show_line(text: str) -> None:
    """Write a line to standard output; raise OSError if that fails."""
    show(f"{text}\n")


def complain(errors: Sequence[str]) -> None:
    """Write each error to standard error, on its own line."""
    text = "".join(f"{message}\n" for message in errors)
    with suppress(OSError):  # without a standard error, the exit status is all that a command can say
        os.write(2, text.encode(errors="backslashreplace"))
