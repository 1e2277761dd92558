"""`docker run IMAGE COMMAND` is echod's own command line, with its exit status."""

import pytest

from echod import toml
from echod.config import Config
from tests.daemon import send_until_stuck
from tests.docker.conftest import Report, Start
from tests.docker.engine import Engine


@pytest.mark.parametrize(
    ("options", "command", "status", "words"),
    [
        ((), ("check",), 0, 'address = "0.0.0.0:8888"'),
        ((), ("--version",), 0, "echod "),
        (("--env", "ECHOD_LISTEN=127.0.0.1:7777"), ("check",), 0, 'address = "127.0.0.1:7777"'),
        (("--env", "ECHOD_LIMITS_CONNECTIONS=0"), (), 78, "ECHOD_LIMITS_CONNECTIONS: limits.connections"),
        (("--env", "ECHOD_LISTEN=203.0.113.1:8888"), (), 1, "203.0.113.1:8888: not an address of this machine"),
        ((), ("server",), 2, "invalid choice"),
        ((), ("ping", "-c", "1", "127.0.0.1:8888"), 1, "connection refused"),
    ],
)
def test_a_command_and_its_exit_status(
    engine: Engine, image: str, *, options: tuple[str, ...], command: tuple[str, ...], status: int, words: str
) -> None:
    """Through `docker run`, unchanged."""
    done = engine.run("run", "--rm", *options, image, *command)
    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr


def test_ping_another_container(start: Start, engine: Engine, image: str) -> None:
    """The image is the canary's client too."""
    done = engine("run", "--rm", image, "ping", "-c", "3", "-i", "0.01", start().address)
    assert "3 round trips, 3 answered right, 0% loss" in done


def test_config_prints_the_defaults(engine: Engine, image: str) -> None:
    """A file to start from."""
    assert engine("run", "--rm", image, "config") == toml.render(Config(), with_comments=True).strip()


def test_a_client_that_was_cut_off_shows_in_the_exit_status(start: Start, report: Report) -> None:
    """3, as without a container."""
    container = start("--env", "ECHOD_TIMEOUTS_DRAIN=1")
    with container.connect() as client:
        send_until_stuck(client)
        seconds = container.stop()
    assert container.state["ExitCode"] == 3
    report(
        "exit statuses",
        good=0,
        bad_configuration=78,
        cannot_start=1,
        usage=2,
        cut_off=f"3 (drain 1 s: {seconds:.1f} s)",
    )
