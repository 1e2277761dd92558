"""An echod that is installed more than once, as an upgrade finds it, each with changes of its own."""

import contextlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.daemon import Daemon, serving

PROJECT = Path(__file__).parents[2]


class Installed:
    """An echod that is installed twice or thrice, each run by the script `current/bin/echod`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.add("one")
        self.switch("one")

    def serving(
        self, *arguments: str, by: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
    ) -> contextlib.AbstractContextManager[Daemon]:
        """What is installed now, started through the command `by`, if any; it serves and ends in good order."""
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        there = {"PYTHONPATH": f"{self.directory}/current/lib:{packages}", **(environment or {})}
        return serving(*arguments, command=(*by, str(self.directory / "current/bin/echod")), environment=there)

    def add(self, name: str, changes: Mapping[str, str] | None = None) -> None:
        """Install another copy; `changes` appends text to modules, named without the leading `echod.`."""
        shutil.copytree(PROJECT / "echod", self.directory / name / "lib/echod")  # with the bytecode, which stays valid
        for module, text in (changes or {}).items():
            with open(self.directory / name / f"lib/echod/{module.replace('.', '/')}.py", "a") as file:
                file.write(f"\n{text}\n")
        script = self.directory / name / "bin/echod"
        script.parent.mkdir()
        (script.parent / "python").symlink_to(sys.executable)
        script.write_text(
            f"#!{script.parent / 'python'}\nimport sys\nfrom echod.__main__ import main\nsys.exit(main())\n"
        )
        script.chmod(0o755)

    def prove_at_once(self) -> None:
        """Make a preflight of the first one a matter of milliseconds, in which nothing is proven."""
        script = self.directory / "one/bin/echod"
        _, rest = script.read_text().split("\n", 1)
        proving = f'[ "$1" = preflight ] && exit 0\nexec {script.parent / "python"} "$0" "$@"'
        script.write_text(f"#!/bin/sh\n''':'\n{proving}\n'''\n{rest}")

    def switch(self, name: str) -> None:
        """Make it the one that is installed now."""
        link = self.directory / "next"
        link.symlink_to(name)
        link.rename(self.directory / "current")
