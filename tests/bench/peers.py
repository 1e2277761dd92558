"""The servers that are compared, each as someone at home in its world would write it, and how it is started."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemon import CONSOLE_SCRIPT

SERVERS = Path(__file__).with_name("servers")

PORT = "PORT"
"""Stands in a command for the port to listen on."""


class MissingError(Exception):
    """What isn't installed here, and how it would be."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server: its command, with PORT in it."""

    name: str
    about: str
    command: tuple[str, ...]
    knows_utf8: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    """What it needs beside ours."""


def compiled(source: Path, folder: Path) -> str:
    """Compile a C program into the folder and return its path; raises MissingError."""
    compiler = shutil.which("cc")
    if not compiler:
        raise MissingError("no C compiler: apt-get install gcc libc6-dev")
    program = folder / source.stem
    # -O3: without it the limit's loop over the bytes isn't vectorized, and it is no limit.
    subprocess.run([compiler, "-O3", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return str(program)


def echod() -> Peer:
    """Ourselves, everything on, at defaults."""
    return Peer("echod", "echod, every feature on", (CONSOLE_SCRIPT, "serve", "-l", f"127.0.0.1:{PORT}"))


def bare() -> Peer:
    """What CI holds echod against."""
    return Peer("bare", "the same event loop and what a line asks for, nothing else", _python("bare.py"))


def everyone(folder: Path) -> tuple[list[Peer], Mapping[str, str]]:
    """All that can be had here, built into the folder, and of the others why not; raises MissingError without a C."""
    peers = [
        Peer("C", "an epoll loop that upper-cases bytes: the practical limit", _limit(folder), knows_utf8=False),
        bare(),
        echod(),
    ]
    missing: dict[str, str] = {}
    for make in (_go, _node, _uvloop_streams, _asyncio_streams, _twisted):
        try:
            peers.append(make(folder))
        except MissingError as error:
            missing[make.__name__.strip("_").replace("_", " ")] = str(error)
    return peers, missing


def _limit(folder: Path) -> tuple[str, ...]:
    return (compiled(SERVERS / "limit.c", folder), PORT)


def _python(script: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(SERVERS / script), PORT, *arguments)


def _go(folder: Path) -> Peer:
    if not shutil.which("go"):
        raise MissingError("not installed: apt-get install golang-go")
    program = folder / "go-server"
    subprocess.run(["go", "build", "-o", program, SERVERS / "server.go"], check=True)
    return Peer("Go", "a goroutine a connection", (str(program), PORT))


def _node(_: Path) -> Peer:
    if not shutil.which("node"):
        raise MissingError("not installed: apt-get install nodejs")
    return Peer("Node", "node:net, a chunk at a time", ("node", str(SERVERS / "server.js"), PORT))


def _asyncio_streams(_: Path) -> Peer:
    return Peer("asyncio streams", "as the tutorials have it", _python("streams.py"))


def _uvloop_streams(_: Path) -> Peer:
    return Peer("uvloop streams", "the same on uvloop", _python("streams.py", "uvloop"))


def _twisted(_: Path) -> Peer:
    found = importlib.util.find_spec("twisted")
    if not found or not found.origin:
        raise MissingError("not installed: `make bench` does it")
    # In a folder of its own, which its server alone is told of: structlog imports Twisted where it finds it.
    environment = {"PYTHONPATH": str(Path(found.origin).parents[1])}
    return Peer("Twisted", "its line protocol, on epoll", _python("twisted_lines.py"), environment=environment)
