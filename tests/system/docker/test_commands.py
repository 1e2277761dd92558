"""`docker run IMAGE COMMAND` is echod's own command line, with its exit status."""

import json
from pathlib import Path

import pytest

from echod.config import loader, toml
from tests.support.daemon import send_until_stuck
from tests.support.report import Report
from tests.system.docker.conftest import Start
from tests.system.docker.engine import Engine


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
        ((), ("--help",), 0, "usage: echod [-h]"),
        ((), ("-l", "203.0.113.1:8888"), 1, "203.0.113.1:8888: not an address of this machine"),
        ((), ("--set", "limits.connections=0"), 78, "--set: limits.connections: "),
    ],
)
def test_docker_run_returns_the_exit_status(
    engine: Engine, image: str, *, options: tuple[str, ...], command: tuple[str, ...], status: int, words: str
) -> None:
    """`docker run` returns output and exit status unchanged."""
    done = engine.run("run", "--rm", *options, image, *command)
    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr


def test_ping_another_container(start: Start, engine: Engine, image: str) -> None:
    """`echod ping` in one container measures another."""
    done = engine("run", "--rm", image, "ping", "-c", "3", "-i", "0.01", start().address)
    assert "3 round trips, 3 answered correctly, 0% loss" in done


def test_config_prints_the_defaults(engine: Engine, image: str) -> None:
    """The printed defaults are a valid file, and serve clients outside of the container."""
    default = loader.defaults({"ECHOD_DEFAULT_LISTEN": "0.0.0.0:8888,[::]:8888"})
    assert engine("run", "--rm", image, "config") == toml.render(default, with_comments=True).strip()


def test_a_mounted_file_sets_the_address(start: Start, open_path: Path) -> None:
    """A mounted file can set the address; the environment wins over it."""
    (open_path / "echod.toml").write_text('[[listen]]\naddress = "0.0.0.0:7777"\n')
    mounted = ("--volume", f"{open_path}:/etc/echod:ro", "--env", "ECHOD_CONFIG=/etc/echod/echod.toml")
    assert start(*mounted).wait_for("ready")["listen"] == ["0.0.0.0:7777"]
    assert start(*mounted, "--env", "ECHOD_LISTEN=[::]:6666").wait_for("ready")["listen"] == ["[::]:6666"]
    assert start().wait_for("ready")["listen"] == ["0.0.0.0:8888", "[::]:8888"]


NO_IPV6 = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [
        {
            "names": ["socket"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 97,  # EAFNOSUPPORT, as of a kernel booted with ipv6.disable=1
            "args": [{"index": 0, "value": 10, "op": "SCMP_CMP_EQ"}],
        }
    ],
}


def test_without_ipv6_echod_listens_on_ipv4(start: Start, engine: Engine, image: str, tmp_path: Path) -> None:
    """Without IPv6 in the kernel echod listens on IPv4; an explicit IPv6 address is an error with the reason."""
    profile = tmp_path / "no-ipv6.json"
    profile.write_text(json.dumps(NO_IPV6))
    without = ("--security-opt", f"seccomp={profile}")
    assert start(*without).wait_for("ready")["listen"] == ["0.0.0.0:8888"]
    done = engine.run("run", "--rm", *without, "--env", "ECHOD_LISTEN=[::]:8888", image)
    assert done.returncode == 1
    assert "[::]:8888: this kernel has no IPv6" in done.stderr


def test_an_aborted_client_gives_exit_status_3(start: Start, report: Report) -> None:
    """An aborted client gives exit status 3, as without a container."""
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
        abort_all=f"3 (drain 1 s: {seconds:.1f} s)",
    )
