"""HAProxy with TLS to the instances, behind a PROXY header, as docs/tls.md says."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, Event, ask, connect
from tests.support.report import Report
from tests.support.tls import authority, ca_file, issue
from tests.system.balancer.fleet import NAMES, Fleet, balanced, check_lines, free_ports
from tests.system.balancer.haproxy import POLL_S, HAProxy, fenced, replaced
from tests.system.balancer.load import coming
from tests.system.balancer.test_restart import figures, restart_all
from tests.system.balancer.test_sessions import QUICK, SESSIONS, complaints, sessions_through_a_drain

PAGE = Path(__file__).parents[3] / "docs" / "tls.md"

ROUNDS = 2
CLIENTS_PER_S = 40
"""Fewer than without TLS: each costs two sides of a handshake, and a busy machine must keep up."""


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    return ca_file(tmp_path)


@pytest.fixture
def keys(tmp_path: Path) -> str:
    """The keys of a [[listen]] for TLS behind a PROXY header."""
    issued = issue(tmp_path, hosts=("echo.example",))
    return f'tls_certificate = "{issued.certificate}"\ntls_key = "{issued.key}"\nproxy_protocol = true\n'


def over_tls(ca: Path) -> Callable[[Fleet], str]:
    """Return the configuration of docs/scaling.md with the server options of docs/tls.md."""
    lines = replaced(fenced("TLS to the instances", PAGE), {"/etc/haproxy/echod-ca.pem": str(ca)})
    before = "    default-server check"
    # On a busy machine a handshake may take long; HAProxy's time to connect includes it.
    changes = {before: lines + before, "timeout connect 2s": "timeout connect 20s"}
    return lambda fleet: replaced(fleet.configuration(), changes)


def checked_over_tls(ca: Path) -> Callable[[Fleet], str]:
    """Return the same with health checks that are round trips on the port for clients."""

    def configuration(fleet: Fleet) -> str:
        text = over_tls(ca)(fleet)
        check, _, options = fenced("instead of httpchk", PAGE).partition("    server echo1 127.0.0.1:8881 ")
        changes = {f"port {fleet.admins[name]}\n": options for name in NAMES}
        return replaced(text, changes | {check_lines(text): check})

    return configuration


def test_a_rolling_restart_fails_nobody(tmp_path: Path, report: Report, ca: Path, keys: str) -> None:
    """Each client is answered; echod sees its address and TLS."""
    configuration = over_tls(ca)
    with balanced(tmp_path, configuration=configuration, keys=keys) as (fleet, haproxy):
        with coming(fleet.port, CLIENTS_PER_S) as load:
            for _ in range(ROUNDS):
                restart_all(fleet, haproxy)
        with connect(fleet.port) as client:
            assert ask(client, b"hello\n") == b"HELLO\n"
            peer = "{}:{}".format(*client.getsockname())
        assert _closed(fleet, peer)["tls"] == "TLSv1.3"
        events = [event for name in NAMES for event in fleet[name].events]
        rejected = [fleet[name].stats()["connections"]["rejected"] for name in NAMES]
        closed = {event["reason"] for event in events if event["event"] == "connection closed"}
    report("rolling restart, TLS to the instances", **figures(load, ROUNDS))
    assert load.failures() == 0, load.failed
    assert min(load.served - load.silent, load.silent) > 20
    assert closed <= {"client", "drained"}
    assert not any(count for each in rejected for count in each.values()), rejected


def _closed(fleet: Fleet, peer: str) -> Event:
    """Wait for the end of this client's connection to any instance."""
    end = time.monotonic() + DEADLINE_S
    while True:
        for name in NAMES:
            for event in fleet[name].events_named("connection closed"):
                if event["peer"] == peer:
                    return event
        assert time.monotonic() < end, peer
        time.sleep(POLL_S)


def test_a_drain_ends_sessions_cleanly(tmp_path: Path, ca: Path, keys: str) -> None:
    """Pipelining sessions of a draining instance get every reply, and HAProxy sees no error."""
    with balanced(tmp_path, *QUICK, configuration=over_tls(ca), keys=keys) as (fleet, haproxy):
        ended, staying, left = asyncio.run(sessions_through_a_drain(fleet))
        assert not complaints(haproxy)
    for client in ended:
        client.check()
    assert 0 < len(ended) < SESSIONS
    assert len(ended) + len(staying) == SESSIONS
    closed = left.events_named("connection closed")
    assert sum(client.received.count(b"\n") for client in ended) == sum(event["lines"] for event in closed) > 0
    assert {event["tls"] for event in closed} == {"TLSv1.3"}
    assert left.wait_for("drain finished")["cut"] == 0


def test_a_health_check_verifies_the_certificate(tmp_path: Path, ca: Path, keys: str) -> None:
    """A check over TLS behind a PROXY header passes; one that trusts another CA marks every instance down."""
    with balanced(tmp_path, configuration=checked_over_tls(ca), keys=keys) as (fleet, haproxy):
        assert _last_checks(haproxy) == {"L7OK"}
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        configuration = checked_over_tls(ca_file(stranger, authority("other")))(fleet)
        configuration = replaced(configuration, {f"bind 127.0.0.1:{fleet.port}": f"bind 127.0.0.1:{free_ports(1)[0]}"})
        with HAProxy(configuration, stranger) as suspicious:
            for name in NAMES:
                suspicious.wait_for(name, "DOWN")
            assert _last_checks(suspicious) == {"L6RSP"}


def _last_checks(haproxy: HAProxy) -> set[str]:
    """Return the results of the latest check of each instance; HAProxy marks one that is under way with a star."""
    servers = haproxy.servers()
    return {servers[name]["check_status"].removeprefix("* ") for name in NAMES}
