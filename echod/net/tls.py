"""TLS for a listener: a context made from its certificate files, and when its certificate ends.

Raises only TlsError, with a message that names the file. Only a configuration with TLS imports `ssl` (10 ms).
"""

import os
import re
import stat
from calendar import timegm
from collections.abc import Iterator
from time import strptime
from typing import TYPE_CHECKING, Literal, NoReturn

from msgspec import Struct

from echod.process.files import read_bounded

if TYPE_CHECKING:
    import ssl

Version = Literal["1.2", "1.3"]

WARN_BEFORE_S = 14 * 86_400
"""How long before the end of a certificate a configuration warns of it."""

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_KEY = re.compile(rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----")
_ENCRYPTED = re.compile(rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|Proc-Type: 4,ENCRYPTED")

_REASONS = {
    "KEY_VALUES_MISMATCH": "does not match the certificate",
    "EE_KEY_TOO_SMALL": "is too short for OpenSSL's security level",
    "CA_MD_TOO_WEAK": "is signed with a digest that OpenSSL's security level rejects",
}
"""OpenSSL's reasons in words."""


class TlsError(Exception):
    """The certificate, the key or the CA of a listener cannot be used; the message names the key of the setting."""


class TlsSettings(Struct, frozen=True, kw_only=True):
    """Which files a listener uses for TLS; `client_ca` is "" if clients need no certificate."""

    certificate: str
    key: str
    client_ca: str = ""
    minimum: Version = "1.2"


class Tls:
    """A context for new connections, the end of its certificate in seconds since the epoch, and warnings."""

    def __init__(self, context: "ssl.SSLContext", not_after: float, warnings: tuple[str, ...]) -> None:
        self.context = context
        self.not_after = not_after
        self.warnings = warnings


def load(settings: TlsSettings) -> Tls:
    """Read the files and make a context; blocks on files. Raise TlsError if a file cannot be used."""
    import ssl

    chain = _read("tls_certificate", settings.certificate)
    key = _read("tls_key", settings.key)
    found = _CERTIFICATE.search(chain)
    if not found:
        raise TlsError(f"tls_certificate: {settings.certificate}: no PEM certificate in it")
    if _ENCRYPTED.search(key):
        raise TlsError(f"tls_key: {settings.key}: is encrypted; echod cannot ask for the passphrase")
    if not _KEY.search(key):
        raise TlsError(f"tls_key: {settings.key}: no PEM private key in it")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if settings.minimum == "1.3" else ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    try:
        context.load_cert_chain(settings.certificate, settings.key)
    except (ssl.SSLError, OSError) as error:
        name, path = ("tls_key", settings.key) if _is_about_key(error) else ("tls_certificate", settings.certificate)
        _refuse(f"{name}: {path}", error)
    if settings.client_ca:
        _require_client_certificate(context, settings.client_ca)
    try:
        not_after = end_of_validity(ssl.PEM_cert_to_DER_cert(found[0].decode("ascii")))
    except (ValueError, IndexError) as error:
        raise TlsError(f"tls_certificate: {settings.certificate}: not a valid X.509 certificate") from error
    return Tls(context, not_after, tuple(_warnings(settings)))


def warning_of_end(address: str, not_after: float, now: float) -> str | None:
    """Return a warning if the certificate has ended or ends within 14 days; times are seconds since the epoch."""
    from time import gmtime, strftime

    end = strftime("%Y-%m-%d %H:%M UTC", gmtime(not_after))
    if now >= not_after:
        return f"the certificate of {address} has ended ({end}): clients reject it; renew it and reload"
    if now >= not_after - WARN_BEFORE_S:
        return (
            f"the certificate of {address} ends in {(not_after - now) / 86_400:.0f} days ({end}): renew it and reload"
        )
    return None


def end_of_validity(der: bytes) -> float:
    """Return `notAfter` of an X.509 certificate (RFC 5280, 4.1) in seconds since the epoch.

    The ssl module offers this only for a verified peer's certificate. Raise ValueError or IndexError if it is none.
    """
    (certificate,) = _fields(der)
    to_be_signed, *_ = _fields(certificate[1])
    fields = [field for field in _fields(to_be_signed[1]) if field[0] != 0xA0]  # the version is optional
    _, not_after = _fields(fields[3][1])  # after serial number, signature algorithm and issuer
    tag, text = not_after[0], not_after[1].decode("ascii")
    if tag == 0x17:  # UTCTime: the years 1950 to 2049
        text = ("19" if text >= "50" else "20") + text
    return float(timegm(strptime(text, "%Y%m%d%H%M%SZ")))


def _fields(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each DER element (X.690)."""
    start = 0
    while start < len(der):
        tag, length = der[start], der[start + 1]
        start += 2
        if length >= 0x80:
            size = length - 0x80
            length = int.from_bytes(der[start : start + size], "big")
            start += size
        if start + length > len(der):
            raise ValueError("cut short")
        yield tag, der[start : start + length]
        start += length


def _read(name: str, path: str) -> bytes:
    try:
        return read_bounded(path)
    except OSError as error:
        raise TlsError(f"{name}: {path}: {error}") from error


def _require_client_certificate(context: "ssl.SSLContext", path: str) -> None:
    import ssl

    content = _read("tls_client_ca", path)
    if not _CERTIFICATE.search(content):
        raise TlsError(f"tls_client_ca: {path}: no PEM certificate in it")
    try:
        context.load_verify_locations(cadata=b"\n".join(_CERTIFICATE.findall(content)).decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        _refuse(f"tls_client_ca: {path}", error)
    context.verify_mode = ssl.CERT_REQUIRED


def _is_about_key(error: Exception) -> bool:
    return getattr(error, "reason", None) in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH")


def _refuse(what: str, error: Exception) -> NoReturn:
    reason = getattr(error, "reason", None) or ""
    words = _REASONS.get(reason) or (reason.replace("_", " ").lower() if reason else "cannot be parsed")
    raise TlsError(f"{what}: {words}") from error


def _warnings(settings: TlsSettings) -> Iterator[str]:
    if os.stat(settings.key).st_mode & stat.S_IROTH:
        yield f"tls_key: {settings.key} is readable by every user: chmod o-r"
