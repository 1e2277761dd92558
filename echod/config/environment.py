"""Variables that begin with ECHOD_ but set no key: Kubernetes creates some, and users may expect others to work."""

import re
from collections.abc import Iterator, Mapping

# What Kubernetes puts into every container for a Service that happens to be called echod, echod-log, ...
_KUBERNETES = re.compile(r"ECHOD_(.+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")

EXPECTED = ("ECHOD_HOST", "ECHOD_PORT")
"""Variable names that many programs use, but echod does not."""


def is_of_kubernetes(name: str) -> bool:
    """Whether Kubernetes creates a variable of this name for a Service."""
    return _KUBERNETES.fullmatch(name) is not None and not name.endswith("_REUSE_PORT")  # which is a key's


def warnings_of(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each variable that echod ignores; ECHOD_PORT=tcp://... comes from Kubernetes."""
    for name in EXPECTED:
        value = environment.get(name)
        if value is not None and "://" not in value:
            yield f"{name} is ignored (got {value[:80]!r}): ECHOD_LISTEN=HOST:PORT says where to listen"


def runtime_admin(environment: Mapping[str, str]) -> str | None:
    """The admin endpoint that there is whatever the configuration says: in the directory that systemd makes for us."""
    directory = environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return f"unix:{directory}/admin" if directory else None
