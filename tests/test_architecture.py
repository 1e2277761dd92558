"""The rooms of echod and the arrows between them, as data, held against the code."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import echod

ROOT = Path(echod.__file__).parent

LOOP = frozenset({"asyncio", "uvloop"})
NETWORK = frozenset({"socket", "ssl", "select", "selectors"})
LOGGING = frozenset({"logging", "structlog"})
SIGNALS = frozenset({"signal", "_signal"})
ARGUMENTS = frozenset({"argparse", "sys"})
FILES = frozenset({"tomllib", "pathlib", "io"})
PROCESSES = frozenset({"subprocess", "multiprocessing", "daemon"})
SYSTEM = frozenset({"os", "fcntl", "resource", "threading", "time"})
EVERYTHING = LOOP | NETWORK | LOGGING | SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM


@dataclass(frozen=True, slots=True)
class Room:
    """The modules of echod that a module may import, and the foreign ones that it must not."""

    imports: frozenset[str]
    unknown: frozenset[str]


def room(*imports: str, unknown: frozenset[str]) -> Room:
    return Room(frozenset(imports), unknown)


ROOMS = {
    "__init__": room(unknown=EVERYTHING),
    "address": room(unknown=EVERYTHING - {"os"}),
    "protocol": room(unknown=EVERYTHING | {"msgspec"}),
    "proxy": room(unknown=EVERYTHING),
    "pace": room(unknown=EVERYTHING),
    "greeting": room(unknown=EVERYTHING),
    "rates": room(unknown=EVERYTHING),
    "table": room("rates", unknown=EVERYTHING),
    "config": room(unknown=EVERYTHING),
    "sources": room(unknown=EVERYTHING),
    "files": room(unknown=EVERYTHING - {"os", "threading"}),
    "foreign": room(unknown=EVERYTHING),
    "settings": room("address", "config", "files", "foreign", "sources", "toml", unknown=EVERYTHING),
    "toml": room("config", unknown=EVERYTHING - {"tomllib"}),
    "process": room(unknown=EVERYTHING - SYSTEM - {"sys"}),
    "aside": room(unknown=EVERYTHING - {"asyncio", "threading"}),
    "metrics": room(unknown=EVERYTHING),
    "handover": room(unknown=EVERYTHING - {"os"}),
    "preflight": room(unknown=EVERYTHING - {"asyncio", "os", "signal", "subprocess"}),
    "successor": room("handover", "preflight", "signals", "sink", unknown=EVERYTHING - {"os", "time"}),
    "upgrade": room("preflight", unknown=EVERYTHING - {"asyncio", "structlog"}),
    "crossing": room(
        "binding",
        "config",
        "connection",
        "handover",
        "inheritance",
        "prelude",
        "sockets",
        "systemd",
        unknown=EVERYTHING - {"os", "socket"},
    ),
    "deadlines": room("config", "connection", "sockets", unknown=EVERYTHING),
    "stats": room("__init__", "fastpath", unknown=EVERYTHING - {"os", "time"}),
    "systemd": room(unknown=EVERYTHING - {"os", "socket", "time"}),
    "signals": room(unknown=EVERYTHING - {"asyncio", "signal", "threading"}),
    "guard": room("signals", unknown=EVERYTHING - {"os", "structlog", "time"}),
    "detach": room(unknown=EVERYTHING - {"daemon", "os"}),
    "lockfile": room(unknown=EVERYTHING - {"fcntl", "os"}),
    "pidfile": room("lockfile", unknown=EVERYTHING - {"os"}),
    "privileges": room(unknown=EVERYTHING - {"os"}),
    "sockets": room(unknown=EVERYTHING - NETWORK - SYSTEM),
    "binding": room("address", "lockfile", "sockets", unknown=EVERYTHING - NETWORK - SYSTEM),
    "inheritance": room("address", "binding", "sockets", "systemd", unknown=EVERYTHING - NETWORK),
    "watch": room(unknown=EVERYTHING - {"structlog", "sys", "threading", "time"}),
    "sink": room(unknown=EVERYTHING - {"os", "select", "threading", "time"}),
    "logs": room("config", "sink", unknown=LOOP | NETWORK | SIGNALS | FILES | PROCESSES | {"argparse"}),
    "fastpath": room("__init__", "sockets", unknown=EVERYTHING - {"os", "socket", "time"}),
    "memory": room(unknown=EVERYTHING),
    "turns": room("fastpath", unknown=EVERYTHING - {"asyncio", "time"}),
    "parking": room(unknown=EVERYTHING),
    "connection": room(
        "fastpath",
        "handover",
        "memory",
        "pace",
        "protocol",
        "sockets",
        "turns",
        unknown=(LOGGING | SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM) - {"os"},
    ),
    "listeners": room("listener", "sockets", unknown=LOGGING | SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM),
    "listener": room("fastpath", "sockets", unknown=LOGGING | SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM),
    "admission": room(
        "config",
        "connection",
        "stats",
        unknown=(LOOP | NETWORK | SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM) - {"time"},
    ),
    "prelude": room("proxy", "sockets", unknown=LOGGING | SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM),
    "clients": room(
        "admission",
        "config",
        "connection",
        "handover",
        "memory",
        "parking",
        "prelude",
        "selfcheck",
        "sockets",
        "stats",
        "turns",
        unknown=SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM,
    ),
    "selfcheck": room("sockets", unknown=LOGGING | SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM),
    "cpu_share": room(unknown=EVERYTHING - {"asyncio", "time"}),
    "exchange": room("cpu_share", "sockets", unknown=EVERYTHING - {"asyncio", "socket"}),
    "admin": room(
        "aside",
        "cpu_share",
        "exchange",
        "listeners",
        "metrics",
        "sockets",
        unknown=SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM,
    ),
    "round_trips": room("address", unknown=EVERYTHING | {"msgspec"}),
    "dial": room("address", unknown=(EVERYTHING | {"msgspec"}) - {"socket", "threading", "time"}),
    "ping": room("dial", "round_trips", unknown=(EVERYTHING | {"msgspec"}) - {"socket", "time"}),
    "ask": room("address", unknown=EVERYTHING - {"socket"}),
    "screen": room("table", unknown=EVERYTHING - {"os", "signal", "time"}),
    "follow": room("ask", "rates", "table", unknown=EVERYTHING - {"time"}),
    "server": room(
        "clients",
        "config",
        "connection",
        "deadlines",
        "listeners",
        "process",
        "sockets",
        "stats",
        unknown=SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM,
    ),
    "generation": room(
        "address",
        "binding",
        "config",
        "logs",
        "settings",
        "sockets",
        unknown=LOOP | LOGGING | SIGNALS | ARGUMENTS | FILES | PROCESSES,
    ),
    "reload": room(
        "admin",
        "aside",
        "config",
        "generation",
        "logs",
        "server",
        "sockets",
        "stats",
        unknown=NETWORK | SIGNALS | ARGUMENTS | FILES | PROCESSES | {"os", "time"},
    ),
    "supervision": room("systemd", unknown=NETWORK | SIGNALS | ARGUMENTS | FILES | PROCESSES | SYSTEM),
    "drain": room(
        "admin",
        "config",
        "server",
        "signals",
        "systemd",
        unknown=NETWORK | SIGNALS | ARGUMENTS | FILES | PROCESSES | (SYSTEM - {"time"}),
    ),
    "lifecycle": room(
        "__init__",
        "admin",
        "config",
        "crossing",
        "drain",
        "generation",
        "handover",
        "logs",
        "preflight",
        "reload",
        "server",
        "signals",
        "sockets",
        "stats",
        "successor",
        "supervision",
        "systemd",
        "upgrade",
        "watch",
        unknown=NETWORK | SIGNALS | ARGUMENTS | FILES | PROCESSES | {"fcntl", "resource", "threading"},
    ),
    "cli": room(
        "__init__", "address", "round_trips", "sources", unknown=(EVERYTHING | {"msgspec"}) - {"argparse", "os"}
    ),
    "console": room(unknown=EVERYTHING - {"os", "sys"}),
    "commands": room(
        "ask",
        "cli",
        "console",
        "dial",
        "follow",
        "ping",
        "process",
        "screen",
        "settings",
        "sources",
        "startup",
        "table",
        "toml",
        unknown=EVERYTHING,
    ),
    "startup": room("config", "logs", "privileges", "settings", unknown=EVERYTHING - {"os"}),
    "serving": room(
        "__init__",
        "cli",
        "config",
        "crossing",
        "generation",
        "greeting",
        "guard",
        "handover",
        "inheritance",
        "lifecycle",
        "logs",
        "pidfile",
        "privileges",
        "process",
        "reload",
        "server",
        "signals",
        "sockets",
        "startup",
        "stats",
        "successor",
        "systemd",
        unknown=NETWORK | SIGNALS | ARGUMENTS | FILES | PROCESSES,
    ),
    "__main__": room(
        "__init__",
        "cli",
        "commands",
        "console",
        "crossing",
        "detach",
        "generation",
        "handover",
        "inheritance",
        "pidfile",
        "privileges",
        "process",
        "serving",
        "signals",
        "successor",
        "systemd",
        unknown=NETWORK | FILES | PROCESSES | {"argparse"},
    ),
}

# For the annotations of those that hand them around, and import them when they are needed.
NAMED_IN_TYPES = {
    "__main__": {"crossing", "serving"},
    "commands": {"address", "sources"},
    "startup": {"generation", "privileges", "sources"},
}

# Who may do what ends, replaces or doubles the process, or reads how it was called.
RESERVED = {
    "sys.exit": {"__main__"},
    "sys.argv": {"__main__"},
    "os._exit": {"detach", "guard"},  # detach: the caller, which python-daemon would end with 0
    "os.abort": set[str](),
    "os.environ": {"__main__", "fastpath", "logs"},  # logs: NO_COLOR
    "os.execve": {"__main__"},
    "os.fork": set[str](),
    "os.killpg": {"preflight"},  # its child
    "os.kill": set[str](),
    "signal.signal": set[str](),
    "time.sleep": {"binding", "dial", "follow", "ping", "screen"},  # beside the loop; commands
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text(), module)


def modules() -> list[str]:
    return sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py"))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _statements(node: ast.AST, *, for_types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement, those inside functions too: for annotations alone, or the others."""
    for child in ast.iter_child_nodes(node):
        if _is_type_checking(child):
            if for_types:
                yield from (each for each in ast.walk(child) if isinstance(each, ast.Import | ast.ImportFrom))
        elif isinstance(child, ast.Import | ast.ImportFrom):
            if not for_types:
                yield child
        else:
            yield from _statements(child, for_types=for_types)


def _names(statement: ast.Import | ast.ImportFrom) -> list[str]:
    """The dotted names of what is imported, modules and their contents alike."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    assert statement.level == 0, "relative imports hide where an arrow goes"
    return [f"{statement.module}.{alias.name}" for alias in statement.names]


def imported(module: str, *, for_types: bool = False) -> set[str]:
    return {name for statement in _statements(tree(module), for_types=for_types) for name in _names(statement)}


def _room_of(name: str) -> str:
    first, second = [*name.split("."), ""][:2]
    assert first == "echod"
    return second if (ROOT / f"{second}.py").exists() else "__init__"


def arrows(module: str, *, for_types: bool = False) -> set[str]:
    """The modules of echod that this one imports."""
    return {_room_of(name) for name in imported(module, for_types=for_types) if name.split(".")[0] == "echod"}


def foreign(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(module)} - {"echod"}


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_module_has_its_room() -> None:
    """Each module is in the table, and each room of the table exists."""
    assert modules() == sorted(ROOMS)


def test_the_tour_of_the_source_leaves_no_module_out() -> None:
    """The README's tour links to each module once."""
    tour = (ROOT.parent / "README.md").read_text().partition("## A tour of the source")[2]
    assert sorted(re.findall(r"\]\(echod/(\w+)\.py\)", tour)) == sorted(ROOMS.keys() - {"__init__"})


@pytest.mark.parametrize("module", ROOMS)
def test_arrows(module: str) -> None:
    """A module imports exactly the modules that its room names: no arrow more, and no permission that nobody uses."""
    assert arrows(module) == ROOMS[module].imports


@pytest.mark.parametrize("module", ROOMS)
def test_arrows_of_annotations(module: str) -> None:
    """Only the composition root and what it starts with name types of modules that they don't import at once."""
    assert arrows(module, for_types=True) == NAMED_IN_TYPES.get(module, set())


@pytest.mark.parametrize("module", ROOMS)
def test_what_a_room_must_not_know(module: str) -> None:
    """A module imports nothing that its room must not know, in no function either."""
    assert foreign(module) & ROOMS[module].unknown == set()


def test_no_cycle() -> None:
    """Imports go one way."""
    TopologicalSorter({module: arrows(module) for module in ROOMS}).prepare()


@pytest.mark.parametrize(
    "back", [("connection", "server"), ("connection", "signals"), ("server", "lifecycle"), ("admin", "server")]
)
def test_no_way_back(back: tuple[str, str]) -> None:
    """What is below doesn't reach what is above it, through no third module either."""
    start, end = back
    reached: set[str] = set()
    ahead = {start}
    while ahead:
        reached |= ahead
        ahead = set().union(*map(arrows, ahead)) - reached
    assert end not in reached


def test_values_are_declared_in_no_time() -> None:
    """No module makes a dataclass: 0.7 ms of each start and upgrade, where a struct takes 0.02 and a NamedTuple 0.1."""
    assert [module for module in ROOMS if "dataclasses" in foreign(module)] == []


# -- who ends the process ----------------------------------------------------------------------------------------------


def _dotted(module: str) -> set[str]:
    """Every `name.attribute` that the module uses, and every bare name."""
    nodes = list(ast.walk(tree(module)))
    attributes = {
        f"{node.value.id}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    return attributes | {node.id for node in nodes if isinstance(node, ast.Name)} | imported(module)


@pytest.mark.parametrize("name", RESERVED)
def test_reserved(name: str) -> None:
    """What ends, replaces or doubles the process, or reads its arguments, is done in the rooms named for it."""
    assert {module for module in ROOMS if name in _dotted(module)} == RESERVED[name]


@pytest.mark.parametrize("module", ROOMS)
def test_nobody_leaves_by_another_door(module: str) -> None:
    """No module ends the process by a builtin or an exception of its own, or runs another program in its place."""
    used = _dotted(module)
    assert not used & {"exit", "quit", "SystemExit", "eval", "exec"}
    assert not [name for name in used if name.startswith(("os.spawn", "os.posix_spawn", "os.system"))]
    assert {name for name in used if name.startswith("os.exec")} <= {"os.execve"}


# -- words ----------------------------------------------------------------------------------------------------------


def _public(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name[0] != "_":
            yield child
            if isinstance(child, ast.ClassDef):
                yield from _public(child)


@pytest.mark.parametrize("module", ROOMS)
def test_docstrings(module: str) -> None:
    """Each module and each public class, function and method says in a sentence what its caller gets."""
    assert ast.get_docstring(tree(module))
    assert [node.name for node in _public(tree(module)) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("module", ROOMS)
def test_names(module: str) -> None:
    """A module is named for what it owns."""
    assert not {"utils", "util", "helpers", "manager", "base", "common", "misc"} & set(module.split("_"))
