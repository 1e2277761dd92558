"""What the figures were taken on, as far as it explains them."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from tests.bench.harness import Cores


def description(cores: Cores, missing: Mapping[str, str]) -> str:
    """One paragraph, or two."""
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
    if missing:
        text += "\n\nNot measured: " + "; ".join(f"{name} ({why})" for name, why in missing.items()) + "."
    return text


def _are_siblings(cores: Cores) -> bool:
    """Whether the two are threads of one core, which slow each other down."""
    listed = Path(f"/sys/devices/system/cpu/cpu{cores.server}/topology/core_cpus_list")
    return listed.exists() and str(cores.load) in re.split(r"[,-]", listed.read_text().strip())


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _versions() -> list[str]:
    versions = [f"Python {platform.python_version()}", f"uvloop {metadata.version('uvloop')}"]
    for program, *arguments in (("go", "version"), ("node", "--version"), ("cc", "-dumpfullversion")):
        if shutil.which(program):
            said = subprocess.run([program, *arguments], capture_output=True, text=True, check=False).stdout
            if found := re.search(r"\d+(\.\d+)+", said):
                versions.append(f"{program} {found[0]}")
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions.append(f"Twisted {metadata.version('twisted')}")
    return versions
