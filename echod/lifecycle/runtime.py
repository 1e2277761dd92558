"""What a service has while it runs, whichever configuration is in force."""

from collections.abc import Callable

from msgspec import Struct

from echod.lifecycle.generation import Generation, Kept
from echod.process.phase import Life
from echod.process.sd_notify import Notifier
from echod.process.signals import SignalQueue
from echod.telemetry.logs import Logs
from echod.telemetry.stats import Stats
from echod.upgrade.coordinator import Handover
from echod.upgrade.snapshot import Predecessor


class Runtime(Struct, frozen=True, kw_only=True):
    """The parts that `service` puts together once per process."""

    life: Life
    signals: SignalQueue
    stop_began_at: Callable[[], float]
    """When the current stop began (time.monotonic); the lame-duck time and the drain are measured from then."""
    prepare: Callable[[Kept], Generation]
    logs: Logs
    stats: Stats
    open_files: int
    """The process's limit of descriptors."""
    notifier: Notifier
    watchdog_s: float | None
    """How often the service manager wants a sign of life; None: never."""
    handover: Handover
    predecessor: Predecessor | None
    """What the program that ran in this process before has left, after a live upgrade."""
