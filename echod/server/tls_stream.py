"""TLS on a connection's own non-blocking descriptor: the handshake, reads, writes and close_notify.

It turns what OpenSSL reports into what a plain descriptor would: BlockingIOError if a call has to wait, 0 bytes at the
end of the stream, and OSError if the connection is lost.
"""

import os
import socket
import ssl
from contextlib import suppress
from typing import Any

RECORD_BYTES = 16_384
"""The most bytes of one TLS record (RFC 8446, 5.1). Larger writes could not report how much of them was sent."""


class HandshakeError(Exception):
    """The client did not complete the handshake; the message is the reason in lower case."""


class TlsStream:
    """The TLS layer of one connection. The descriptor belongs to the caller: call `release` before it is closed."""

    __slots__ = ("_is_discarding", "_socket", "wants_room")

    def __init__(self, descriptor: int, context: ssl.SSLContext) -> None:
        """Raise HandshakeError, and close the descriptor, if the client has reset the connection already."""
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(False)  # wrap_socket applies the timeout of the object to the descriptor
        try:
            sock.getpeername()
            self._socket = context.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        except OSError as error:
            sock.close()
            raise HandshakeError(_reason(error)) from None
        self._is_discarding = False
        self.wants_room = False
        """Whether the handshake or the last read waits for room to send, and not for input."""

    @property
    def version(self) -> str:
        """The negotiated version, such as TLSv1.3."""
        return self._socket.version() or ""

    @property
    def subject(self) -> str:
        """The common name, or else the first alternative name, of the client's verified certificate; "" without one."""
        certificate: dict[str, Any] = dict(self._socket.getpeercert() or {})
        names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
        names += [value for _, value in certificate.get("subjectAltName", ())]
        return str(names[0]) if names else ""

    @property
    def unread_bytes(self) -> int:
        """Decrypted bytes that no read has returned yet; the descriptor does not become readable for them."""
        return 0 if self._is_discarding else self._socket.pending()

    def handshake(self) -> None:
        """Go on with the handshake; raise BlockingIOError until it is complete, and HandshakeError if it fails."""
        self.wants_room = False
        try:
            self._socket.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            self.wants_room = isinstance(error, ssl.SSLWantWriteError)
            raise BlockingIOError from None
        except OSError as error:
            raise HandshakeError(_reason(error)) from None

    def read_into(self, room: memoryview) -> int:
        """Read once and return how many bytes arrived; 0 after the client's close_notify.

        A TCP end of stream without close_notify raises OSError, because the stream may have been cut short.
        """
        self.wants_room = False
        if self._is_discarding:
            return os.readv(self._socket.fileno(), (room,))
        try:
            return self._socket.recv_into(room)
        except ssl.SSLZeroReturnError:
            return 0
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            self.wants_room = isinstance(error, ssl.SSLWantWriteError)
            raise BlockingIOError from None

    def write(self, data: bytes | bytearray) -> int:
        """Send what the kernel accepts, record by record, and return how many bytes that was."""
        view, sent = memoryview(data), 0
        while sent < len(data):
            try:
                sent += self._socket.send(view[sent : sent + RECORD_BYTES])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not sent:
                    raise BlockingIOError from None
                break
        return sent

    def close_sending(self) -> None:
        """Send close_notify; raise BlockingIOError if the kernel has no room for it.

        Input may be read until the client's close_notify, but only to be discarded.
        """
        try:
            self._socket.unwrap()
        except ssl.SSLWantWriteError:
            raise BlockingIOError from None
        except ssl.SSLWantReadError:  # the client's close_notify has not arrived yet
            return
        except ssl.SSLError:  # there is input in front of it
            pass
        self._is_discarding = True

    def release(self) -> None:
        """Leave the descriptor to the caller."""
        with suppress(OSError):
            self._socket.detach()


def _reason(error: OSError) -> str:
    """Return OpenSSL's reason, or else the operating system's, in lower case."""
    reason = (error.reason or "").replace("_", " ") if isinstance(error, ssl.SSLError) else ""
    return (reason or error.strerror or str(error)).lower()
