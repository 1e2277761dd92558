"""A gate that pauses an echod under test while it reads its configuration, for as long as a test needs."""

import os
from collections.abc import Callable
from pathlib import Path

CODE = """
import os
import tomllib

def _wait(text, loads=tomllib.loads):
    try:
        with open(os.environ["TEST_GATE"], "rb") as gate:
            gate.read()
    except FileNotFoundError:
        pass
    return loads(text)

tomllib.loads = _wait
"""
"""Python code that makes a program stop at the gate."""


class Gate:
    """A gate that is open until `shut`; then the next process stops at it until released, and later ones pass."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(CODE)
        self._fifo = directory / "gate"
        self.environment = {"PYTHONPATH": str(directory), "TEST_GATE": str(self._fifo)}
        """The environment of a process that stops at the gate."""

    def shut(self) -> None:
        """Close the gate for the next process."""
        os.mkfifo(self._fifo)

    def wait(self) -> Callable[[], None]:
        """Wait until a process has stopped at the gate, and return the function that releases it."""
        writer = os.open(self._fifo, os.O_WRONLY)  # blocks until it is opened for reading
        self._fifo.unlink()
        return lambda: os.close(writer)
