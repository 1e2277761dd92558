"""On PYTHONPATH it makes an echod whose event loop can be stuck on purpose: a line "freeze" stops it for an hour.

Python imports this before the program; a thread waits for the program to have come far enough.
"""

import signal
import sys
import threading
import time

NEVER_S = 3600.0


def arm() -> None:
    """Wait until the protocol is there, then change it. Signals stay for the program to handle."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while not hasattr(module := sys.modules.get("echod.protocol.echo"), "Echo"):
        time.sleep(0.02)
    echo = module.Echo  # type: ignore[union-attr]
    receive = echo.receive

    def receive_or_freeze(self: object, chunk: bytes) -> object:
        if b"freeze" in bytes(chunk):
            time.sleep(NEVER_S)
        return receive(self, chunk)

    echo.receive = receive_or_freeze


threading.Thread(target=arm, daemon=True).start()
