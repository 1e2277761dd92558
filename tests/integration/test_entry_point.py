"""The entry point of the Docker image, tested without an engine: how it changes command lines."""

import json
import re
import subprocess
from pathlib import Path

import pytest

DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"


@pytest.mark.parametrize(
    ("given", "run"),
    [
        (["serve"], ["serve"]),
        (["serve", "-l", "0.0.0.0:7777"], ["serve", "-l", "0.0.0.0:7777"]),
        (["ping", "-c", "1", "a:1"], ["ping", "-c", "1", "a:1"]),
        (["-l", "0.0.0.0:7777"], ["serve", "-l", "0.0.0.0:7777"]),
        (["--set", "log.file=/a b", "*"], ["serve", "--set", "log.file=/a b", "*"]),
        (["--version"], ["--version"]),
        (["--help"], ["--help"]),
        (["-h"], ["-h"]),
        (["server"], ["server"]),
        ([], []),
    ],
)
def test_options_without_a_command_are_those_of_serve(given: list[str], run: list[str], tmp_path: Path) -> None:
    """`docker run echod -l ADDRESS` serves there; a command, --help and --version are unchanged."""
    echod = tmp_path / "echod"
    echod.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    echod.chmod(0o755)
    [line] = re.findall(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE.read_text(), re.MULTILINE)
    done = subprocess.run(
        [*json.loads(line), *given],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "".join(f"{word}\n" for word in run or [""])
