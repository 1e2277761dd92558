"""Certificate files become a TLS context, or an error that names the file and the reason."""

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from msgspec.structs import replace

from echod.net.tls import TlsError, TlsSettings, end_of_validity, load, warning_of_end

CA = trustme.CA()


class Files:
    """The files of one certificate."""

    def __init__(self, directory: Path, name: str = "server", **options: object) -> None:
        issued = CA.issue_cert("localhost", **options)  # type: ignore[arg-type]
        self.certificate, self.key = directory / f"{name}.pem", directory / f"{name}.key"
        self.certificate.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        self.key.write_bytes(issued.private_key_pem.bytes())
        self.key.chmod(0o600)

    @property
    def settings(self) -> TlsSettings:
        return TlsSettings(certificate=str(self.certificate), key=str(self.key))


def handshake(context: ssl.SSLContext, client: ssl.SSLContext) -> str | None:
    """Return the negotiated version."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=lambda: context.wrap_socket(ours, server_side=True).close())
    thread.start()
    with client.wrap_socket(theirs, server_hostname="localhost") as tls:
        version = tls.version()
    thread.join()
    return version


def trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    CA.configure_trust(context)
    return context


def test_a_certificate_and_its_key_are_used(tmp_path: Path) -> None:
    assert handshake(load(Files(tmp_path).settings).context, trusting()) == "TLSv1.3"


def test_the_minimum_version_is_enforced(tmp_path: Path) -> None:
    settings = replace(Files(tmp_path).settings, minimum="1.3")
    assert load(settings).context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert load(Files(tmp_path).settings).context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_client_ca_requires_a_certificate(tmp_path: Path) -> None:
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    settings = replace(Files(tmp_path).settings, client_ca=str(tmp_path / "ca.pem"))
    assert load(settings).context.verify_mode == ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("certificate", b"", r"tls_certificate: .*server\.pem: no PEM certificate in it"),
        ("certificate", None, r"tls_certificate: .*server\.pem: .*[Nn]o such file"),
        ("key", b"no key", r"tls_key: .*server\.key: no PEM private key in it"),
        ("key", None, r"tls_key: .*server\.key: .*[Nn]o such file"),
        ("key", CA.issue_cert("other").private_key_pem.bytes(), r"tls_key: .*server\.key: does not match"),
        (
            "certificate",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            r"tls_certificate: .*server\.pem: ",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    files = Files(tmp_path)
    path: Path = getattr(files, file)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(TlsError, match=message):
        load(files.settings)


def test_an_encrypted_key_is_refused(tmp_path: Path) -> None:
    files = Files(tmp_path)
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files.key.write_bytes(key.private_bytes(encoding, form, encryption))
    with pytest.raises(TlsError, match="is encrypted"):
        load(files.settings)


def test_a_key_that_every_user_can_read_gets_a_warning(tmp_path: Path) -> None:
    files = Files(tmp_path)
    assert not load(files.settings).warnings
    files.key.chmod(0o644)
    (warning,) = load(files.settings).warnings
    assert warning.endswith("is readable by every user: chmod o-r")


@pytest.mark.parametrize("year", [2031, 2049, 2050, 2099])
def test_the_end_of_a_certificate_agrees_with_the_library(year: int) -> None:
    end = datetime(year, 2, 3, 4, 5, 6, tzinfo=UTC)
    certificate = x509.load_pem_x509_certificate(CA.issue_cert("a", not_after=end).cert_chain_pems[0].bytes())
    assert end_of_validity(certificate.public_bytes(serialization.Encoding.DER)) == end.timestamp()


@pytest.mark.parametrize("size", range(0, 400, 7))
def test_no_certificate_is_an_error_and_no_crash(size: int) -> None:
    pem = CA.issue_cert("a").cert_chain_pems[0].bytes().decode()
    with pytest.raises((ValueError, IndexError)):
        end_of_validity(ssl.PEM_cert_to_DER_cert(pem)[:size])


def test_the_end_is_announced_two_weeks_before() -> None:
    day, end = timedelta(days=1).total_seconds(), 1_800_000_000.0
    assert warning_of_end("a:1", end, end - 15 * day) is None
    assert "ends in 13 days" in (warning_of_end("a:1", end, end - 13 * day) or "")
    assert "has ended" in (warning_of_end("a:1", end, end) or "")
