"""The choice of the interpreter for `make bench`."""

import subprocess
import sys
import sysconfig

import pytest

from tests.bench import interpreter
from tests.bench.interpreter import Interpreter, chosen, is_optimized
from tests.support.daemon import DEADLINE_S

OPTIMIZED = Interpreter("/usr/bin/python3.11", (3, 11, 2), is_optimized=True, has_venv=True, has_headers=True)
PLAIN = Interpreter("/home/python3.13", (3, 13, 0), is_optimized=False, has_venv=True, has_headers=True)
NO_VENV = Interpreter("/usr/bin/python3.12", (3, 12, 0), is_optimized=True, has_venv=False, has_headers=True)
OLD = Interpreter("/usr/bin/python3.10", (3, 10, 0), is_optimized=True, has_venv=True, has_headers=True)
NEWER = Interpreter("/opt/python3.13", (3, 13, 0), is_optimized=True, has_venv=True, has_headers=True)


@pytest.mark.parametrize(
    ("running", "others", "choice"),
    [
        (OPTIMIZED, [NEWER], OPTIMIZED),
        (PLAIN, [OPTIMIZED, NEWER], OPTIMIZED),
        (PLAIN, [NO_VENV, OLD, NEWER], NEWER),
        (PLAIN, [NO_VENV, OLD], PLAIN),
        (PLAIN, [], PLAIN),
    ],
    ids=["the running one", "the first other", "only one that fits", "none fits", "none"],
)
def test_an_optimized_one_is_chosen(running: Interpreter, others: list[Interpreter], choice: Interpreter) -> None:
    """It must be new enough and able to make a venv; the one that runs comes first and last."""
    assert chosen(running, others) == choice


@pytest.mark.parametrize(
    ("arguments", "schemes", "expected"),
    [
        ("'--prefix=/usr/local' '--enable-optimizations' '--with-lto'", (), True),
        ("'--prefix=/home/me' '--enable-shared'", ("posix_prefix",), False),
        ("'--prefix=/usr' '--enable-shared'", ("deb_system", "posix_prefix"), True),
        (None, (), False),
    ],
    ids=["configured", "not configured", "Debian's", "not told"],
)
def test_it_knows_an_optimized_one(
    monkeypatch: pytest.MonkeyPatch, arguments: str | None, schemes: tuple[str, ...], *, expected: bool
) -> None:
    """By the options of its configuration; Debian's, which doesn't keep them, by Debian's own installation schemes."""
    monkeypatch.setattr(sysconfig, "get_config_var", {"CONFIG_ARGS": arguments}.get)
    monkeypatch.setattr(sysconfig, "get_scheme_names", lambda: schemes)
    assert is_optimized() is expected


def test_the_command_prints_an_interpreter() -> None:
    """Standard output holds nothing but the path of one that runs; advice goes to standard error."""
    command = [sys.executable, interpreter.__file__]
    told = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True).stdout
    version = subprocess.run(
        [told.strip(), "--version"], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert version.stdout.startswith("Python 3.")
