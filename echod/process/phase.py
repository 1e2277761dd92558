"""The phase that the daemon is in, from its start to its end.

One `Life` per process holds it. Whatever behaves differently while echod stops reads it there; only `lifecycle.run`
(and `service`, for the end) changes it. It is in this package because every layer above reads it.
"""

from enum import IntEnum


class Phase(IntEnum):
    """The phases of the daemon, in order; a daemon may skip some but never goes back."""

    STARTING = 1
    """No client is served yet."""
    SERVING = 2
    LAME_DUCK = 3
    """A stop was requested: `/readyz` reports draining, but clients are still accepted."""
    DRAINING = 4
    """Listeners and connections are being finished."""
    STOPPED = 5


class Life:
    """The daemon's current phase."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING

    @property
    def is_leaving(self) -> bool:
        """Whether a stop was requested: the daemon starts nothing new, and reports that it is draining."""
        return self.phase >= Phase.LAME_DUCK

    @property
    def is_draining(self) -> bool:
        """Whether connections are being finished."""
        return self.phase >= Phase.DRAINING

    def enter(self, phase: Phase) -> None:
        """Change to a later phase."""
        assert phase > self.phase, f"{phase.name} after {self.phase.name}"
        self.phase = phase
