"""On PYTHONPATH, it changes echod so that the line "freeze" blocks its event loop for an hour.

Python imports this module before the program; a thread waits until the program has imported the protocol.
"""

import signal
import sys
import threading
import time

NEVER_S = 3600.0


def arm() -> None:
    """Wait until the protocol is imported, then change it. The program handles the signals."""
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
