"""The build of the optional fast path: the contents of wheel and sdist, and builds without a compiler."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from echod import __version__
from tests.support.daemon import UNMEASURED

PROJECT = Path(__file__).parents[3]
EXTENSION = f"_fastpath{sysconfig.get_config_var('EXT_SUFFIX')}"
PURE = f"echod-{__version__}-py3-none-any.whl"
ADVICE = "(apt-get install gcc libc6-dev python3-dev)"

# A compiler that writes "compiled" as its output.
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo compiled >"$2"
"""

pytestmark = pytest.mark.timeout(180)  # compiling takes long on a busy machine


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables that change a build."""
    strange = ("CC", "CFLAGS", "LDFLAGS", "SOURCE_DATE_EPOCH", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ECHOD_") and name not in strange}
    return kept | UNMEASURED | {"HATCH_QUIET": "1"} | dict(more)


def build(
    into: Path, project: Path = PROJECT, target: str = "wheel", more: Mapping[str, str] | None = None
) -> tuple[Path, str]:
    """Build a wheel or an sdist as pip does; return it and the messages of the build."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(into)]
    done = subprocess.run(command, cwd=project, env=environment(more or {}), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = into.iterdir()
    return made, done.stderr


def compile_in_place(project: Path, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """Compile the fast path as the Makefile does."""
    command = [sys.executable, "tools/build_fastpath.py", *arguments]
    return subprocess.run(command, cwd=project, env=environment(more), capture_output=True, text=True)


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


has_headers = os.path.exists(f"{sysconfig.get_path('include')}/Python.h")
needs_headers = pytest.mark.skipif(not has_headers, reason="no Python.h")
needs_compiler = pytest.mark.skipif(not has_headers or not shutil.which("cc"), reason="no C compiler, or no Python.h")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the fast path."""
    wheel, said = build(tmp_path_factory.mktemp("compiled"))
    assert said == "echod: fast path: compiled\n"
    return wheel


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the files that the build needs, which a test may change."""
    copy = tmp_path / "project"
    shutil.copytree(PROJECT / "echod", copy / "echod", ignore=shutil.ignore_patterns("*.so*", "__pycache__"))
    shutil.copytree(PROJECT / "tools", copy / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(PROJECT / name, copy)
    return copy


# -- wheel and sdist ---------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_compiled_wheel_holds_the_extension_and_runs_on_this_platform_alone(compiled: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(compiled) as archive:
        names = archive.namelist()
        about = email.message_from_bytes(archive.read(f"echod-{__version__}.dist-info/WHEEL"))
        archive.extractall(tmp_path / "installed")
    assert [name for name in names if "_fastpath" in name] == [f"echod/server/{EXTENSION}"]
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert about["Tag"] == f"{version}-{version}-{platform}"
    assert about["Root-Is-Purelib"] == "false"
    there = environment({"PYTHONPATH": str(tmp_path / "installed")})
    look = [sys.executable, "-Pc", "from echod.server import _fastpath; print(_fastpath.__file__)"]
    found = subprocess.run(look, env=there, cwd="/", capture_output=True, text=True)
    assert found.stdout == f"{tmp_path}/installed/echod/server/{EXTENSION}\n", found.stderr


@needs_compiler
def test_the_extension_is_hardened(compiled: Path, tmp_path: Path) -> None:
    """Its relocations are read-only, its stack isn't executable, and it has no path of the build."""
    with zipfile.ZipFile(compiled) as archive:
        extension = archive.extract(f"echod/server/{EXTENSION}", tmp_path)
    for place in (PROJECT, tempfile.gettempdir(), sys.prefix):
        assert str(place).encode() not in Path(extension).read_bytes()
    elf = subprocess.run(["readelf", "-dlW", extension], capture_output=True, text=True, check=True).stdout
    assert "GNU_RELRO" in elf
    assert "BIND_NOW" in elf
    (stack,) = (line for line in elf.splitlines() if "GNU_STACK" in line)
    assert " RW " in stack


@needs_compiler
def test_an_sdist_holds_the_source_and_builds_the_same_wheel_elsewhere(compiled: Path, tmp_path: Path) -> None:
    """It has nothing compiled or generated, and its bytes don't depend on the time or the directory of the build."""
    sdist, _ = build(tmp_path / "sdist", target="sdist")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        archive.extractall(tmp_path / "a-directory", filter="data")
    assert [name for name in names if name.startswith("echod/server/_fastpath")] == [
        "echod/server/_fastpath.pyi",
        "echod/server/_fastpath.pyx",
    ]
    assert "tools/build_fastpath.py" in names
    there, _ = build(
        tmp_path / "there", tmp_path / "a-directory" / f"echod-{__version__}", more={"TMPDIR": str(tmp_path)}
    )
    assert there.name == compiled.name
    assert there.read_bytes() == compiled.read_bytes()


# -- where it can't be compiled ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"PATH": "/nowhere"}, f"no C compiler {ADVICE}"),
        ({"CC": "no-such-compiler -m64"}, "CC=no-such-compiler -m64 not found"),
        pytest.param({"CC": "false"}, "false: exit status 1", marks=needs_headers),
        pytest.param(
            {"CFLAGS": "-include no-such-header.h"},
            "no-such-header.h: No such file or directory",
            marks=needs_compiler,
        ),
        ({"ECHOD_FASTPATH": "0"}, "ECHOD_FASTPATH=0"),
    ],
    ids=["no compiler", "no such compiler", "a broken compiler", "a missing header", "off"],
)
def test_a_wheel_is_pure_where_the_fast_path_cannot_be_compiled(
    more: Mapping[str, str], reason: str, tmp_path: Path
) -> None:
    """The wheel is for any Python and platform, and a one-line warning gives the reason."""
    wheel, said = build(tmp_path / "dist", more=more)
    assert wheel.name == PURE
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if "_fastpath" in name] == []
    assert said.startswith("echod: fast path: not built: ")
    assert said.endswith(f"{reason}; echod runs in Python\n")
    assert said.count("\n") == 1


def test_a_wheel_is_pure_without_the_headers(tmp_path: Path) -> None:
    """Debian's interpreter comes without headers; the reason names them."""
    command = (
        "import runpy, sysconfig; sysconfig.get_path = lambda name: '/nowhere'; "
        "runpy.run_path('tools/build_fastpath.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, "--sanitize", str(tmp_path)],
        cwd=PROJECT,
        env=environment({"CC": "true"}),
        capture_output=True,
        text=True,
    )
    assert done.stdout == (
        "fast path: not built: no Python.h in /nowhere (apt-get install python3-dev); echod runs in Python\n"
    )


@needs_headers
def test_a_strict_build_fails_without_the_fast_path(tmp_path: Path) -> None:
    """The error has the compiler's messages; with ECHOD_FASTPATH=0 there is neither a fast path nor an error."""
    talkative = script(
        tmp_path / "cc", "#!/bin/sh\necho 'In file included from here' >&2; echo 'a.c:1: error: no' >&2; exit 2\n"
    )
    failed = compile_in_place(PROJECT, "--sanitize", str(tmp_path), CC=talkative, ECHOD_BUILD_STRICT="1")
    assert failed.returncode == 1
    assert "In file included from here\n" in failed.stderr
    assert f"fast path: not built: {talkative}: a.c:1: error: no; echod runs in Python\n" in failed.stderr
    off = compile_in_place(PROJECT, ECHOD_FASTPATH="0", ECHOD_BUILD_STRICT="1")
    assert off.stdout == "fast path: not built: ECHOD_FASTPATH=0; echod runs in Python\n"
    assert off.returncode == 0


# -- in place ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["wheel", "sdist"])
def test_a_file_compiled_in_place_is_never_packed(target: str, project: Path, tmp_path: Path) -> None:
    """A compiled file may be for another Python, so it is left out even without .gitignore."""
    (project / ".gitignore").unlink()
    (project / "echod/server" / EXTENSION).write_text("compiled in place")
    made, _ = build(tmp_path / "dist", project, target, more={"ECHOD_FASTPATH": "0"})
    listing = subprocess.run(
        [sys.executable, "-m", "tarfile" if target == "sdist" else "zipfile", "--list", made],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "echod/server/fastpath.py" in listing.stdout
    assert EXTENSION not in listing.stdout


@needs_headers
def test_it_is_compiled_beside_its_source_and_again_after_a_change(project: Path, tmp_path: Path) -> None:
    """If a new one can't be compiled, the old one is removed."""
    extension = project / "echod/server" / EXTENSION
    fake = script(tmp_path / "cc", COMPILER)
    assert compile_in_place(project, CC=fake).stdout == "fast path: compiled\n"
    assert extension.read_text() == "compiled\n"
    extension.write_text("still the same")
    assert compile_in_place(project, CC="false").stdout == "fast path: compiled\n"
    assert extension.read_text() == "still the same"
    later = time.time() + 100
    os.utime(project / "echod/server/_fastpath.pyx", (later, later))
    assert compile_in_place(project, CC=fake).stdout == "fast path: compiled\n"
    assert extension.read_text() == "compiled\n"
    os.utime(project / "tools/build_fastpath.py", (later + 100, later + 100))
    assert "fast path: not built: false: exit status 1" in compile_in_place(project, CC="false").stdout
    assert not extension.exists()
    assert [path for path in project.rglob("*") if ".so" in path.name] == []


@needs_headers
def test_an_editable_install_compiles_it_in_place(project: Path, tmp_path: Path) -> None:
    wheel, said = build(tmp_path / "dist", project, "wheel:editable", more={"CC": script(tmp_path / "cc", COMPILER)})
    assert said == "echod: fast path: compiled\n"
    assert wheel.name == PURE
    assert (project / "echod/server" / EXTENSION).read_text() == "compiled\n"
