"""Several installed versions of echod with different changes, for tests of upgrades."""

import contextlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.daemon import Daemon, serving

PROJECT = Path(__file__).parents[2]


class Installed:
    """Installed copies of echod; the script `current/bin/echod` runs the current one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.add("one")
        self.switch("one")

    def serving(
        self, *arguments: str, by: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
    ) -> contextlib.AbstractContextManager[Daemon]:
        """Run the current copy, started by the command `by` if given, as `serving` does."""
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        there = {"PYTHONPATH": f"{self.directory}/current/lib:{packages}", **(environment or {})}
        return serving(*arguments, command=(*by, str(self.directory / "current/bin/echod")), environment=there)

    def add(self, name: str, changes: Mapping[str, str] | None = None) -> None:
        """Install another copy; `changes` maps a module, such as `server.server`, to the text appended to it."""
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
        """Make the preflight of the first copy succeed at once, without a check."""
        script = self.directory / "one/bin/echod"
        _, rest = script.read_text().split("\n", 1)
        proving = f'[ "$1" = preflight ] && exit 0\nexec {script.parent / "python"} "$0" "$@"'
        script.write_text(f"#!/bin/sh\n''':'\n{proving}\n'''\n{rest}")

    def switch(self, name: str) -> None:
        """Make this copy the current one."""
        link = self.directory / "next"
        link.symlink_to(name)
        link.rename(self.directory / "current")
