"""What `make install` and `make uninstall` do: echod in a virtual environment of its own, its units, its configuration.

All is made aside and put in place by renaming, so that an echod that is running, or was there before, is never half of
one. What was made is written down beside the program; removing it removes just that.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
UNITS = ("echod.service", "echod@.service", "echod.socket")

HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 (what is refused)
"""What the units hide from the service: ProtectHome=, PrivateTmp=."""


class RefusedError(Exception):
    """Why nothing is done, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where everything goes, as the installed system will see it; `on_disk` is where it is put now (DESTDIR)."""

    destdir: str
    prefix: str
    sysconfdir: str
    unitdir: str
    mandir: str

    def on_disk(self, path: str) -> Path:
        """Where the file is now that will be `path`."""
        return Path(self.destdir + path)

    @property
    def program(self) -> str:
        """The virtual environment."""
        return f"{self.prefix}/lib/echod"

    @property
    def command(self) -> str:
        """What people type."""
        return f"{self.prefix}/bin/echod"

    @property
    def config(self) -> str:
        """The configuration."""
        return f"{self.sysconfdir}/echod/echod.toml"

    @property
    def readme(self) -> str:
        """What the units name as their documentation."""
        return f"{self.prefix}/share/doc/echod/README.md"


@dataclass(slots=True)
class Record:
    """What an installation has made: paths as the installed system sees them."""

    directories: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    config_sha256: str | None = None
    """Of the configuration as it was put there; None: it was there already."""

    @classmethod
    def read(cls, places: Places) -> "Record | None":
        """What the last installation has made; None if there is none."""
        try:
            return cls(**json.loads(_record_file(places).read_text()))
        except FileNotFoundError:
            return None


def _record_file(places: Places) -> Path:
    return places.on_disk(f"{places.program}/installed.json")


# -- install -----------------------------------------------------------------------------------------------------------


def install(places: Places, pip_options: Sequence[str]) -> None:
    """Install, or replace what is installed; a configuration that is there is kept."""
    _refuse_what_the_service_cannot_read(places)
    before = Record.read(places)
    program = places.on_disk(places.program)
    if not before and program.exists():
        raise RefusedError(f"{program} is there, but `make install` didn't make it: move it away")
    record = Record(before.directories, [], before.config_sha256) if before else Record()
    _make_directory(places, f"{places.prefix}/lib", record)
    with _staged(program) as staged:
        _build(staged, places.program, pip_options)
        _swap(staged, program)
    for path, content in _texts(places).items():
        _write(places, path, content, record)
    _link(places, record)
    _keep_or_write_config(places, record)
    for path in set(before.files if before else ()) - set(record.files):
        places.on_disk(path).unlink(missing_ok=True)
    _record_file(places).write_text(json.dumps({name: getattr(record, name) for name in Record.__slots__}, indent=1))


def _refuse_what_the_service_cannot_read(places: Places) -> None:
    python = os.path.realpath(sys.executable)
    for path in (python, os.path.realpath(sys.base_prefix)):
        if _is_hidden(path):
            raise RefusedError(
                f"{python} is where the service can't read it (the units hide home directories and /tmp): "
                "name a Python of the system, as in `make install PYTHON=/usr/bin/python3`"
            )
    for name in ("prefix", "sysconfdir", "unitdir", "mandir"):
        path = getattr(places, name)
        if not path.startswith("/"):
            raise RefusedError(f"{name.upper()} must begin with a slash (got {path!r})")
    for name in ("prefix", "sysconfdir"):
        path = getattr(places, name)
        if _is_hidden(path):
            raise RefusedError(
                f"{name.upper()}={path} is where the service can't read it (the units hide home directories and /tmp): "
                "take /usr/local or a directory in /opt"
            )


def _is_hidden(path: str) -> bool:
    """Whether the service, another user in a sandbox, is kept from it: by the sandbox or by the mode of a folder."""
    if any(path == hidden or path.startswith(f"{hidden}/") for hidden in HIDDEN):
        return True
    return any(parent.exists() and not parent.stat().st_mode & stat.S_IXOTH for parent in Path(path).parents)


@contextmanager
def _staged(program: Path) -> Iterator[Path]:
    """A folder beside the program, so that a rename puts it in place; gone afterwards if it still is there."""
    staged = Path(tempfile.mkdtemp(prefix=".echod-", dir=program.parent))
    staged.chmod(0o755)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _swap(staged: Path, program: Path) -> None:
    if not program.exists():
        staged.rename(program)
        return
    with _staged(program) as old:
        program.rename(old / "old")
        staged.rename(program)


def _build(staged: Path, final: str, pip_options: Sequence[str]) -> None:
    """A virtual environment in `staged` that believes to be in `final`, with just the pinned packages and echod."""
    with tempfile.TemporaryDirectory(prefix="echod-build-") as work:
        _run(sys.executable, "-m", "venv", f"{work}/venv")
        pip = (f"{work}/venv/bin/python", "-m", "pip", "-qq", "--no-input", "--disable-pip-version-check")
        locks = PROJECT / "requirements"
        _run(*pip, "install", *pip_options, "--require-hashes", "-r", f"{locks}/build.lock")
        wheels = f"{work}/wheels"
        # By hatchling itself, because pip would hide whether there is a fast path.
        _run(f"{work}/venv/bin/python", "-m", "hatchling", "build", "-t", "wheel", "-d", wheels)
        _run(sys.executable, "-m", "venv", "--without-pip", str(staged))
        into = (*pip, "--python", f"{staged}/bin/python", "install", "--no-compile", "--no-warn-script-location")
        _run(*into, *pip_options, "--require-hashes", "-r", f"{locks}/run.lock")
        # By name: what is installed from a path writes that path down.
        _run(*into, "--no-deps", "--no-index", "--find-links", wheels, "echod")
    for activate in (staged / "bin").glob("[Aa]ctivate*"):
        activate.unlink()
    for file in (staged / "pyvenv.cfg", staged / "bin/echod"):
        file.write_text(file.read_text().replace(str(staged), final))
    _run(f"{staged}/bin/python", "-m", "compileall", "-q", "-s", str(staged), "-p", final, f"{staged}/lib")


def _run(*command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["HATCH_QUIET"] = "1"  # the path of the wheel is nobody's business
    try:
        subprocess.run(command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, check=True)
    except subprocess.CalledProcessError as error:
        raise RefusedError(f"{shlex.join(command)}: exit status {error.returncode}") from error


def _texts(places: Places) -> dict[str, str]:
    """Units, man page, README and docs: path → content, where another prefix was chosen with it in it."""
    sources = {f"{places.unitdir}/{unit}": PROJECT / "systemd" / unit for unit in UNITS}
    sources |= {places.readme: PROJECT / "README.md", f"{places.mandir}/man8/echod.8": PROJECT / "docs/echod.8"}
    pages = (PROJECT / "docs").glob("*.md")
    sources |= {f"{os.path.dirname(places.readme)}/docs/{page.name}": page for page in pages}
    texts = {path: source.read_text() for path, source in sources.items() if source.exists()}
    for unit in UNITS:
        path = f"{places.unitdir}/{unit}"
        texts[path] = (
            texts[path].replace("/usr/local", places.prefix).replace("/etc/echod", f"{places.sysconfdir}/echod")
        )
    return texts


def _make_directory(places: Places, path: str, record: Record) -> None:
    """Make it and what is missing above it; what was made is recorded, the uppermost first."""
    if path != "/" and not places.on_disk(path).is_dir():
        _make_directory(places, os.path.dirname(path), record)
        places.on_disk(path).mkdir(exist_ok=True, parents=True)
        record.directories.append(path)


def _write(places: Places, path: str, content: str, record: Record) -> None:
    _make_directory(places, os.path.dirname(path), record)
    target = places.on_disk(path)
    new = target.with_name(f".{target.name}.new")
    new.write_text(content)
    new.rename(target)
    record.files.append(path)


def _link(places: Places, record: Record) -> None:
    _make_directory(places, os.path.dirname(places.command), record)
    target = places.on_disk(places.command)
    new = target.with_name(".echod.new")
    new.unlink(missing_ok=True)
    new.symlink_to(f"../lib/echod/bin/{target.name}")
    new.rename(target)
    record.files.append(places.command)


def _keep_or_write_config(places: Places, record: Record) -> None:
    if places.on_disk(places.config).exists():
        print(f"kept {places.config}")
        return
    content = (PROJECT / "systemd/echod.toml").read_text()
    _write(places, places.config, content, record)
    record.files.remove(places.config)
    record.config_sha256 = _sha256(content.encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def running_units() -> list[str]:
    """The units of echod that systemd runs now; none where there is no systemd."""
    names = ("echod.service", "echod@*.service", "echod.socket")
    command = ("systemctl", "list-units", "--state=active,activating,reloading", "--plain", "--no-legend", *names)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return []
    return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]


def next_steps(running: Sequence[str]) -> str:
    """What to type after an installation: a service that runs already goes on with the program it has."""
    services = " ".join(unit for unit in running if unit.endswith(".service"))
    if services:
        return (
            f"{services}: running, with the program of before\n"
            "next: systemctl daemon-reload && "
            f"systemctl kill -s USR2 --kill-whom=main {services}   # upgrades in place, no connection is closed\n"
            f"  or: systemctl daemon-reload && systemctl restart {services}   # after a change of the unit too"
        )
    return f"next: systemctl daemon-reload{'' if running else ' && systemctl enable --now echod'}"


# -- uninstall ---------------------------------------------------------------------------------------------------------


def uninstall(places: Places) -> None:
    """Remove exactly what was installed; a configuration that was changed is kept."""
    record = Record.read(places)
    if not record:
        raise RefusedError(
            f"no echod in {places.on_disk(places.program)}: give the same PREFIX and DESTDIR as to install"
        )
    for path in record.files:
        places.on_disk(path).unlink(missing_ok=True)
    config = places.on_disk(places.config)
    with suppress(FileNotFoundError):
        if _sha256(config.read_bytes()) == record.config_sha256:
            config.unlink()
        else:
            print(f"kept {places.config}")
    shutil.rmtree(places.on_disk(places.program))
    for path in reversed(record.directories):
        with suppress(OSError):  # not empty: somebody else's files are in it
            places.on_disk(path).rmdir()


def main() -> int:
    """Do what the Makefile asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["install", "uninstall"])
    for name in Places.__dataclass_fields__:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--pip-options", default="")
    options = parser.parse_args()
    options.destdir = options.destdir and os.path.abspath(options.destdir)
    places = Places(*(getattr(options, name).rstrip("/") for name in Places.__dataclass_fields__))
    os.umask(0o022)  # root's may be stricter, and the service is another user
    try:
        running = [] if places.destdir else running_units()
        if options.verb == "install":
            install(places, shlex.split(options.pip_options))
            if not places.destdir:
                print(next_steps(running))
        else:
            uninstall(places)
            if running:
                units = " ".join(running)
                print(f"{units}: running still, without files; next: systemctl stop {units} && systemctl daemon-reload")
    except (RefusedError, OSError) as error:
        print(f"make {options.verb}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
