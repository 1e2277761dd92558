"""TLS for `echod ping`: a context from its options, a handshake within a time limit, and every problem in words.

It imports `ssl` (10 ms), so only `--tls` imports it.
"""

import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from echod.client.dial import UnusableFileError, left_s
from echod.client.probe import TlsOptions

_PLAIN = "the server does not speak TLS: leave out --tls"

_REASONS = {
    "WRONG_VERSION_NUMBER": _PLAIN,
    "HTTP_REQUEST": _PLAIN,
    "PACKET_LENGTH_TOO_LONG": _PLAIN,
    "RECORD_LAYER_FAILURE": _PLAIN,
    "UNSUPPORTED_PROTOCOL": "the server offers only TLS versions older than 1.2",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the server refuses TLS 1.2 and 1.3",
    "TLSV1_UNRECOGNIZED_NAME": "the server has no certificate for this name: try another --server-name",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server requires a client certificate: use --cert and --key",
    "TLSV1_ALERT_UNKNOWN_CA": "the server refuses the client certificate: it does not know the CA that signed it",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the server refuses the client certificate: it has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "the server refuses the client certificate: it has been revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the server refuses the client certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the server refuses the client certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "the server refuses the client certificate: it is not meant for clients",
    "TLSV1_ALERT_ACCESS_DENIED": "the server refuses the client certificate",
}
"""OpenSSL's reasons; those of an alert (RFC 8446, 6) are the server's."""

_NO_COMMON_GROUND = "SSLV3_ALERT_HANDSHAKE_FAILURE"

_UNKNOWN_CA = "an unknown CA signed the server's certificate: give that CA's certificate as --ca"
_SELF_SIGNED = "the server's certificate is self-signed: give it as --ca to trust it"

_NOT_YET_VALID, _EXPIRED = 9, 10
_SELF_SIGNED_LEAF, _SELF_SIGNED_CHAIN, _NO_ISSUER, _NO_FIRST = 18, 19, 20, 21
_WRONG_HOST, _WRONG_IP = 62, 64
"""X509_V_ERR_... of x509_vfy.h."""

_UNTRUSTED = {_SELF_SIGNED_LEAF: _SELF_SIGNED} | dict.fromkeys((_SELF_SIGNED_CHAIN, _NO_ISSUER, _NO_FIRST), _UNKNOWN_CA)


class TlsError(OSError):
    """A TLS connection failed; the message says why and what to do."""


class Session(NamedTuple):
    """What a handshake has negotiated."""

    version: str
    cipher: str
    handshake_ms: float
    certificate_end: float
    """When the server's certificate ends, in seconds since the epoch."""

    def as_text(self) -> str:
        """Return a line for the summary."""
        end = time.strftime("%Y-%m-%d", time.gmtime(self.certificate_end))
        return f"{self.version} {self.cipher}, handshake {self.handshake_ms:.3f} ms, certificate valid until {end}"

    def as_fields(self) -> Mapping[str, Any]:
        """Return the fields for `--json`."""
        end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.certificate_end))
        return {
            "version": self.version,
            "cipher": self.cipher,
            "handshake_ms": round(self.handshake_ms, 3),
            "certificate_end": end,
        }


class TlsSocket(ssl.SSLSocket):
    """A TLS connection that fails as a plain one does, with OSError and BlockingIOError."""

    _sslobj: Any

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Receive; raise TlsError if the stream ends without close_notify."""
        with _errors_in_words(self):
            return super().recv(buflen, flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send everything."""
        with _errors_in_words(self):
            super().sendall(data, flags)

    def close(self) -> None:
        """Send close_notify and close; without it, the server would see a stream that was cut short."""
        if self._sslobj:
            with suppress(OSError):  # the server's close_notify has not arrived, or the handshake has failed
                self.settimeout(0)
                self.unwrap()
        super().close()

    def server_certificate(self) -> Mapping[str, Any]:
        """Return the server's certificate in the form of `getpeercert`, also if it could not be verified.

        The ssl module offers that in no public way.
        """
        chain = self._sslobj.get_unverified_chain() if self._sslobj else None
        return dict(chain[0].get_info()) if chain else {}


class Dialer:
    """Makes TLS connections with one set of options."""

    def __init__(self, options: TlsOptions) -> None:
        """Read the files; raise UnusableFileError."""
        self._options = options
        self._context = _context(options)

    def handshake(self, connected: socket.socket, end: float) -> tuple[TlsSocket, Session]:
        """Return the connection with TLS on it, before `end` (time.monotonic); it replaces the given one.

        Raise TlsError, or OSError if the connection fails.
        """
        start = time.perf_counter_ns()
        wrapped = self._context.wrap_socket(
            connected,
            server_hostname=self._options.server_name or None,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
        )
        assert isinstance(wrapped, TlsSocket)
        try:
            wrapped.settimeout(left_s(end))
            with _errors_in_words(wrapped, self._options):
                wrapped.do_handshake()
            handshake_ms = (time.perf_counter_ns() - start) / 1e6
            cipher = wrapped.cipher()
            certificate_end = ssl.cert_time_to_seconds(wrapped.server_certificate()["notAfter"])
            return wrapped, Session(
                wrapped.version() or "", cipher[0] if cipher else "", handshake_ms, float(certificate_end)
            )
        except TimeoutError:
            wrapped.close()
            raise TlsError("TLS handshake not finished in time; does the server speak TLS?") from None
        except BaseException:
            wrapped.close()
            raise


def _context(options: TlsOptions) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # TLS 1.2 and later
    context.sslsocket_class = TlsSocket
    if options.is_insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif options.ca:
        with _file("--ca", options.ca):
            context.load_verify_locations(options.ca)
    else:
        context.load_default_certs()
    if options.certificate:
        key = options.key or options.certificate
        with _file("--cert", options.certificate), _file("--key", key):
            context.load_cert_chain(options.certificate, key, password=_no_passphrase)
    return context


def _no_passphrase() -> str:
    """Refuse an encrypted key. Without a function, OpenSSL would ask for the passphrase on the terminal."""
    raise ValueError("the key is encrypted, and echod does not ask for a passphrase")


@contextmanager
def _file(option: str, path: str) -> Iterator[None]:
    """Name the option and the file of an error; raise UnusableFileError."""
    try:
        with open(path, "rb"):  # OpenSSL's own error does not say which file it is
            pass
        yield
    except ssl.SSLError as error:
        reason = (error.reason or "").replace("_", " ").lower()
        words = reason if reason and reason != "pem lib" else "not in PEM format, or not what it should be"
        raise UnusableFileError(f"{option}: {path}: {words}") from error
    except OSError as error:
        raise UnusableFileError(f"{option}: {path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise UnusableFileError(f"{option}: {path}: {error}") from error


@contextmanager
def _errors_in_words(connected: TlsSocket, options: TlsOptions | None = None) -> Iterator[None]:
    """Raise TlsError or BlockingIOError for an error of OpenSSL; `options` are given during the handshake."""
    try:
        yield
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        raise BlockingIOError from None
    except ssl.SSLCertVerificationError as error:
        raise TlsError(_untrusted(error, connected.server_certificate(), options)) from error
    except ssl.SSLEOFError as error:
        what = "during the TLS handshake" if options else "without close_notify: data may be missing"
        raise TlsError(f"connection closed {what}") from error
    except ssl.SSLError as error:
        raise TlsError(_refused(error, options)) from error


def _refused(error: ssl.SSLError, options: TlsOptions | None) -> str:
    if error.reason == _NO_COMMON_GROUND:
        if options and options.certificate:
            return "the server refuses the handshake: it may refuse the client certificate, or have no cipher in common"
        return "the server refuses the handshake: it may require a client certificate (--cert, --key)"
    words = _REASONS.get(error.reason or "", "")
    return words or f"TLS error: {(error.reason or str(error)).replace('_', ' ').lower()}"


def _untrusted(error: ssl.SSLCertVerificationError, certificate: Mapping[str, Any], options: TlsOptions | None) -> str:
    if error.verify_code == _EXPIRED:
        return f"the server's certificate expired on {certificate.get('notAfter', 'an unknown date')}"
    if error.verify_code == _NOT_YET_VALID:
        begin = certificate.get("notBefore", "an unknown date")
        return f"the server's certificate is not valid before {begin}; is the clock right?"
    if error.verify_code in (_WRONG_HOST, _WRONG_IP):
        names = ", ".join(name for _, name in certificate.get("subjectAltName", ())) or "no name"
        asked = options.server_name if options else ""
        return f"the server's certificate is for {names}, not for {asked}: give one of its names as --server-name"
    return _UNTRUSTED.get(error.verify_code, f"the server's certificate cannot be verified: {error.verify_message}")
