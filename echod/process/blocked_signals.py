"""Blocks the daemon's signals when it is imported, so that none ends the process while Python is still importing.

`__main__` imports it before everything else. It uses the C module, because `signal` itself imports enum (5 ms).
"""

import _signal  # type: ignore[import-not-found]

BLOCKED = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGUSR1, _signal.SIGUSR2)

_signal.pthread_sigmask(_signal.SIG_BLOCK, BLOCKED)
