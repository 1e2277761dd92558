"""Three echods behind an HAProxy, each with a port for clients and one for health checks."""

import contextlib
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.daemon import Daemon
from tests.system.balancer.haproxy import HAProxy, fenced, replaced

NAMES = ("echo1", "echo2", "echo3")

PORTS = range(20000, 32000)
"""Ports below the ephemeral range, so that no client is assigned the port of an echod that restarts."""


def free_ports(count: int) -> list[int]:
    """Return this many free ports."""
    chosen: list[int] = []
    with contextlib.ExitStack() as held:
        while len(chosen) < count:
            with contextlib.suppress(OSError):
                port = random.choice(PORTS)
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                chosen.append(port)
    return chosen


class Fleet:
    """The three echods by the names that HAProxy has for them, started by `balanced`."""

    def __init__(self, directory: Path, flags: tuple[str, ...], keys: str) -> None:
        """`keys` are further lines of the [[listen]] of each echod."""
        self.port, *ports = free_ports(1 + 2 * len(NAMES))
        self.ports = dict(zip(NAMES, ports[: len(NAMES)], strict=True))
        self.admins = dict(zip(NAMES, ports[len(NAMES) :], strict=True))
        self._flags = flags
        for name, port in self.ports.items():
            text = fenced("/etc/echod/echod.toml")
            listen = f'\n[[listen]]\naddress = "127.0.0.1:{port}"\n{keys}' if keys else ""
            (directory / f"{name}.toml").write_text(text + listen)
        self._directory = directory
        self._is_listed = bool(keys)
        self._instances: dict[str, Daemon] = {}

    def __getitem__(self, name: str) -> Daemon:
        return self._instances[name]

    def configuration(self) -> str:
        """Return the configuration of the page with these ports, and without retries."""
        changes = {"127.0.0.1:7777": f"127.0.0.1:{self.port}", "retries 3": "retries 0"}
        for number, name in enumerate(NAMES, 1):
            changes[f"127.0.0.1:888{number} port 889{number}"] = (
                f"127.0.0.1:{self.ports[name]} port {self.admins[name]}"
            )
        return replaced(fenced("/etc/haproxy/haproxy.cfg"), changes)

    def on_data_ports(self) -> str:
        """Return a configuration whose health checks only connect to the ports for clients."""
        configuration = self.configuration()
        changes = {f"port {self.admins[name]}": f"port {self.ports[name]}" for name in NAMES}
        return replaced(configuration, changes | {check_lines(configuration): ""})

    def start(self, name: str) -> None:
        """Start an echod, and return once it serves."""
        environment = {"ECHOD_ADMIN_LISTEN": f"127.0.0.1:{self.admins[name]}"}
        if not self._is_listed:
            environment["ECHOD_LISTEN"] = f"127.0.0.1:{self.ports[name]}"
        file = self._directory / f"{name}.toml"
        self._instances[name] = Daemon("-c", str(file), *self._flags, environment=environment)
        self[name].wait_for("ready")

    def leave(self, name: str) -> float:
        """Request a stop, and return the time of the request."""
        began = time.monotonic()
        self[name].send(signal.SIGTERM)
        return began

    def restart(self, name: str) -> None:
        """Stop an echod, assert that no client was aborted, and start it again."""
        self.leave(name)
        with self[name]:
            assert self[name].exit_status() == 0
        self.start(name)

    def end(self) -> None:
        """End what is still running, at once."""
        for instance in self._instances.values():
            with instance:
                pass


def check_lines(configuration: str) -> str:
    """Return the lines about health checks."""
    return "".join(line for line in configuration.splitlines(keepends=True) if re.search(r"\bhttp-?ch(ec)?k\b", line))


@contextlib.contextmanager
def balanced(
    directory: Path, *flags: str, configuration: Callable[[Fleet], str] = Fleet.configuration, keys: str = ""
) -> Iterator[tuple[Fleet, HAProxy]]:
    """Run three echods with these additional flags and keys of their [[listen]], and an HAProxy that sees them up."""
    fleet = Fleet(directory, flags, keys)
    try:
        for name in NAMES:
            fleet.start(name)
        with HAProxy(configuration(fleet), directory) as haproxy:
            for name in NAMES:
                haproxy.wait_for(name, "UP")
            yield fleet, haproxy
    finally:
        fleet.end()
