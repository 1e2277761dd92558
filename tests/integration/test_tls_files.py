"""Certificates, keys and CAs: at the start, in `echod check`, in a reload, and from clients."""

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, clean_environment, free_port, settings, settled
from tests.support.tls import (
    VERSIONS,
    Files,
    authority,
    ca_file,
    client_context,
    issue,
    serving_listens,
    serving_tls,
    tls_connect,
    toml,
)


def _check(file: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "echod", "check", "-c", str(file)]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment())


# -- check and start ---------------------------------------------------------------------------------------------------


def test_check_names_every_file_that_cannot_be_used_without_binding(tmp_path: Path) -> None:
    """All errors at once, each with the key, the file and the reason."""
    good, other = issue(tmp_path), issue(tmp_path, "other")
    (tmp_path / "broken.pem").write_text("no certificate")
    listens: list[dict[str, Any]] = [
        {"address": "127.0.0.1:1", "tls_certificate": str(good.certificate), "tls_key": str(other.key)},
        {"address": "127.0.0.1:2", "tls_certificate": str(tmp_path / "broken.pem"), "tls_key": str(good.key)},
        {"address": "127.0.0.1:3", "tls_certificate": str(good.certificate), "tls_key": str(tmp_path / "none.key")},
        {"address": "127.0.0.1:4", "tls_certificate": str(good.certificate)},
        {"address": "127.0.0.1:5", **good.keys, "tls_client_ca": str(tmp_path / "broken.pem")},
        {"address": "127.0.0.1:6", "tls_client_ca": str(good.certificate)},
        {"address": "127.0.0.1:7", **good.keys, "tls_minimum": "1.1"},
        {"address": "127.0.0.1:8", "allow": ["10.0.0.1/8"]},
        {"address": "127.0.0.1:9", "deny": ["localhost"]},
    ]
    file = tmp_path / "echod.toml"
    file.write_text(toml(*listens))
    done = _check(file)
    assert done.returncode == 78
    for index, wanted in enumerate(
        [
            f"tls_key: {other.key}: does not match the certificate",
            f"tls_certificate: {tmp_path / 'broken.pem'}: no PEM certificate in it",
            f"tls_key: {tmp_path / 'none.key'}: ",
            "tls_key: missing, tls_certificate needs it",
            f"tls_client_ca: {tmp_path / 'broken.pem'}: no PEM certificate in it",
            "tls_client_ca: needs tls_certificate and tls_key",
            "tls_minimum: ",
            "allow: '10.0.0.1/8': host bits set",
            "deny: 'localhost': expected a network",
        ]
    ):
        assert f"listen[{index}].{wanted}" in done.stderr, done.stderr
        assert str(file) in done.stderr


def test_check_warns_of_certificates_that_end_and_of_keys_that_all_can_read(tmp_path: Path) -> None:
    ended, ending = issue(tmp_path, "ended", days=-1), issue(tmp_path, "ending", days=13)
    open_key = issue(tmp_path, "open")
    open_key.key.chmod(0o644)
    file = tmp_path / "echod.toml"
    keys = [files.keys for files in (ended, ending, open_key)]
    file.write_text(toml(*({"address": f"127.0.0.1:{n}"} | each for n, each in enumerate(keys, 1))))
    done = _check(file)
    assert done.returncode == 0
    assert "the certificate of 127.0.0.1:1 has ended" in done.stderr
    assert "the certificate of 127.0.0.1:2 ends in 13 days" in done.stderr
    assert f"listen[2].tls_key: {open_key.key} is readable by every user" in done.stderr
    assert done.stderr.count("\n") == 3
    with serving_listens(tmp_path, *keys) as echod:
        assert len(echod.events_named("configuration")) == 3


def test_a_start_with_a_file_that_cannot_be_used_fails(tmp_path: Path) -> None:
    good, other = issue(tmp_path), issue(tmp_path, "other")
    file = tmp_path / "echod.toml"
    file.write_text(toml({"tls_certificate": str(good.certificate), "tls_key": str(other.key)}))
    with Daemon("-c", str(file)) as echod:
        assert echod.process.wait(20) == 78


def test_paths_are_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of the start, also for a reload."""
    issue(tmp_path)
    monkeypatch.chdir(tmp_path)
    with serving_listens(tmp_path, {"tls_certificate": "server.pem", "tls_key": "server.key"}) as echod:
        echod.reload("reload applied")
        with tls_connect(echod.port) as client:
            assert client.ask(b"here\n") == b"HERE\n"


# -- reload ------------------------------------------------------------------------------------------------------------


def _serial(port: int) -> str:
    """Return the serial number of the certificate that a new client sees."""
    context = client_context()
    with socket.create_connection(("127.0.0.1", port), 20) as sock:
        with context.wrap_socket(sock, server_hostname="localhost") as tls:
            return str((tls.getpeercert() or {})["serialNumber"])


async def _come_and_go(port: int, context: ssl.SSLContext, seen: set[str], is_over: asyncio.Event) -> int:
    """Connect, exchange a line and leave, again and again; return how often."""
    count = 0
    while not is_over.is_set():
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
        writer.write(b"quick\n")
        assert await reader.readline() == b"QUICK\n"
        seen.add(writer.get_extra_info("peercert")["serialNumber"])
        writer.close()
        await writer.wait_closed()
        count += 1
    return count


@pytest.mark.timeout(300)
def test_reloads_between_two_certificates_under_load(tmp_path: Path, full: bool) -> None:
    """Each new client sees one or the other, none fails, and established ones live on."""
    one, two, current = issue(tmp_path, "one"), issue(tmp_path, "two"), issue(tmp_path)
    current.replace(one)
    broken = Files(two.certificate, one.key)

    async def scenario(echod: Daemon) -> tuple[int, set[str]]:
        seen: set[str] = set()
        is_over = asyncio.Event()
        going = [asyncio.create_task(_come_and_go(echod.port, client_context(), seen, is_over)) for _ in range(3)]
        for number in range(200 if full else 20):
            if number == 10:
                current.replace(broken)
                refused = await asyncio.to_thread(echod.reload, "reload refused")
                assert str(current.key) in refused["errors"][0]
                assert "does not match the certificate" in refused["errors"][0]
            current.replace(one if number % 2 else two)
            await asyncio.to_thread(echod.reload, "reload applied")
            assert not [task for task in going if task.done()]
            assert established.ask(b"%d.\n" % number) == b"%d.\n" % number
        is_over.set()
        return sum(await asyncio.gather(*going)), seen

    with serving_listens(tmp_path, current.keys) as echod, tls_connect(echod.port) as established:
        count, seen = asyncio.run(scenario(echod))
        assert count > 20
        assert len(seen) == 2
        stats = settled(echod, 1)
        assert stats["connections"]["closed"]["reset"] == stats["tls"]["handshakes"]["failed"] == 0
        assert stats["tls"]["handshakes"]["TLSv1.3"] == count + 1


def test_a_refused_reload_leaves_the_certificate_in_force(tmp_path: Path) -> None:
    with serving_tls(tmp_path) as echod:
        before = _serial(echod.port)
        issue(tmp_path)
        (tmp_path / "server.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        refused = echod.reload("reload refused")
        assert str(tmp_path / "server.pem") in refused["errors"][0]
        assert _serial(echod.port) == before
        issue(tmp_path)
        echod.reload("reload applied")
        assert _serial(echod.port) != before


def test_a_reload_can_turn_tls_on_and_off(tmp_path: Path) -> None:
    """On the same port; established connections keep what they have."""
    files = issue(tmp_path)
    address = {"address": f"127.0.0.1:{free_port()}"}
    with serving_listens(tmp_path, address) as echod, socket.create_connection(("127.0.0.1", echod.port), 20) as plain:
        (tmp_path / "echod.toml").write_text(toml(address | files.keys))
        echod.reload("reload applied")
        with tls_connect(echod.port) as client:
            (tmp_path / "echod.toml").write_text(toml(address))
            echod.reload("reload applied")
            with socket.create_connection(("127.0.0.1", echod.port), 20) as other:
                for sock in (plain, other):
                    sock.sendall(b"plain\n")
                    assert sock.recv(6) == b"PLAIN\n"
            assert client.ask(b"secret\n") == b"SECRET\n"


# -- client certificates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_client_certificates(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """The right one is served and named in the log; a wrong, an ended or a missing one is rejected."""
    right = issue(tmp_path, "right", hosts=("robot.example",), common_name="Robot 7")
    wrong = issue(tmp_path, "wrong", hosts=("robot.example",), ca=authority("strangers"))
    ended = issue(tmp_path, "ended", hosts=("robot.example",), days=-1)
    with serving_tls(tmp_path, tls_client_ca=str(ca_file(tmp_path))) as echod:
        with tls_connect(echod.port, client_context(version, right)) as client:
            assert client.ask(b"known\n") == b"KNOWN\n"
        assert echod.wait_for("connection closed")["tls_subject"] == "Robot 7"
        for certificate, why in (
            (wrong, "certificate verify failed"),
            (ended, "certificate verify failed"),
            (None, "peer did not return a certificate"),
        ):
            known = len(echod.events)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                with tls_connect(echod.port, client_context(version, certificate)) as client:
                    client.recv()
            assert echod.wait_for("TLS handshake failed", after=known)["why"] == why
        stats = settled(echod, 0)
        assert stats["connections"]["rejected"]["tls"] == stats["tls"]["handshakes"]["failed"] == 3
        assert stats["connections"]["accepted"] == 1


def test_a_new_ca_is_in_force_after_a_reload(tmp_path: Path) -> None:
    strangers = authority("strangers")
    client = client_context(certificate=issue(tmp_path, "client", ca=strangers))
    ca = ca_file(tmp_path)
    with serving_tls(tmp_path, tls_client_ca=str(ca)) as echod:
        with pytest.raises((ssl.SSLError, ConnectionError)), tls_connect(echod.port, client) as rejected:
            rejected.recv()
        ca_file(tmp_path, strangers)
        echod.reload("reload applied")
        with tls_connect(echod.port, client) as served:
            assert served.ask(b"known\n") == b"KNOWN\n"


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_tell_when_the_certificate_ends(tmp_path: Path) -> None:
    """A reload renews the figure."""
    from tests.integration.test_admin_endpoint import get
    from tests.integration.test_metrics import samples

    with serving_tls(tmp_path, *settings(admin_listen="127.0.0.1:0"), days=100) as echod:
        admin = echod.wait_for("admin endpoint")["listen"][0]
        with tls_connect(echod.port) as client:
            client.ask(b"one\n")
        for days in (100, 50):
            found = samples(get(admin, "/metrics").body.decode())
            ends = found["echod_tls_certificate_expiry_timestamp_seconds", f"127.0.0.1:{echod.port}"]
            assert abs(ends - os.stat(tmp_path / "server.pem").st_mtime - days * 86_400) < 10
            issue(tmp_path, days=50)
            (tmp_path / "echod.toml").touch()
            echod.reload("reload applied")
        assert found["echod_tls_handshakes_total", "TLSv1.3"] == 1
        assert found["echod_tls_handshakes_total", "failed"] == 0


def test_what_echod_cannot_read_is_an_error(tmp_path: Path) -> None:
    """A directory, for example; the reason is the system's."""
    files = issue(tmp_path)
    files.key.unlink()
    files.key.mkdir()
    file = tmp_path / "echod.toml"
    file.write_text(toml(files.keys))
    done = _check(file)
    assert done.returncode == 78
    assert f"tls_key: {files.key}: " in done.stderr
    shutil.rmtree(files.key)
