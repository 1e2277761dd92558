"""A container engine, used by its command line, or by its API where the command line is too slow."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from functools import cached_property
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tests.support.daemon import DEADLINE_S, Event

PROJECT = Path(__file__).parents[3]
PORT = 8888


class Engine:
    """Runs `docker`, and removes the containers that tests have started, by a label."""

    def __init__(self) -> None:
        self.label = f"echod-test={os.getpid()}"

    def run(self, *arguments: str, deadline_s: float = 60) -> "subprocess.CompletedProcess[str]":
        """Run `docker ARGUMENTS` and return the result, whatever its exit status."""
        command = ["docker", *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=deadline_s)

    def __call__(self, *arguments: str, deadline_s: float = 60) -> str:
        """Return the output of `docker ARGUMENTS`, which must succeed."""
        done = self.run(*arguments, deadline_s=deadline_s)
        assert done.returncode == 0, f"docker {arguments}: {done.returncode}: {done.stderr[-3000:]}"
        return done.stdout.strip()

    def inspect(self, what: str) -> dict[str, Any]:
        """Return the description of a container or an image."""
        (found,) = json.loads(self("inspect", what))
        assert isinstance(found, dict)
        return found

    def start(self, image: str, *options: str, command: tuple[str, ...] = ()) -> "Container":
        """Run `docker run --detach OPTIONS IMAGE COMMAND`."""
        return Container(self, self("run", "--detach", "--label", self.label, *options, image, *command))

    def create(self, image: str) -> "Container":
        """Create a container without a health check, to be started over the API."""
        settings = {"Image": image, "Labels": dict([self.label.split("=")]), "Healthcheck": {"Test": ["NONE"]}}
        status, made = self.call("POST", "/containers/create", settings)
        assert status == 201, made
        return Container(self, made["Id"])

    def clean_up(self) -> None:
        """Remove every container that was started with the label."""
        if left := self("ps", "--all", "--quiet", "--filter", f"label={self.label}").split():
            self("rm", "--force", "--volumes", *left)

    # -- the API -------------------------------------------------------------------------------------------------------

    def socket_path(self) -> str | None:
        """Return the Unix socket of the engine's API; None if there is none on this machine."""
        host = os.environ.get("DOCKER_HOST") or self("context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
        return host.removeprefix("unix://") if host.startswith("unix://") else None

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Send a request to the API; return the status and the document."""
        connection = _Connection(self.socket_path() or "")
        try:
            text, headers = ("", {}) if body is None else (json.dumps(body), {"Content-Type": "application/json"})
            connection.request(method, path, text, headers)
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else None
        finally:
            connection.close()


class _Connection(HTTPConnection):
    """HTTP through the engine's Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Container:
    """A container, and its log events as they arrive."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self.name = name

    @property
    def state(self) -> dict[str, Any]:
        _, found = self._engine.call("GET", f"/containers/{self.name}/json")
        state: dict[str, Any] = found["State"]
        return state

    @property
    def health(self) -> str:
        return str(self.state["Health"]["Status"])

    @cached_property
    def host(self) -> str:
        """The address of the container, which this machine reaches without a proxy."""
        networks = self._engine.inspect(self.name)["NetworkSettings"]["Networks"]
        return str(next(iter(networks.values()))["IPAddress"])

    @property
    def address(self) -> str:
        return f"{self.host}:{PORT}"

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        """Connect a client with a deadline for every operation."""
        client = socket.socket()
        client.settimeout(DEADLINE_S)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect((self.host, PORT))
        return client

    def wait_until(self, look: Callable[[], Any], complaint: str) -> Any:
        """Wait until the function returns something true, and return that."""
        end = time.monotonic() + DEADLINE_S
        while not (found := look()):
            assert time.monotonic() < end, f"{complaint}: {self.state} {self.logs()}"
            time.sleep(0.02)
        return found

    def logs(self) -> list[str]:
        done = self._engine.run("logs", self.name)
        return [*done.stdout.splitlines(), *done.stderr.splitlines()]

    def events(self, name: str) -> list[Event]:
        found = [json.loads(line) for line in self.logs() if line.startswith("{")]
        return [event for event in found if event["event"] == name]

    def wait_for(self, name: str) -> Event:
        """Wait for the first event with this name."""
        event: Event = self.wait_until(lambda: self.events(name), f"no event {name!r}")[0]
        return event

    def kill(self, signal: str) -> None:
        """Run `docker kill -s SIGNAL`."""
        self._engine("kill", "--signal", signal, self.name)

    def ask(self, verb: str) -> int:
        """Request an action, such as `start` or `kill?signal=HUP`, from the API; return the status."""
        return self._engine.call("POST", f"/containers/{self.name}/{verb}")[0]

    def stop(self) -> float:
        """Run `docker stop`, and return the seconds it took."""
        began = time.monotonic()
        self._engine("stop", self.name)
        return time.monotonic() - began

    def exit_status(self) -> int:
        """Wait for the end."""
        return int(self._engine("wait", self.name))

    def memory_bytes(self) -> int:
        """Return the memory of the container, as `docker stats` shows it."""
        _, stats = self._engine.call("GET", f"/containers/{self.name}/stats?stream=false&one-shot=true")
        memory = stats["memory_stats"]
        return int(memory["usage"] - memory["stats"].get("inactive_file", 0))
