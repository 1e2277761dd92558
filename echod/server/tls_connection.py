"""A connection whose lines travel in TLS records; everything else is as in `Connection`."""

from contextlib import suppress

from echod.net import sockets
from echod.net.sockets import RawAddress
from echod.server.connection import Connection, Owner, State
from echod.server.memory import SPARE_BYTES, UNREAD_BYTES
from echod.server.tls_stream import TlsStream
from echod.telemetry.reasons import CloseReason

_TRUNCATING = {CloseReason.CUT, CloseReason.WRITE_TIMEOUT, CloseReason.RESET}
"""The reasons for which the stream ends without close_notify, so that the client notices that replies are missing."""


class TlsConnection(Connection):
    """Echoes one client's lines through its TLS stream. The fast path never answers: it knows no TLS."""

    is_tls = True

    __slots__ = ("_is_close_notify_due", "_is_close_notify_sent", "_stream", "_subject", "_version")

    def __init__(  # noqa: PLR0913 (as Connection, and the stream)
        self,
        owner: Owner,
        descriptor: int,
        peer: RawAddress,
        line_bytes: int,
        now: float,
        *,
        stream: TlsStream,
        is_unix: bool = False,
        is_counted: bool = True,
    ) -> None:
        super().__init__(owner, descriptor, peer, line_bytes, now, is_unix=is_unix, is_counted=is_counted)
        self._stream = stream
        self._is_close_notify_due = self._is_close_notify_sent = False
        self._version = stream.version
        self._subject = stream.subject
        self.is_hot = False

    @property
    def log_fields(self) -> dict[str, str]:
        """The negotiated version, and the name in the client's certificate if it sent one."""
        return {"tls": self._version} | ({"tls_subject": self._subject} if self._subject else {})

    def unread_bytes(self) -> int:
        """How many bytes have arrived but have not been read; those in the kernel are still encrypted."""
        return super().unread_bytes() + (self._stream.unread_bytes if self.state is not State.CLOSED else 0)

    # -- input and output ------------------------------------------------------------------------------------------

    def _check_hot(self) -> None:
        self.is_hot = False

    def _read_into(self, room: memoryview) -> int:
        return self._stream.read_into(room)

    def _read(self) -> None:
        super()._read()
        if self._stream.wants_room:
            self._watch()

    def _write(self, descriptor: int, data: bytes | bytearray) -> int:  # type: ignore[override]
        del descriptor
        return self._stream.write(data)

    def _on_writable(self) -> None:
        if self._stream.wants_room and not self._pending:
            self._stream.wants_room = False
            self._read()
            self._watch()
        else:
            super()._on_writable()

    @property
    def _wants_room(self) -> bool:
        return super()._wants_room or self._is_close_notify_due or self._stream.wants_room

    @property
    def _wants_input(self) -> bool:
        return super()._wants_input and not self._stream.wants_room

    def _watch(self) -> None:
        super()._watch()
        # The descriptor does not become readable for what OpenSSL has decrypted already.
        if self._is_reading and not self._is_postponed and self._stream.unread_bytes:
            self._postpone()

    def _spare_bytes(self, room: memoryview) -> int:
        """Return how much may be read while the memory limit is exceeded; the end of a line cannot be looked for."""
        del room
        if sockets.unacknowledged_bytes(self.descriptor) > UNREAD_BYTES or self.echo.partial_bytes > SPARE_BYTES:
            return 0
        return SPARE_BYTES

    def _accepted_bytes(self, queued: int) -> int:
        """Return a number that changes when the client accepts something; replies and records differ in size."""
        if self.is_unix:
            return super()._accepted_bytes(queued)
        return sockets.acknowledged_bytes(self.descriptor)

    # -- end -------------------------------------------------------------------------------------------------------

    def _end_when_sent(self) -> None:
        if self.state is State.FLUSHING and not self._pending and self._send_close_notify():
            super()._end_when_sent()

    def _send_close_notify(self) -> bool:
        """Send close_notify, or wait until the kernel has room for it; return whether it is sent."""
        try:
            self._stream.close_sending()
        except BlockingIOError:
            self._is_close_notify_due = True
            return False
        except OSError as error:
            self._lose(error.errno or 0)
            return False
        self._is_close_notify_due, self._is_close_notify_sent = False, True
        return True

    def close(self) -> None:
        """Close now; a stream that ends as it should ends with close_notify."""
        if self.state is State.CLOSED:
            return
        if self.reason not in _TRUNCATING and not self._is_close_notify_sent:
            with suppress(OSError):  # the client is gone, or reads nothing
                self._stream.close_sending()
        self._stream.release()
        super().close()

    def close_early(self) -> None:
        """Close before the linger ends; see `Connection.close_early`."""
        self._stream.release()
        super().close_early()
