"""The contents, the build and the metadata of the image."""

import io
import json
import re
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

from echod import __version__
from tests.support.report import Report
from tests.system.docker.conftest import Start, make_image
from tests.system.docker.engine import PROJECT, Engine

FIRST_OF_OURS = "COPY /opt/echod /opt/echod"
"""The first instruction of the final stage, as `docker history` shows it."""

FORBIDDEN = re.compile(
    r"(^|/)(pip|setuptools|wheel|hatchling|tests?|\.cache|src|wheels)(/|-[0-9]|$)|\.(pyi|pyx|pxd|pxi|c|h|lock|whl)$"
)
COMPILERS = ("cc", "gcc", "g++", "clang", "ld", "as", "strip", "make", "pip", "pip3", "git")


def layers(engine: Engine, image: str) -> list[tuple[str, int]]:
    """Return the layers that the image adds to its base, the last one first: the instruction, and the bytes."""
    history = engine("history", "--no-trunc", "--human=false", "--format", "{{.Size}} {{.CreatedBy}}", image)
    rows = re.findall(r"^\d+ .*$", history, re.MULTILINE)  # only the first line of an instruction
    ours = next(number for number, row in enumerate(rows) if FIRST_OF_OURS in row) + 1
    return [(text, int(size)) for size, text in (row.split(" ", 1) for row in rows[:ours]) if size != "0"]


def added(engine: Engine, image: str, count: int) -> list[str]:
    """Return the files in the last `count` layers of the image."""
    saved = subprocess.run(["docker", "save", image], capture_output=True, check=True, timeout=120).stdout
    with tarfile.open(fileobj=io.BytesIO(saved)) as archive:
        (manifest,) = json.load(_member(archive, "manifest.json"))
        names: list[str] = []
        for layer in manifest["Layers"][-count:]:
            with tarfile.open(fileobj=_member(archive, layer)) as files:
                names += [file.name for file in files if not file.isdir()]
    return names


def _member(archive: tarfile.TarFile, name: str) -> Any:
    stream = archive.extractfile(name)
    assert stream
    return stream


def steps(output: str) -> dict[str, bool]:
    """Return each step of a build by its instruction, and whether it came from the cache."""
    titles = dict(re.findall(r"^(#\d+) \[(.+)\]? ?.*$", output, re.MULTILINE))
    found = {}
    for number in titles:
        title = re.search(rf"^{number} \[(.+?)\] (.+)$", output, re.MULTILINE)
        if title and re.search(r"\d/\d", title[1]):
            found[f"{title[1].split()[0]}: {title[2]}"] = f"\n{number} CACHED" in output
    return found


def test_a_second_build_installs_no_dependency_again(
    engine: Engine, image: str, tmp_path: Path, report: Report
) -> None:
    """A second build repeats only the steps that depend on the source; the image is small."""
    clone, tag, changed = tmp_path / "echod", f"{image}-clone", f"{image}-changed"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(PROJECT), str(clone)], check=True)
    try:
        make_image(clone, tag)
        with (clone / "echod/protocol/echo.py").open("a") as source:
            source.write(f"# changed at {time.time()}, as never before\n")
        again = steps(make_image(clone, changed))
        ours = layers(engine, changed)
    finally:
        engine("image", "rm", "--force", tag, changed)
    made = [step for step, is_cached in again.items() if not is_cached]
    installing = [step for step in again if ".lock" in step or "apt-get" in step]
    assert len(installing) >= 5, again
    assert not set(made) & set(installing), made
    assert any("COPY echod" in step for step in made), again
    size_mb = sum(size for _, size in ours) / 1e6
    assert size_mb <= 35
    report(
        "1 build",
        from_a_clean_clone="yes",
        after_a_change_of_the_source=f"{len(again) - len(made)} of {len(again)} steps cached",
        over_its_base_MB=f"{size_mb:.1f} ({' + '.join(f'{size / 1e6:.1f}' for _, size in reversed(ours))})",
    )


def test_the_image_has_only_what_is_needed_to_run(engine: Engine, image: str, report: Report) -> None:
    """The image adds echod's environment and the bytecode of the standard library, and removes pip."""
    files = added(engine, image, len(layers(engine, image)))
    gone = [name for name in files if "/.wh." in name]
    program = [name for name in files if name.startswith("opt/echod/") and name not in gone]
    bytecode = [name for name in files if re.fullmatch(r"usr/local/lib/python3\.\d+/.*\.pyc", name)]
    assert sorted({*files} - {*gone, *program, *bytecode}) == []
    assert [name for name in program if FORBIDDEN.search(name)] == []
    assert {re.sub(r".*/\.wh\.", "", name).split("-")[0][:3] for name in gone} == {"pip"}
    script = f"import shutil; print([name for name in {COMPILERS} if shutil.which(name)])"
    assert engine("run", "--rm", "--entrypoint", "python", image, "-c", script) == "[]"
    report(
        "7 what is added",
        files_of_echod_and_its_dependencies=len(program),
        bytecode_of_the_standard_library=len(bytecode),
        anything_else="no",
        removed=f"pip ({len(gone)} entries)",
        compilers_and_caches="none",
    )


def test_the_fast_path_is_compiled_and_stripped(engine: Engine, image: str) -> None:
    """The extension has no symbol table."""
    look = """if True:
        from echod.server import _fastpath, fastpath
        print(fastpath.IS_COMPILED, b".symtab" in open(_fastpath.__file__, "rb").read())"""
    assert engine("run", "--rm", "--entrypoint", "python", image, "-c", look) == "True False"


def test_every_module_has_bytecode(start: Start, engine: Engine, image: str) -> None:
    """Every module that any command of echod imports has bytecode."""
    is_told = ("--env", "PYTHONVERBOSE=1", "--env", "ECHOD_ADMIN_LISTEN=127.0.0.1:8889")
    serving = start(*is_told)
    with serving.connect() as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"HELLO\n"
    for signal, event in (("HUP", "reload applied"), ("USR1", "stats")):
        serving.kill(signal)
        serving.wait_for(event)
    serving.stop()
    said = "\n".join(serving.logs())
    for command in (
        ["check"],
        ["config"],
        ["serve", "--set", "log.levle=info"],
        ["stats"],
        ["ping", "-c", "1", "::1:9"],
    ):
        done = engine.run("run", "--rm", *is_told, image, *command)
        said += done.stdout + done.stderr
    assert re.findall(r"# code object from \S*\.py$", said, re.MULTILINE) == []
    assert re.search(r"# code object from '\S*/echod/server/__pycache__/server\S*\.pyc'$", said, re.MULTILINE)


def test_the_image_has_its_metadata(engine: Engine, image: str) -> None:
    """The image has labels, a numeric user other than root, and an entry point without a shell."""
    about = engine.inspect(image)["Config"]
    labels = {
        name.removeprefix("org.opencontainers.image."): value
        for name, value in about["Labels"].items()
        if name.startswith("org.opencontainers.image.")
    }
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True).stdout.strip()
    assert labels.pop("revision").removesuffix("-dirty") == revision
    assert labels.pop("description")
    assert labels == {"title": "echod", "version": __version__, "licenses": "MIT"}
    assert about["User"] == "10001:10001"
    assert about["StopSignal"] == "SIGTERM"
    assert about["Entrypoint"][:2] == ["env", "--block-signal=TERM,INT,HUP,USR1,USR2"]
    assert about["Cmd"] == ["serve"]
    assert list(about["ExposedPorts"]) == ["8888/tcp"]
    assert about["Healthcheck"]["Test"][:3] == ["CMD", "echod", "ping"]
