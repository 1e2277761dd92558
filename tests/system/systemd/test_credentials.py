"""How a service whose user exists only while it runs reads the key of a certificate."""

from pathlib import Path

import pytest

from tests.support.tls import ca_file, issue
from tests.system.systemd.machine import ADDRESS, Machine

CA = "/etc/echod-test/ca.pem"
CERTIFICATE, KEY = "/etc/echod-test/tls.pem", "/etc/echod-test/tls.key"
CREDENTIALS = "/run/credentials/echod.service"

LOAD_CREDENTIAL = f"""
[Service]
LoadCredential=tls.pem:{CERTIFICATE}
LoadCredential=tls.key:{KEY}
"""

BY_GROUP = """
[Service]
SupplementaryGroups=echod-key
"""


@pytest.fixture(autouse=True)
def _ca(tmp_path: Path, machine: Machine) -> None:
    machine.write(CA, ca_file(tmp_path).read_text())


def listen(certificate: str, key: str) -> str:
    return f'[[listen]]\naddress = "{ADDRESS}"\ntls_certificate = "{certificate}"\ntls_key = "{key}"\n'


def renew(machine: Machine, directory: Path, name: str, group: str = "root") -> None:
    """Issue a certificate for a name, with a key that only root and the group can read."""
    issued = issue(directory, hosts=(name,))
    machine.write(CERTIFICATE, issued.certificate.read_text())
    machine.write(KEY, issued.key.read_text())
    machine("chown", f"root:{group}", KEY)
    machine("chmod", "640", KEY)


def serves(machine: Machine, name: str) -> bool:
    """Return whether the service presents a certificate for this name."""
    ping = ("/usr/local/bin/echod", "ping", "--tls", "--ca", CA, "--server-name", name, "-c", "1", ADDRESS)
    return machine.run(*ping).returncode == 0


def test_a_credential_is_the_key_of_a_service_without_a_permanent_user(machine: Machine, tmp_path: Path) -> None:
    """As in docs/systemd.md: a key that only root can read serves TLS; a renewed one is in force after a restart."""
    renew(machine, tmp_path, "first.test")
    machine.drop_in("echod.service", LOAD_CREDENTIAL)
    machine.configure(listen(f"{CREDENTIALS}/tls.pem", f"{CREDENTIALS}/tls.key"))
    cursor = machine.cursor()
    machine("systemctl", "start", "echod")
    assert serves(machine, "first.test")
    assert not [line for line in machine.journal("echod.service", cursor) if "readable by every user" in line]
    renew(machine, tmp_path, "second.test")
    machine("systemctl", "reload", "echod")
    assert serves(machine, "first.test"), "systemd renews credentials at a reload: change docs/systemd.md"
    machine("systemctl", "restart", "echod")
    assert serves(machine, "second.test")


def test_without_the_credential_the_key_cannot_be_read(machine: Machine, tmp_path: Path) -> None:
    renew(machine, tmp_path, "first.test")
    machine.configure(listen(CERTIFICATE, KEY))
    assert machine.systemctl("start", "echod").returncode == 1
    assert f"tls_key: {KEY}: " in machine.status("echod")


def test_a_reload_reads_a_renewed_key_that_a_group_may_read(machine: Machine, tmp_path: Path) -> None:
    """As in docs/systemd.md: with a group of its own, the key is read in place, so a reload puts a new one in force."""
    # A minimal Debian has no groupadd.
    machine("sh", "-c", "grep -q ^echod-key: /etc/group || echo echod-key:x:990: >>/etc/group")
    renew(machine, tmp_path, "first.test", "echod-key")
    machine.drop_in("echod.service", BY_GROUP)
    machine.configure(listen(CERTIFICATE, KEY))
    machine("systemctl", "start", "echod")
    assert serves(machine, "first.test")
    before = machine.show("echod", "MainPID")
    renew(machine, tmp_path, "second.test", "echod-key")
    machine("systemctl", "reload", "echod")
    assert serves(machine, "second.test")
    assert machine.show("echod", "MainPID") == before
