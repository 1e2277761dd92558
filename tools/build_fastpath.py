"""Compile the optional fast path, `_fastpath.pyx`: as a build hook for wheels, and as a command for the Makefile.

Whatever prevents the build is a warning of one line, because echod runs in Python without it. In the environment:
ECHOD_FASTPATH=0 skips the build; ECHOD_BUILD_STRICT=1, for CI, turns compiler warnings and a failed build into errors;
CC, CFLAGS and LDFLAGS have their usual meaning.

There is one file to compile, so this calls the compiler directly. setuptools would add the flags that the interpreter
was built with, and a platform tag even to a wheel without the extension.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
SOURCE = "echod/server/_fastpath.pyx"
NAME = f"_fastpath{sysconfig.get_config_var('EXT_SUFFIX')}"

# CPython's headers expect -fwrapv. Without debug information and paths of this machine, builds are reproducible.
RELEASE = (
    *("-O3", "-g0", "-DNDEBUG", "-fwrapv", "-fvisibility=hidden"),
    *("-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3", "-Wl,-z,relro,-z,now"),
)

# A finding ends the process. Not with -fwrapv, which would make the overflows that UBSan looks for defined.
SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class NotBuiltError(Exception):
    """The fast path was not compiled. The message is one line; `details` is the whole output of the failed program."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


def build(directory: Path, flags: Sequence[str] = RELEASE) -> Path:
    """Compile the extension into the directory, for the running Python; raise NotBuiltError if that fails."""
    _refuse_if_off()
    compiler = _compiler()
    include = sysconfig.get_path("include")
    if not os.path.exists(f"{include}/Python.h"):
        raise NotBuiltError(f"no Python.h in {include} (apt-get install python3-dev)")
    with tempfile.TemporaryDirectory(prefix="echod-fastpath-") as work:
        # With relative names, because the generated code and the compiler's messages repeat them.
        cython = (sys.executable, "-P", "-m", "cython", "-3", "--module-name", "echod.server._fastpath")
        strict = ("-Werror",) if is_strict() else ()
        _run(*cython, "-Wextra", *strict, "-o", f"{work}/_fastpath.c", SOURCE, directory=PROJECT)
        flags = (*flags, f"-ffile-prefix-map={work}=.", "-Wall", "-Wextra", *strict, *_flags("CFLAGS"))
        _run(
            *(*compiler, "-shared", "-fPIC", f"-I{include}", *flags),
            *("_fastpath.c", "-o", NAME, *_flags("LDFLAGS")),
            directory=work,
        )
        # Renamed into place, because a running echod may have mapped the old one.
        new = directory / f"{NAME}.{os.getpid()}"
        shutil.copy(f"{work}/{NAME}", new)
    return new.rename(directory / NAME)


def build_in_place() -> None:
    """Compile the extension beside its source, unless it is up to date; remove an old one even if the build fails."""
    _refuse_if_off()
    target = PROJECT / "echod" / "server" / NAME
    sources = (PROJECT / SOURCE, Path(__file__))
    if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        target.unlink(missing_ok=True)
        build(target.parent)


def _refuse_if_off() -> None:
    if os.environ.get("ECHOD_FASTPATH") == "0":
        raise NotBuiltError("ECHOD_FASTPATH=0")


def is_strict() -> bool:
    """Whether warnings and a failed build are errors."""
    return os.environ.get("ECHOD_BUILD_STRICT") == "1"


def _compiler() -> list[str]:
    """Return the compiler's command: CC, else the compiler of this Python, else the system's."""
    if named := os.environ.get("CC"):
        if not shutil.which(shlex.split(named)[0]):
            raise NotBuiltError(f"CC={named} not found")
        return shlex.split(named)
    for command in (sysconfig.get_config_var("CC") or "cc", "cc", "gcc", "clang"):
        if shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    raise NotBuiltError("no C compiler (apt-get install gcc libc6-dev python3-dev)")


def _flags(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def _run(*command: str, directory: str | Path) -> None:
    environment = os.environ | {"LC_ALL": "C"}  # the messages are parsed
    done = subprocess.run(
        command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        program = "cython" if "cython" in command else command[0]
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [
            f"exit status {done.returncode}"
        ]
        telling = (line for pattern in (r"error: ", r":\d+: ") for line in lines if re.search(pattern, line))
        raise NotBuiltError(f"{program}: {next(telling, lines[-1])}", done.stdout + done.stderr)


def report(error: NotBuiltError | None) -> str:
    """Return a line about the result; raise SystemExit if a failed build is an error."""
    if error is None:
        return "fast path: compiled"
    said = f"fast path: not built: {error}; echod runs in Python"
    if is_strict() and str(error) != "ECHOD_FASTPATH=0":
        raise SystemExit(f"{error.details}{said}\nECHOD_BUILD_STRICT=1: this is an error")
    return said


if __name__ != "__main__":  # the command needs no hatchling, and its import takes time
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class FastPathHook(BuildHookInterface[Any]):
        """Adds the extension and the platform tag to a wheel; for an editable install, compiles it in place."""

        _directory: "tempfile.TemporaryDirectory[str] | None" = None

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compile the extension before the wheel is built."""
            failure = None
            try:
                if version == "editable":
                    build_in_place()
                else:
                    self._directory = tempfile.TemporaryDirectory(prefix="echod-fastpath-")
                    built = build(Path(self._directory.name))
                    build_data["force_include"][str(built)] = f"echod/server/{built.name}"
                    build_data |= {"infer_tag": True, "pure_python": False}
            except NotBuiltError as error:
                failure = error
            print(f"echod: {report(failure)}", file=sys.stderr)

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            """Remove the temporary directory."""
            del version, build_data, artifact_path
            if self._directory:
                self._directory.cleanup()


def main() -> None:
    """Compile the extension as the arguments say, and print the result in one line."""
    parser = argparse.ArgumentParser(description="Compile the fast path beside its source, if the source has changed.")
    parser.add_argument("--sanitize", metavar="DIR", help="compile into DIR instead, with AddressSanitizer and UBSan")
    options = parser.parse_args()
    failure = None
    try:
        if options.sanitize:
            build(Path(options.sanitize), SANITIZED)
        else:
            build_in_place()
    except NotBuiltError as error:
        failure = error
    print(report(failure))


if __name__ == "__main__":
    main()
