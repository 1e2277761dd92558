"""Notifications to the service manager: sd_notify(3) and sd_watchdog_enabled(3).

There is no maintained pure-Python library for them. Without a service manager, notifications are discarded.
"""

import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress

STATUS_BYTES = 1000
"""The longest status text. systemd ignores a whole message of more than 4096 bytes."""

SEND_S = 1.0
"""How long to wait for a busy service manager with an important message."""


def watchdog_s(environment: MutableMapping[str, str], pid: int) -> float | None:
    """Return the watchdog's timeout in seconds; None if the service manager does not watch this process."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    is_ours = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
    return int(microseconds) / 1e6 if is_ours and microseconds.isdigit() and int(microseconds) else None


class Notifier:
    """Reports the service's state to the service manager; a message that cannot be sent is lost."""

    def __init__(self, address: str | None) -> None:
        """`address` is NOTIFY_SOCKET: a path, or @name in the abstract namespace; None without a service manager."""
        self.is_enabled = bool(address)
        self._address = address or ""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None

    def ready(self, status: str) -> None:
        """Report that clients are served with the current configuration; this also ends a reload."""
        self._send(f"READY=1\n{_status(status)}", SEND_S)

    def reloading(self) -> None:
        """Report that a reload has started; `ready` must follow, whether it succeeds or not."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now_us}", SEND_S)

    def stopping(self, status: str) -> None:
        """Report that the drain has started."""
        self._send(f"STOPPING=1\n{_status(status)}", SEND_S)

    def extend(self, seconds: float, status: str) -> None:
        """Report that the drain continues, and extend the unit's stop timeout to `seconds` from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}\n{_status(status)}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def status(self, status: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._send(_status(status))

    def close(self) -> None:
        """Close the socket; send nothing after this."""
        if self._socket:
            self._socket.close()

    def _send(self, message: str, wait_s: float = 0.0) -> None:
        if not self._socket:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        with suppress(OSError):
            self._socket.settimeout(wait_s)
            self._socket.sendto(message.encode(errors="replace"), address)


def _status(text: str) -> str:
    """Return a STATUS= assignment of one line, because a line feed would start another assignment."""
    line = "".join(character if character.isprintable() else " " for character in text)
    short = line.encode(errors="replace")[:STATUS_BYTES].decode(errors="ignore")
    return f"STATUS={short if short == line else short + ' ...'}"
