"""The layers of echod and what each package must not import, held against the source."""

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import echod

ROOT = Path(echod.__file__).parent

LAYERS = (
    {"process", "protocol"},
    {"net"},
    {"client", "config"},
    {"telemetry"},
    {"admin", "server"},
    {"upgrade"},
    {"lifecycle"},
    {"service"},
    {"cli"},
    {"__main__"},
)
"""The packages and top-level modules, lowest first: each imports only itself and what is below it."""

EVENT_LOOP = {"asyncio", "uvloop"}
IO = EVENT_LOOP | {"http", "io", "os", "pathlib", "select", "selectors", "socket", "ssl", "subprocess", "threading"}

MUST_NOT_IMPORT = {
    "protocol": IO | {"logging", "signal", "structlog", "time"},
    "config": IO - {"os"} | {"signal", "structlog", "sys"},
    "client": EVENT_LOOP | {"structlog", "sys"},  # a health check starts one every few hundred milliseconds
    "cli": EVENT_LOOP | {"socket", "structlog", "threading"},
    "net": {"signal", "structlog", "subprocess", "sys"},
    "admin": {"os", "signal", "subprocess", "sys"},
    "telemetry": EVENT_LOOP | {"signal", "socket", "subprocess"},
    "server": {"argparse", "signal", "subprocess", "sys", "threading"},
    "upgrade": {"argparse", "sys", "threading", "uvloop"},
    "lifecycle": {"argparse", "signal", "socket", "subprocess", "sys", "threading", "uvloop"},
}
"""What the modules of a package must not import, not even in a function."""

ONLY_IN = {
    "os._exit": {"process/daemonize.py", "process/force_exit.py"},
    "os.environ": {"__main__.py", "server/fastpath.py", "telemetry/logs.py"},
    "os.execve": {"__main__.py"},
    "os.killpg": {"upgrade/preflight.py"},
    "sys.argv": {"__main__.py"},
    "sys.exit": {"__main__.py"},
    "time.sleep": {"cli/stats_watch.py", "cli/terminal.py", "client/dial.py", "client/ping.py", "net/bind.py"},
}
"""Calls that end or replace the process, read what it was started with, or block; and the files that make them."""

FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


@functools.cache
def parsed(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), file)


def package(file: str) -> str:
    return file.removesuffix(".py").partition("/")[0]


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def imports(file: str) -> Iterator[str]:
    """Yield the dotted name of every module that the file imports, those for annotations only excepted."""
    tree = parsed(file)
    for_types = {
        each
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for each in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if (ROOT.parent / f"{name.replace('.', '/')}.py").exists() else node.module or ""


def own(names: Iterator[str]) -> set[str]:
    """Return the files of echod among the modules; `echod` itself, which holds the version, is above no layer."""
    return {f"{name.removeprefix('echod.').replace('.', '/')}.py" for name in names if name.startswith("echod.")}


@pytest.mark.parametrize("name", sorted(set().union(*LAYERS)))
def test_a_package_imports_only_layers_below_it(name: str) -> None:
    found = {
        f"{file} imports {other}"
        for file in FILES
        if package(file) == name
        for other in own(imports(file))
        if package(other) != name and layer(package(other)) >= layer(name)
    }
    assert not found


@pytest.mark.parametrize("name", sorted(MUST_NOT_IMPORT))
def test_a_package_does_not_import_what_is_not_its_business(name: str) -> None:
    found = {
        f"{file} imports {module}"
        for file in FILES
        if package(file) == name
        for module in imports(file)
        if module.partition(".")[0] in MUST_NOT_IMPORT[name]
    }
    assert not found


def attributes(name: str) -> dict[str, set[str]]:
    """Return each expression with an attribute of this name, and the files that use it."""
    found: dict[str, set[str]] = {}
    for file in FILES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Attribute) and node.attr == name:
                found.setdefault(ast.unparse(node), set()).add(file)
    return found


def test_only_the_lifecycle_changes_the_phase() -> None:
    assert attributes("enter") == {"runtime.life.enter": {"lifecycle/run.py", "service.py"}}


def test_a_task_that_nobody_awaits_is_started_by_the_helper() -> None:
    """`lifecycle.drain` awaits all of its own."""
    started = {
        file for name in ("create_task", "ensure_future") for files in attributes(name).values() for file in files
    }
    assert started == {"process/tasks.py", "lifecycle/drain.py"}


def test_every_module_is_in_a_layer() -> None:
    assert {package(file) for file in FILES} - {"__init__"} == set().union(*LAYERS)


def test_no_import_cycle() -> None:
    TopologicalSorter({file: own(imports(file)) for file in FILES}).prepare()


@pytest.mark.parametrize("call", sorted(ONLY_IN))
def test_a_drastic_call_stays_where_it_belongs(call: str) -> None:
    found = {
        file
        for file in FILES
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == call
    }
    assert found == ONLY_IN[call]
