"""The description of the machine in the report."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from tests.bench.harness import Cores
from tests.bench.interpreter import is_optimized

_PROGRAMS = (
    ("go", "version"),
    ("node", "--version"),
    ("memcached", "--version"),
    ("redis-server", "--version"),
    ("cc", "-dumpfullversion"),
)

UNOPTIMIZED = (
    "**This interpreter was built without profile-guided optimization**: it needs 20 to 40 % more CPU time for a line "
    "than Debian's or the official image's."
)


def description(cores: Cores, missing: Mapping[str, str]) -> str:
    """Return a paragraph, and one more each for what is missing and for a warning."""
    load = os.getloadavg()[0]
    placed = (
        "**one core for server and load**: lines a second tell little"
        if cores.are_one
        else f"the server on one core, the load on {'its other thread' if _are_siblings(cores) else 'another'}"
    )
    text = (
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}; {placed}; the load of the "
        f"machine just before was {load:.1f}. {', '.join(_versions())}."
    )
    if not is_optimized():
        text += f"\n\n{UNOPTIMIZED}"
    if missing:
        text += "\n\nNot measured: " + "; ".join(f"{name} ({why})" for name, why in missing.items()) + "."
    return text


def _are_siblings(cores: Cores) -> bool:
    """Return whether the two CPUs are threads of one core, which slow each other down."""
    listed = Path(f"/sys/devices/system/cpu/cpu{cores.server}/topology/core_cpus_list")
    return listed.exists() and str(cores.load) in re.split(r"[,-]", listed.read_text().strip())


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _versions() -> list[str]:
    build = "built with" if is_optimized() else "built without"
    versions = [
        f"Python {platform.python_version()} of {sys.base_prefix}, {build} profile-guided optimization",
        f"uvloop {metadata.version('uvloop')}",
    ]
    for program, *arguments in _PROGRAMS:
        if shutil.which(program):
            said = subprocess.run([program, *arguments], capture_output=True, text=True, check=False).stdout
            if found := re.search(r"\d+(\.\d+)+", said):
                versions.append(f"{program} {found[0]}")
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions.append(f"Twisted {metadata.version('twisted')}")
    return versions
