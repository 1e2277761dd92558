"""The service manager's side of the process: what it hands over at the start, and what it is told.

sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3), in our own words: no kept library of pure Python fits. Without a
service manager nothing is handed over, and what is told goes nowhere.
"""

import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress

STATUS_BYTES = 1000
"""Longest status: a message of more than 4096 bytes is ignored as a whole, with what else it says."""

SEND_S = 1.0
"""How long an important message may wait for a service manager that is busy."""


def watchdog_s(environment: MutableMapping[str, str], pid: int) -> float | None:
    """How often the service manager wants to hear of us at the latest, in seconds; None: never."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    is_ours = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
    return int(microseconds) / 1e6 if is_ours and microseconds.isdigit() and int(microseconds) else None


class Notifier:
    """Tells the service manager how the service is; a message that can't be sent is lost, and nobody waits for it."""

    def __init__(self, address: str | None) -> None:
        """`address` is NOTIFY_SOCKET: a path, or @name in the abstract namespace; None: nobody wants to know."""
        self.is_heard = bool(address)
        self._address = address or ""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None

    def ready(self, status: str) -> None:
        """Clients are served with the configuration in force; ends what `reloading` began."""
        self._send(f"READY=1\n{_status(status)}", SEND_S)

    def reloading(self) -> None:
        """A reload has begun; `ready` must follow, whatever comes of it."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now_us}", SEND_S)

    def stopping(self, status: str) -> None:
        """The drain has begun."""
        self._send(f"STOPPING=1\n{_status(status)}", SEND_S)

    def extend(self, seconds: float, status: str) -> None:
        """The drain goes on: the stop may take so long from now, whatever the unit's limit is."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}\n{_status(status)}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def status(self, status: str) -> None:
        """A line for `systemctl status`."""
        self._send(_status(status))

    def close(self) -> None:
        """Say nothing more."""
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
    """One line, whatever the text holds: a line feed would begin another assignment."""
    line = "".join(character if character.isprintable() else " " for character in text)
    short = line.encode(errors="replace")[:STATUS_BYTES].decode(errors="ignore")
    return f"STATUS={short if short == line else short + ' ...'}"
