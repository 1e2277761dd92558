"""The limits that the kernel sets for this process, and what the process uses of them."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

UNLIMITED = 2**31 - 1
"""The number of open files that stands for no limit."""

DELETED_DIRECTORY = "/(deleted working directory)"


def raise_open_files() -> int:
    """Raise the soft limit of open files (RLIMIT_NOFILE) to the hard limit, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else UNLIMITED


def allowed_open_files() -> int:
    """Return the hard limit of open files (RLIMIT_NOFILE)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else UNLIMITED


def fill_standard_streams() -> None:
    """Open /dev/null for closed descriptors 0, 1 and 2, so that no client's socket becomes standard error."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:  # Python's value if the descriptor was closed
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 (open as long as the process)


def working_directory() -> str:
    """The working directory, from which relative paths are resolved.

    If it was deleted, return a path that cannot exist, so that relative paths fail with a message that names it.
    """
    try:
        return os.getcwd()
    except OSError:
        return DELETED_DIRECTORY


def rss_bytes() -> int:
    """Return the resident memory (proc(5), statm); raise OSError without /proc.

    Only the first call opens a descriptor, so later calls work even if none is left.
    """
    return int(os.pread(_statm(), 128, 0).split()[1]) * resource.getpagesize()


@cache
def _statm() -> int:
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def open_files() -> int:
    """Return how many descriptors are open; raise OSError without /proc.

    Linux 6.2 and later report the number as the size of the directory, which avoids listing it.
    """
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1


def allowed_memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or the lowest limit of its control groups."""
    return min([_machine_memory_bytes(), *_cgroup_limits()])


def _machine_memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 1 << 30  # for example if /proc is hidden; too low a value is safer than too high


def _cgroup_limits() -> Iterator[int]:
    """Yield the memory limits of this process's control groups (cgroups(7)), versions 1 and 2, and of their parents."""
    try:
        with open("/proc/self/cgroup") as groups:
            paths = [line.rstrip("\n").split(":", 2)[1:] for line in groups]
    except OSError:
        return
    for controllers, path in paths:
        if controllers and "memory" not in controllers.split(","):
            continue
        root, file = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        names = path.strip("/").split("/")
        for depth in range(len(names) + 1):  # the limits of parent groups apply too
            group = os.path.join("/sys/fs/cgroup", root, *names[:depth])
            with suppress(OSError, ValueError), open(os.path.join(group, file)) as limit:
                yield int(limit.read())  # int() rejects "max", which means no limit
