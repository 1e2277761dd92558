"""Fixtures of the Docker tests: the engine, the image and containers."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Protocol

import pytest

from tests.system.docker.engine import PROJECT, Container, Engine


class Start(Protocol):
    """A function that does `docker run --detach OPTIONS` with the image under test."""

    def __call__(self, *options: str, command: tuple[str, ...] = (), is_ready: bool = True) -> Container:
        """Start a container, and wait until it serves unless `is_ready` is False."""


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The container engine; skips the tests without one."""
    if not shutil.which("docker"):
        pytest.skip("no `docker` command: see CONTRIBUTING")
    engine = Engine()
    asked = engine.run("version", "--format", "{{.Server.Version}}")
    if asked.returncode != 0:
        pytest.skip(f"no engine answers `docker version`: {asked.stderr.strip()}; see CONTRIBUTING")
    version = asked.stdout.strip()
    if int(version.split(".")[0]) < 25:
        pytest.skip(f"the engine is {version}, and --start-interval of a health check needs 25")
    if not engine.socket_path():
        pytest.skip("the engine is on another machine, where the tests don't reach its containers")
    yield engine
    engine.clean_up()


def make_image(directory: object, tag: str) -> str:
    """Run `make image` in a directory with this tag, and return the messages of the build."""
    command = ["make", "-C", str(directory), "image", f"IMAGE={tag}"]
    environment = os.environ | {"BUILDKIT_PROGRESS": "plain", "MAKEFLAGS": ""}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]} {done.stderr[-5000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def image(engine: Engine) -> Iterator[str]:
    """The image of this work tree."""
    tag = f"echod-test:{os.getpid()}"
    make_image(PROJECT, tag)
    yield tag
    engine.clean_up()
    engine("image", "rm", "--force", tag)


@pytest.fixture
def start(engine: Engine, image: str) -> Iterator[Start]:
    """A function that starts containers, which are removed after the test."""

    def run(*options: str, command: tuple[str, ...] = (), is_ready: bool = True) -> Container:
        container = engine.start(image, *options, command=command)
        if is_ready:
            container.wait_for("ready")
        return container

    yield run
    engine.clean_up()
