"""Chooses the interpreter for `make bench`: one that was built with profile-guided optimization, if there is one.

Without that optimization an interpreter needs 20 to 40 % more CPU time for a line (measured), and C and Go do not, so
every ratio comes out worse than where echod is deployed.

python interpreter.py          prints the path of the one that is chosen
python interpreter.py --tell   describes the interpreter that runs it
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_OLDEST = (3, 11)
_NEWEST_MINOR = 20
_DEADLINE_S = 20.0


@dataclass(frozen=True)
class Interpreter:
    """A Python that is installed here."""

    path: str
    version: tuple[int, int, int]
    is_optimized: bool
    has_venv: bool
    has_headers: bool
    """Cython's output can be compiled for it."""


def is_optimized() -> bool:
    """Whether this interpreter was built with profile-guided optimization, as far as it tells.

    Debian and Ubuntu build with it, but keep it out of `sysconfig` (python3.11's changelog.Debian). They are known by
    the installation schemes that they add.
    """
    arguments = sysconfig.get_config_var("CONFIG_ARGS") or ""
    return "--enable-optimizations" in arguments or "deb_system" in sysconfig.get_scheme_names()


def described() -> Interpreter:
    """Describe the interpreter that runs this; within a venv, the one that the venv was made with."""
    return Interpreter(
        os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
        sys.version_info[:3],
        is_optimized(),
        all(importlib.util.find_spec(name) for name in ("ensurepip", "venv")),
        Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    )


def chosen(running: Interpreter, others: Sequence[Interpreter]) -> Interpreter:
    """Return the running one if it is optimized, else the first that is and can make a venv, else the running one."""
    fit = [each for each in (running, *others) if each.is_optimized and each.has_venv and each.version >= _OLDEST]
    return fit[0] if fit else running


def others() -> Iterator[Interpreter]:
    """Find the interpreters that a user would name, the system's first."""
    names = ["python3", *(f"python3.{minor}" for minor in range(_NEWEST_MINOR, _OLDEST[1] - 1, -1))]
    directories = ["/usr/bin", *os.get_exec_path()]
    candidates = [shutil.which(name, path=directory) for directory in directories for name in names]
    for candidate in dict.fromkeys(filter(None, candidates)):
        if found := _ask(candidate):
            yield found


def _ask(candidate: str) -> Interpreter | None:
    """Describe another interpreter; None if it is too old to run this, or no interpreter at all (a pyenv shim)."""
    command = [candidate, "-I", __file__, "--tell"]
    try:
        told = subprocess.run(command, capture_output=True, timeout=_DEADLINE_S, check=True).stdout
        found = json.loads(told)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return Interpreter(**{**found, "version": tuple(found["version"])})


def main() -> None:
    """Print what is asked for; advice goes to standard error."""
    running = described()
    if "--tell" in sys.argv:
        print(json.dumps(asdict(running)))
        return
    found = [] if running.is_optimized else [*others()]
    choice = chosen(running, found)
    for each in found:
        if each.is_optimized and not each.has_venv:
            print(f"{each.path} is optimized but can't make a venv: apt-get install python3-venv", file=sys.stderr)
    if not choice.has_headers:
        print(
            f"{choice.path} has no Python.h, so the compiled fast path can't be built: apt-get install python3-dev",
            file=sys.stderr,
        )
    print(choice.path)


if __name__ == "__main__":
    main()
