"""What a running service reports of itself: the statistics dump, and the status line for the service manager."""

import time
from collections.abc import Sequence

from echod.lifecycle.runtime import Runtime
from echod.process.signals import Action
from echod.server.server import Server
from echod.telemetry.stats import Stats

DUMP_PAUSE_S = 0.01
"""The shortest pause after a statistics dump; a pause is also at least DUMP_PAUSE_RATIO times as long as the dump."""

DUMP_PAUSE_RATIO = 9
"""This limits dumps to a tenth of the event loop's time, however many signals request them."""


def dump_stats(server: Server, runtime: Runtime) -> None:
    """Log the statistics at any log level, and pause further dumps."""
    began = time.perf_counter()
    runtime.logs.always("stats", **server.snapshot())
    cost_s = time.perf_counter() - began
    runtime.signals.pause(Action.DUMP_STATS, max(DUMP_PAUSE_S, DUMP_PAUSE_RATIO * cost_s))


def status_line(server: Server, stats: Stats, restart_needed: Sequence[str]) -> str:
    """Describe a service that serves clients, for `systemctl status`."""
    parts = [f"{connections(server.open_connections)} open, {stats.accepted} accepted"]
    if restart_needed:
        parts.append(f"not in force before a restart: {', '.join(restart_needed)}")
    if stats.reload_error:
        parts.append(f"last reload refused: {stats.reload_error}")
    return "; ".join(parts)


def connections(count: int) -> str:
    """Format a number of connections, with the right plural."""
    return "1 connection" if count == 1 else f"{count} connections"
