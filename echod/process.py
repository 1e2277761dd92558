"""What the kernel knows and allows of this process."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

UNLIMITED = 2**31 - 1
"""As many open files as there can be."""

DELETED_DIRECTORY = "/(deleted working directory)"


def raise_open_files() -> int:
    """Raise the soft limit of open files (RLIMIT_NOFILE) to the hard one; return what is then in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else UNLIMITED


def allowed_open_files() -> int:
    """How many files this process could open: the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else UNLIMITED


def fill_standard_streams() -> None:
    """Open /dev/null where descriptors 0, 1 or 2 are closed, or a client's socket would become standard error."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:  # so Python names a stream whose descriptor was closed
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 (as long as the process)


def working_directory() -> str:
    """Where relative paths are meant from.

    If it was deleted, it is a path where nothing can be: relative paths then fail by name.
    """
    try:
        return os.getcwd()
    except OSError:
        return DELETED_DIRECTORY


def rss_bytes() -> int:
    """Resident memory (proc(5), statm); raises OSError without /proc.

    From the second call on it needs no descriptor, for there may be none left.
    """
    return int(os.pread(_statm(), 128, 0).split()[1]) * resource.getpagesize()


@cache
def _statm() -> int:
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def open_files() -> int:
    """Descriptors in use; raises OSError without /proc.

    Linux 6.2 and later tell it as the size of the directory, without listing it.
    """
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1


def allowed_memory_bytes() -> int:
    """Memory that this process may use: the least limit of its control groups, or what the machine has (cgroups(7))."""
    return min([_machine_memory_bytes(), *_cgroup_limits()])


def _machine_memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 1 << 30  # as where /proc is hidden: too little is safer than too much


def _cgroup_limits() -> Iterator[int]:
    """The limits of each group that holds this process, of version 2 (memory.max) and 1 (memory.limit_in_bytes)."""
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
        for depth in range(len(names) + 1):  # a group is bound by the limits of those above it, too
            group = os.path.join("/sys/fs/cgroup", root, *names[:depth])
            with suppress(OSError, ValueError), open(os.path.join(group, file)) as limit:
                yield int(limit.read())  # "max" is no limit
