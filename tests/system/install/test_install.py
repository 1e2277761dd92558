"""`make install` and `make uninstall`: what they create, and that nothing remains."""

import fcntl
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from echod import __version__
from echod.config import loader, toml
from echod.config.schema import Config
from tests.support.daemon import Daemon, ask, connect

PROJECT = Path(__file__).parents[3]
UNITS = ("echod.service", "echod@.service", "echod.socket")

pytestmark = pytest.mark.timeout(300)  # installing packages takes long on a busy machine

HIDDEN = ("/home/", "/root/", "/tmp/")


def _is_fit(python: str) -> bool:
    """Return whether a service can read this Python, and it can create a virtual environment."""
    needs = "import sys, ensurepip, venv; assert sys.version_info >= (3, 11)"
    return not python.startswith(HIDDEN) and not subprocess.run([python, "-c", needs], capture_output=True).returncode


def system_python() -> str:
    """Return a Python that every user can run, unlike perhaps the one that runs the tests."""
    others = sorted(map(str, Path("/usr/bin").glob("python3.[0-9][0-9]")))
    fit = (python for python in [os.path.realpath(sys._base_executable), *others] if _is_fit(python))  # type: ignore[attr-defined]
    return next(fit, "") or pytest.skip(
        "no Python here that a service could read (not in a home directory) and with venv"
    )


def make(*arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run make with the strictest umask."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment, umask=0o077)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


class Installation:
    """An installation below a DESTDIR, as a packager makes it, beside files of others."""

    OTHERS = frozenset({"opt", "opt/tools", "opt/tools/bin", "opt/tools/bin/other"})

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "etc/echod/echod.toml"
        self.program = root / "opt/tools/lib/echod"

    def make(self, target: str, *, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return make(target, f"DESTDIR={self.root}", "PREFIX=/opt/tools", f"PYTHON={system_python()}", check=check)

    def copy(self, root: Path) -> "Installation":
        shutil.copytree(self.root, root, symlinks=True)
        return Installation(root)


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """An installation shared by all tests and processes, which only read it."""
    directory = tmp_path_factory.getbasetemp()
    directory = directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory
    it = Installation(directory / "installation")
    with open(directory / "installation.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not it.root.exists():
            (it.root / "opt/tools/bin").mkdir(parents=True)
            (it.root / "opt/tools/bin/other").touch()
            it.make("install")
    return it


def test_the_installed_program_serves(installation: Installation) -> None:
    """The installed program serves without this checkout or its environment."""
    python = str(installation.program / "bin/python")
    about = subprocess.run(
        [python, installation.root / "opt/tools/bin/echod", "--version"], capture_output=True, text=True, cwd="/"
    )
    assert about.stdout == f"echod {__version__}\n"
    where = subprocess.run(
        [python, "-Pc", "import echod; print(echod.__file__)"], capture_output=True, text=True, cwd="/"
    )
    assert where.stdout.startswith(str(installation.program))
    command = (python, "-P", "-m", "echod")
    with Daemon("-c", str(installation.config), "-l", "127.0.0.1:0", command=command) as echod:
        with connect(echod.port) as client:
            assert ask(client, b"hello\n") == b"HELLO\n"
        assert echod.stop() == 0


def test_the_fast_path_is_compiled_where_it_can_be(installation: Installation) -> None:
    """With a compiler and the headers of that Python the fast path is compiled, otherwise echod runs in Python."""
    has_headers = "import os, sysconfig; print(os.path.exists(sysconfig.get_path('include') + '/Python.h'))"
    asked = subprocess.run([system_python(), "-c", has_headers], capture_output=True, text=True, check=True)
    look = "from echod.server import fastpath; print(fastpath.IS_COMPILED)"
    environment = {name: value for name, value in os.environ.items() if name != "ECHOD_FASTPATH"}
    found = subprocess.run(
        [installation.program / "bin/python", "-Pc", look], env=environment, cwd="/", capture_output=True, text=True
    )
    can_be = shutil.which("cc") and os.environ.get("ECHOD_FASTPATH") != "0" and asked.stdout == "True\n"
    assert found.stdout == f"{bool(can_be)}\n", found.stderr


def test_no_installed_file_contains_destdir(installation: Installation) -> None:
    """No file contains DESTDIR; scripts, links and bytecode name the final place."""
    for path in installation.root.rglob("*"):
        if path.is_file():
            assert str(installation.root).encode() not in path.read_bytes(), path
    script = (installation.program / "bin/echod").read_text()
    assert script.startswith("#!/opt/tools/lib/echod/bin/python\n")
    assert os.readlink(installation.root / "opt/tools/bin/echod") == "../lib/echod/bin/echod"
    sources = list(installation.program.rglob("echod/*.py"))
    assert sources
    for source in sources:
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")
        assert f"/opt/tools{str(source).partition('/opt/tools')[2]}".encode() in compiled.read_bytes()


def test_every_user_can_read_the_installation(installation: Installation) -> None:
    """Other users can read everything, whatever the umask of the installing user."""
    for name in tree(installation.root) - Installation.OTHERS:
        mode = (installation.root / name).lstat().st_mode
        assert mode & stat.S_IROTH, name
        assert mode & stat.S_IXOTH or not stat.S_ISDIR(mode), name


def test_only_the_pinned_packages_are_installed(installation: Installation) -> None:
    """Echod and the packages of run.lock are installed in their exact versions, without pip."""
    pinned = re.findall(r"^([a-z0-9-]+)==(\S+)", (PROJECT / "requirements/run.lock").read_text(), re.MULTILINE)
    found = [path.name.removesuffix(".dist-info") for path in installation.program.rglob("*.dist-info")]
    assert sorted(found) == sorted([f"{n.replace('-', '_')}-{v}" for n, v in pinned] + [f"echod-{__version__}"])


def test_the_units_name_the_place_where_the_program_is(installation: Installation) -> None:
    """With another prefix, no unit contains /usr/local."""
    for unit in UNITS:
        text = (installation.root / "opt/tools/lib/systemd/system" / unit).read_text()
        assert "/usr/local" not in text
        assert "@" not in text.replace("echod@", "").replace("@system-service", "").replace(
            "~@privileged @resources", ""
        )
    service = (installation.root / "opt/tools/lib/systemd/system/echod.service").read_text()
    assert "ExecStart=/opt/tools/bin/echod serve -c /etc/echod/echod.toml\n" in service


def test_install_and_uninstall_keep_a_changed_configuration(installation: Installation, tmp_path: Path) -> None:
    """A changed configuration is kept, and nothing else."""
    it = installation.copy(tmp_path / "root")
    assert it.config.read_text() == (PROJECT / "systemd/echod.toml").read_text()
    before = tree(it.root)
    it.config.write_text("[limits]\nconnections = 7\n")
    assert it.make("install").stderr.count("echod: fast path: ") == 1
    assert it.config.read_text() == "[limits]\nconnections = 7\n"
    assert tree(it.root) == before
    assert it.make("uninstall").stdout == "kept /etc/echod/echod.toml\n"
    assert tree(it.root) == Installation.OTHERS | {"etc", "etc/echod", "etc/echod/echod.toml"}


def test_uninstall_removes_exactly_what_install_made(installation: Installation, tmp_path: Path) -> None:
    """Files of others stay with their directories; a second uninstall fails with advice."""
    it = installation.copy(tmp_path / "root")
    it.make("uninstall")
    assert tree(it.root) == Installation.OTHERS
    again = it.make("uninstall", check=False)
    assert again.returncode != 0
    assert "use the PREFIX and DESTDIR" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("PREFIX=/home/me",), "use /usr/local or a directory in /opt"),
        (("PREFIX=opt",), "must begin with a slash"),
        (("PYTHON=no-such-python",), "no-such-python not found"),
    ],
)
def test_a_place_that_no_service_can_use_is_refused(arguments: tuple[str, ...], advice: str, tmp_path: Path) -> None:
    """A prefix or a Python that a service can't use is refused with advice, and nothing is created."""
    done = make("install", f"DESTDIR={tmp_path}", f"PYTHON={system_python()}", *arguments, check=False)
    assert done.returncode != 0
    assert advice in done.stderr
    assert tree(tmp_path) == set()


def test_a_python_in_a_home_directory_is_refused(tmp_path: Path) -> None:
    """The units hide home directories from the service, so an interpreter there is refused."""
    python = tmp_path / "python3"
    shutil.copy(system_python(), python)
    done = make("install", f"DESTDIR={tmp_path}/root", f"PYTHON={python}", check=False)
    assert done.returncode != 0
    assert "make install PYTHON=/usr/bin/python3" in done.stderr
    assert not (tmp_path / "root").exists()


# -- a service that runs already ---------------------------------------------------------------------------------------


@pytest.fixture
def tool() -> ModuleType:
    """The module tools/install.py."""
    spec = importlib.util.spec_from_file_location("install", PROJECT / "tools/install.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that fakes a `systemctl` with these units running."""

    def runs(*units: str) -> None:
        lines = "".join(f"{unit} loaded active running echod, answers\\n" for unit in units)
        (tmp_path / "systemctl").write_text(f"#!/bin/sh\nprintf '{lines}'\n")
        (tmp_path / "systemctl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return runs


@pytest.mark.parametrize(
    ("units", "says", "says_not"),
    [
        ((), ("systemctl enable --now echod",), ("USR2",)),
        (("echod.socket",), ("systemctl daemon-reload",), ("enable", "USR2")),
        (
            ("echod.service", "echod@1.service", "echod.socket"),
            (
                "systemctl kill -s USR2 --kill-whom=main echod.service echod@1.service ",
                "systemctl restart echod.service echod@1.service ",
            ),
            ("enable",),
        ),
    ],
)
def test_the_next_steps_depend_on_the_running_units(
    tool: ModuleType,
    systemd: Callable[..., None],
    units: tuple[str, ...],
    says: tuple[str, ...],
    says_not: tuple[str, ...],
) -> None:
    """The advice is to enable a first installation, and to upgrade or restart a running service."""
    systemd(*units)
    told = tool.next_steps(tool.running_units())
    assert all(each in told for each in says)
    assert not any(each in told for each in says_not)


@pytest.mark.parametrize(("destdir", "is_told"), [("", True), ("/pack", False)])
def test_an_uninstall_names_a_running_service(
    tool: ModuleType,
    systemd: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    destdir: str,
    is_told: bool,
) -> None:
    """An uninstall names a service that is still running, except below a DESTDIR."""
    systemd("echod.service", "echod.socket")
    places = [f"--{name}=/nowhere" for name in ("prefix", "sysconfdir", "unitdir", "mandir")]
    monkeypatch.setattr(sys, "argv", ["install.py", "uninstall", f"--destdir={destdir}", *places])
    monkeypatch.setattr(tool, "uninstall", lambda _: None)
    assert tool.main() == 0
    assert ("systemctl stop echod.service echod.socket" in capsys.readouterr().out) == is_told


def test_without_systemctl_no_unit_is_running(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without systemctl no unit is running."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert tool.running_units() == []


# -- the files that are shipped ----------------------------------------------------------------------------------------


def test_the_shipped_configuration_is_the_defaults_commented_out() -> None:
    """The shipped file sets nothing, and shows every key with its default behind a "#"."""
    shipped = PROJECT / "systemd/echod.toml"
    assert loader.load(str(shipped), {}, (), 1 << 20).config == Config()
    defaults = toml.render(Config(), with_comments=True)
    body = shipped.read_text().partition("\n\n")[2]
    shown = "".join(line.removeprefix("#") for line in body.splitlines(keepends=True))
    assert shown.strip() == defaults.strip(), "keys have changed: run `make config`"


def test_the_template_unit_equals_the_service() -> None:
    """The template unit has the same settings as the service."""
    service, template = (
        (PROJECT / f"systemd/{unit}").read_text().partition("[Unit]")[2].splitlines() for unit in UNITS[:2]
    )
    differing = [(one, other) for one, other in zip(service, template, strict=True) if one != other]
    described = "Description=echod, answers every line in upper case"
    assert differing == [
        (described, f"{described} (instance %i)"),
        ("RuntimeDirectory=echod", "RuntimeDirectory=echod-%i"),
    ]


def test_the_stop_timeout_is_above_the_drain() -> None:
    """TimeoutStopSec exceeds the drain and the second of the last half-close."""
    service = (PROJECT / "systemd/echod.service").read_text()
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", service, re.MULTILINE)
    assert int(seconds) > Config().timeouts.drain + 1
