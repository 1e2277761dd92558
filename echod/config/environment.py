"""Environment variables that are not configuration keys: those of Kubernetes and systemd, and common mistakes."""

import re
from collections.abc import Iterator, Mapping

# What Kubernetes puts into every container for a Service that happens to be called echod, echod-log, ...
_KUBERNETES = re.compile(r"ECHOD_(.+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")

EXPECTED = ("ECHOD_HOST", "ECHOD_PORT")
"""Variable names that many programs use but echod ignores, with a warning."""


def is_of_kubernetes(name: str) -> bool:
    """Whether Kubernetes creates a variable of this name for a Service."""
    return _KUBERNETES.fullmatch(name) is not None and not name.endswith("_REUSE_PORT")  # a key


def warnings_of(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each variable that echod ignores; ECHOD_PORT=tcp://... comes from Kubernetes."""
    for name in EXPECTED:
        value = environment.get(name)
        if value is not None and "://" not in value:
            yield f"{name} is ignored (got {value[:80]!r}): set ECHOD_LISTEN=HOST:PORT instead"


def runtime_admin(environment: Mapping[str, str]) -> str | None:
    """Return the address of the admin socket in $RUNTIME_DIRECTORY (systemd.exec(5)), None if that is not set."""
    directory = environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return f"unix:{directory}/admin" if directory else None
