"""A gate in the middle of reading the configuration, at which an echod under test waits as long as a test wants."""

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
"""Makes a program stop at the gate."""


class Gate:
    """Open until it is shut; the one who comes then stops until it is let through, and others find it open again."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(CODE)
        self._fifo = directory / "gate"
        self.environment = {"PYTHONPATH": str(directory), "TEST_GATE": str(self._fifo)}
        """Of a process that is to stop at the gate."""

    def shut(self) -> None:
        """Stop the next one."""
        os.mkfifo(self._fifo)

    def wait(self) -> Callable[[], None]:
        """Return when somebody stands at it; what is returned lets him through."""
        writer = os.open(self._fifo, os.O_WRONLY)  # returns when it is opened to be read
        self._fifo.unlink()
        return lambda: os.close(writer)
