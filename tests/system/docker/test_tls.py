"""TLS in a container, with the key in a mounted directory, as docs/docker.md says."""

import os
from pathlib import Path

from tests.support.tls import HOSTS, Files, TlsClient, issue, toml
from tests.system.docker.conftest import Start
from tests.system.docker.engine import PORT
from tests.system.docker.test_confined import CONFINED

USER = 10001
"""The user of the image."""

CONFIG, SECRETS = "/etc/echod", "/run/secrets"


def test_a_mounted_key_serves_tls_and_is_renewed_by_a_reload(start: Start, tmp_path: Path) -> None:
    """Only echod's group can read the key; HUP puts a renewed certificate in force."""
    secrets, conf = tmp_path / "tls", tmp_path / "conf"
    for directory in (secrets, conf):
        directory.mkdir()
    files = issue(secrets, "tls")
    _only_for_the_group(files, secrets)
    listen = {
        "address": f"0.0.0.0:{PORT}",
        "tls_certificate": f"{SECRETS}/tls.pem",
        "tls_key": f"{SECRETS}/tls.key",
    }
    (conf / "echod.toml").write_text(toml(listen))
    for directory in (tmp_path, conf):
        directory.chmod(0o755)
    (conf / "echod.toml").chmod(0o644)
    mounts = ("--volume", f"{secrets}:{SECRETS}:ro", "--volume", f"{conf}:{CONFIG}:ro")
    container = start(*CONFINED, *mounts, "--env", f"ECHOD_CONFIG={CONFIG}/echod.toml")
    with TlsClient(container.connect()).handshake() as client:
        assert client.ask(b"hello\n") == b"HELLO\n"
        first = client.tls.getpeercert(binary_form=True)
    files.replace(issue(tmp_path, "renewed", hosts=HOSTS))
    _only_for_the_group(files, secrets)
    container.kill("HUP")
    container.wait_for("reload applied")
    with TlsClient(container.connect()).handshake() as client:
        assert client.ask(b"hello again\n") == b"HELLO AGAIN\n"
        assert client.tls.getpeercert(binary_form=True) != first
    container.stop()
    assert container.state["ExitCode"] == 0
    assert not [line for line in container.logs() if "readable by every user" in line]


def _only_for_the_group(files: Files, directory: Path) -> None:
    for path, mode in ((directory, 0o750), (files.key, 0o640), (files.certificate, 0o644)):
        os.chown(path, -1, USER)
        path.chmod(mode)
