"""Certificates of a test CA, a daemon that speaks TLS, and a client whose records a test can hold in its hands."""

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import trustme

from tests.support.daemon import Daemon, connect, serving

Result = TypeVar("Result")

HOSTS = ("localhost", "127.0.0.1", "::1")

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


@cache
def authority(name: str = "echod tests") -> trustme.CA:
    """Return the CA of this name, which issues every certificate of a test process unless it says otherwise."""
    return trustme.CA(organization_name=name)


class Files(NamedTuple):
    """A certificate and its key as files."""

    certificate: Path
    key: Path

    @property
    def keys(self) -> dict[str, str]:
        """The keys of a [[listen]]."""
        return {"tls_certificate": str(self.certificate), "tls_key": str(self.key)}

    def replace(self, other: "Files") -> None:
        """Put the content of other files in place, each at once."""
        for mine, its in zip(self, other, strict=True):
            new = mine.with_suffix(".new")
            new.write_bytes(its.read_bytes())
            new.chmod(0o600)
            new.replace(mine)


def issue(
    directory: Path,
    name: str = "server",
    *,
    hosts: tuple[str, ...] = HOSTS,
    common_name: str | None = None,
    days: float = 365,
    begin: datetime | None = None,
    ca: trustme.CA | None = None,
) -> Files:
    """Write a certificate that ends in so many days, which may be negative, and its key; it begins a day before."""
    end = datetime.now(UTC) + timedelta(days=days)
    begin = begin or min(datetime.now(UTC), end) - timedelta(days=1)
    issued = (ca or authority()).issue_cert(*hosts, common_name=common_name, not_after=end, not_before=begin)
    files = Files(directory / f"{name}.pem", directory / f"{name}.key")
    files.certificate.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    files.key.write_bytes(issued.private_key_pem.bytes())
    files.key.chmod(0o600)
    return files


def ca_file(directory: Path, ca: trustme.CA | None = None) -> Path:
    """Write the certificate of the CA."""
    path = directory / "ca.pem"
    (ca or authority()).cert_pem.write_to_path(str(path))
    return path


def client_context(version: ssl.TLSVersion | None = None, certificate: Files | None = None) -> ssl.SSLContext:
    """Return a context that trusts the CA; with a version, only that one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    if version:
        context.minimum_version = context.maximum_version = version
    if certificate:
        context.load_cert_chain(*certificate)
    return context


# -- daemon ------------------------------------------------------------------------------------------------------------


def toml(*listens: dict[str, Any], more: str = "") -> str:
    """Return a configuration with these entries of `listen`; the address is a free port unless given."""
    text = ""
    for listen in listens:
        text += "[[listen]]\n"
        for key, value in ({"address": "127.0.0.1:0"} | listen).items():
            text += f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}\n"
    return text + more


@contextlib.contextmanager
def serving_listens(directory: Path, *listens: dict[str, Any], flags: list[str] | None = None) -> Iterator[Daemon]:
    """Run an echod with these entries of `listen`."""
    file = directory / "echod.toml"
    file.write_text(toml(*listens))
    with serving("-c", str(file), "--log-level", "debug", *(flags or [])) as echod:
        yield echod


@contextlib.contextmanager
def serving_tls(directory: Path, *flags: str, days: float = 365, **keys: Any) -> Iterator[Daemon]:
    """Run an echod with one listener, which speaks TLS; `keys` are further keys of its [[listen]]."""
    with serving_listens(directory, issue(directory, days=days).keys | keys, flags=[*flags]) as echod:
        yield echod


# -- client ------------------------------------------------------------------------------------------------------------


class TlsClient:
    """A client that can half-close, and whose records can be split; every wait has the deadline of its socket."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None = None) -> None:
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = context or client_context()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    @property
    def version(self) -> str | None:
        """The negotiated version."""
        return self.tls.version()

    def handshake(self) -> Self:
        """Complete the handshake."""
        self._drive(self.tls.do_handshake)
        return self

    def records(self, data: bytes) -> bytes:
        """Return the data as TLS records, to be sent by hand."""
        self.tls.write(data)
        return self._outgoing.read()

    def hello(self) -> bytes:
        """Return the first flight of the handshake, to be sent by hand."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self._outgoing.read()

    def sendall(self, data: bytes) -> None:
        """Send the data in as few records as OpenSSL makes."""
        self.sock.sendall(self.records(data))

    def recv(self, size: int = 65_536) -> bytes:
        """Return what has arrived; b"" at close_notify. A FIN without it raises SSLEOFError."""
        try:
            return self._drive(lambda: self.tls.read(size))
        except ssl.SSLZeroReturnError:  # our side is closed, too
            return b""

    def read_line(self) -> bytes:
        """Return one line."""
        line = bytearray()
        while not line.endswith(b"\n") and (byte := self.recv(1)):
            line += byte
        return bytes(line)

    def read_to_end(self) -> bytes:
        """Return everything up to close_notify."""
        received = bytearray()
        while chunk := self.recv():
            received += chunk
        return bytes(received)

    def ask(self, line: bytes) -> bytes:
        """Send a line and return its reply."""
        self.sendall(line)
        return self.read_line()

    def close_notify(self) -> bytes:
        """Return the record that ends our side, to be sent by hand."""
        with contextlib.suppress(ssl.SSLError):  # it wants the other side's, or there is input in front of it
            self.tls.unwrap()
        return self._outgoing.read()

    def half_close(self) -> None:
        """End our side of the stream; replies may still be read."""
        self.sock.sendall(self.close_notify())
        self.sock.shutdown(socket.SHUT_WR)

    def _drive(self, call: Callable[[], Result]) -> Result:
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                self._flush()
                chunk = self.sock.recv(65_536)
                if chunk:
                    self._incoming.write(chunk)
                else:
                    self._incoming.write_eof()
            finally:
                self._flush()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self.sock.sendall(data)


def tls_connect(port: int, context: ssl.SSLContext | None = None, *, before: bytes = b"") -> TlsClient:
    """Connect to 127.0.0.1, send `before`, such as a PROXY header, and complete the handshake."""
    sock = connect(port)
    try:
        sock.sendall(before)
        return TlsClient(sock, context).handshake()
    except BaseException:
        sock.close()
        raise
