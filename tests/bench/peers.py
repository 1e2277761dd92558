"""The compared servers: their commands, protocols and workloads."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.dialects import MEMCACHED, REDIS, UPPER, Dialect
from tests.bench.workloads import IDLE, TLS, Workload
from tests.support.daemon import CONSOLE_SCRIPT

SERVERS = Path(__file__).with_name("servers")

PORT, BACKEND, FILE = "PORT", "BACKEND", "FILE"
"""Placeholders in commands: the port, that of a server behind, and the path of the configuration file."""

COMPILED, PYTHON = "echod", "echod, Python"
"""The names of echod's two paths: with its compiled fast path, and without."""

CHECKED = "echod, checks"
"""The name of an echod that looks at `allow`, `deny` and the rate of each address."""

OVER_TLS = frozenset(workload.name for workload in TLS)


class MissingError(Exception):
    """A server or a tool is not installed; the message tells how to install it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server; `command` has PORT in it."""

    name: str
    about: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """What it needs beside ours."""
    dialect: Dialect = UPPER
    knows_utf8: bool = True
    keeps_rates: bool = True
    """Whether it takes part in the fixed rates, for which it must be fast enough."""
    only: frozenset[str] = frozenset()
    """The names of the only workloads that it takes, for a server of a special kind."""
    file: str = ""
    """The text of a configuration file, with placeholders too."""
    behind: tuple[str, ...] = ()
    """The command of a second server that this one passes its clients to; its CPU time counts as well."""

    @property
    def is_tls(self) -> bool:
        """Whether its clients speak TLS."""
        return bool(self.only & OVER_TLS)

    @property
    def key(self) -> str:
        """Its name on the command line."""
        return key_of(self.name)

    @property
    def does_other_work(self) -> bool:
        """Whether it does other work than upper-casing, and shows the cost of a well-known daemon."""
        return self.dialect is not UPPER

    def takes(self, workload: Workload) -> bool:
        """Return whether the workload applies to the server."""
        if self.only or workload.name in OVER_TLS:
            return workload.name in self.only
        return (
            (self.knows_utf8 or not workload.is_mixed)
            and (self.keeps_rates or not workload.per_s)
            and (workload.is_for_other_work or not self.does_other_work)
        )


def key_of(name: str) -> str:
    """Return the name of a peer on the command line: `echod, Python` is `echod-python`."""
    return name.lower().replace(",", "").replace(" ", "-")


def compiled(source: Path, directory: Path) -> str:
    """Compile a C program into the directory and return its path; raises MissingError."""
    compiler = shutil.which("cc")
    if not compiler:
        raise MissingError("no C compiler: apt-get install gcc libc6-dev")
    program = directory / source.stem
    # -O3: without it gcc does not vectorize the limit's loop over the bytes, and the limit would be none.
    subprocess.run([compiler, "-O3", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return str(program)


def built(source: Path, directory: Path) -> str:
    """Build a Go program into the directory and return its path; raises MissingError."""
    _needed("go", "golang-go")
    program = directory / source.stem
    subprocess.run(["go", "build", "-o", program, source], check=True)
    return str(program)


def limit(directory: Path) -> Peer:
    """The practical limit; raises MissingError without a C compiler."""
    return Peer(
        name="C",
        about="an epoll loop that upper-cases bytes: the practical limit",
        command=(compiled(SERVERS / "limit.c", directory), PORT),
        knows_utf8=False,
    )


def bare() -> Peer:
    """The bare uvloop protocol."""
    return Peer(
        name="bare", about="uvloop's protocol and what a line asks for, nothing else", command=_python("bare.py")
    )


def echod(command: Sequence[str] = (CONSOLE_SCRIPT,)) -> Peer:
    """Echod with its compiled fast path, every feature on, at defaults."""
    return Peer(name=COMPILED, about="every feature on", command=_serve(command))


def echod_python(command: Sequence[str] = (CONSOLE_SCRIPT,)) -> Peer:
    """Echod without its compiled fast path, every feature on, at defaults."""
    about = "the same without the compiled fast path"
    return Peer(name=PYTHON, about=about, command=_serve(command), environment={"ECHOD_FASTPATH": "0"})


def everyone(directory: Path, command: Sequence[str], keys: Sequence[str] = ()) -> tuple[list[Peer], dict[str, str]]:
    """Return the peers (all if no key is given) available here, built into the directory, and why others are not."""
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for name, make in _MAKERS.items():
        if not keys or key_of(name) in keys:
            try:
                peers.append(make(directory, command))
            except MissingError as error:
                missing[name] = str(error)
    return peers, missing


def _serve(command: Sequence[str]) -> tuple[str, ...]:
    return (*command, "serve", "-l", f"127.0.0.1:{PORT}")


def _python(script: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(SERVERS / script), PORT, *arguments)


def _needed(program: str, package: str) -> None:
    if not shutil.which(program):
        raise MissingError(f"not installed: apt-get install {package}")


def _go(directory: Path) -> Peer:
    program = built(SERVERS / "server.go", directory)
    return Peer(name="Go", about="a goroutine for each connection", command=(program, PORT))


def certificate(directory: Path) -> tuple[Path, Path]:
    """Return the files of a self-signed certificate and its key, ECDSA P-256; raises MissingError."""
    _needed("openssl", "openssl")
    pem, key = directory / "tls.pem", directory / "tls.key"
    if not pem.exists():
        kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost")
        made = ("openssl", "req", "-x509", "-days", "2", *kind, "-keyout", str(key), "-out", str(pem))
        subprocess.run(made, check=True, capture_output=True)
    return pem, key


def echod_checked(command: Sequence[str] = (CONSOLE_SCRIPT,)) -> Peer:
    """Echod with networks to look up and a rate to check for each connection; every client passes."""
    networks = 'allow = ["127.0.0.0/8", "2001:db8::/32"]\ndeny = ["192.0.2.0/24", "198.51.100.7/32"]'
    file = f'[[listen]]\naddress = "127.0.0.1:{PORT}"\n{networks}\n[limits]\nconnection_rate = 1000000\n'
    about = "with `allow`, `deny` and `connection_rate`"
    return Peer(
        name=CHECKED, about=about, command=(*command, "serve", "-c", FILE), file=file, only=frozenset({"churn"})
    )


def echod_tls(directory: Path, command: Sequence[str] = (CONSOLE_SCRIPT,)) -> Peer:
    """Echod with a TLS listener."""
    pem, key = certificate(directory)
    file = f'[[listen]]\naddress = "127.0.0.1:{PORT}"\ntls_certificate = "{pem}"\ntls_key = "{key}"\n'
    about = "every feature on"
    return Peer(name="echod, TLS", about=about, command=(*command, "serve", "-c", FILE), file=file, only=OVER_TLS)


def _go_tls(directory: Path) -> Peer:
    pem, key = certificate(directory)
    command = (built(SERVERS / "server_tls.go", directory), PORT, str(pem), str(key))
    return Peer(name="Go, TLS", about="crypto/tls", command=command, only=OVER_TLS)


def _haproxy_tls(directory: Path, command: Sequence[str]) -> Peer:
    """HAProxy terminates TLS in front of a plain echod."""
    program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not program:
        raise MissingError("not installed: apt-get install haproxy")
    pem, key = certificate(directory)
    both = directory / "haproxy.pem"
    both.write_bytes(pem.read_bytes() + key.read_bytes())
    lines = (
        "global\n    nbthread 1\n    maxconn 4000",
        "defaults\n    mode tcp\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s",
        f"listen echo\n    bind 127.0.0.1:{PORT} ssl crt {both}\n    server echo 127.0.0.1:{BACKEND}\n",
    )
    return Peer(
        name="HAProxy, TLS",
        about="terminates TLS in front of a plain echod; the CPU time is that of both",
        command=(program, "-db", "-f", FILE),
        file="\n".join(lines),
        behind=(*command, "serve", "-l", f"127.0.0.1:{BACKEND}"),
        only=OVER_TLS,
    )


def _node() -> Peer:
    _needed("node", "nodejs")
    command = ("node", str(SERVERS / "server.js"), PORT)
    return Peer(name="Node", about="node:net, a chunk at a time", command=command, keeps_rates=False)


def _asyncio_streams() -> Peer:
    return Peer(name="asyncio streams", about="as in the tutorials", command=_python("streams.py"), keeps_rates=False)


def _uvloop_streams() -> Peer:
    command = _python("streams.py", "uvloop")
    return Peer(name="uvloop streams", about="the same on uvloop", command=command, keeps_rates=False)


def _twisted() -> Peer:
    found = importlib.util.find_spec("twisted")
    if not found or not found.origin:
        raise MissingError("not installed: `make bench` installs it")
    return Peer(
        name="Twisted",
        about="its line protocol, on epoll",
        command=_python("twisted_lines.py"),
        # It is in a directory of its own, which only this server sees: structlog imports Twisted where it finds it.
        environment={"PYTHONPATH": str(Path(found.origin).parents[1])},
        keeps_rates=False,
    )


def _memcached() -> Peer:
    _needed("memcached", "memcached")
    options = ("-l", "127.0.0.1", "-U", "0", "-t", "1", "-c", str(IDLE.connections + 100), "-u", "nobody")
    return Peer(
        name="memcached",
        about="one worker thread; a meta get (`mg`) that misses",
        command=("memcached", "-p", PORT, *options),
        dialect=MEMCACHED,
    )


def _redis(directory: Path) -> Peer:
    _needed("redis-server", "redis-server")
    # Its protected mode takes 127.0.0.2, from where the load comes too, for another machine.
    safe = ("--bind", "127.0.0.1", "--protected-mode", "no")
    options = (*safe, "--save", "", "--appendonly", "no", "--dir", str(directory))
    return Peer(
        name="Redis",
        about="one I/O thread, no persistence; `ECHO`",
        command=("redis-server", "--port", PORT, *options),
        dialect=REDIS,
    )


_MAKERS: Mapping[str, Callable[[Path, Sequence[str]], Peer]] = {
    "C": lambda directory, _command: limit(directory),
    "bare": lambda _folder, _command: bare(),
    COMPILED: lambda _folder, command: echod(command),
    PYTHON: lambda _folder, command: echod_python(command),
    "Go": lambda directory, _command: _go(directory),
    "Node": lambda _folder, _command: _node(),
    "uvloop streams": lambda _folder, _command: _uvloop_streams(),
    "asyncio streams": lambda _folder, _command: _asyncio_streams(),
    "Twisted": lambda _folder, _command: _twisted(),
    "memcached": lambda _folder, _command: _memcached(),
    "Redis": lambda directory, _command: _redis(directory),
    CHECKED: lambda _directory, command: echod_checked(command),
    "echod, TLS": echod_tls,
    "Go, TLS": lambda directory, _command: _go_tls(directory),
    "HAProxy, TLS": _haproxy_tls,
}
"""By name; each is given a directory to build into and the command of echod."""

KEYS = tuple(map(key_of, _MAKERS))
"""The peers as an option takes them."""
