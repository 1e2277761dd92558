"""Print the test command that the README gives: `readme_command.py README.md`.

It is the first line of a fenced block under "## Development" and starts with `make test`.
"""

import re
import sys
from pathlib import Path

SECTION = re.compile(r"^## Development[ \t]*\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^(```|~~~).*\n(?:\$ )?(make test(?:[ \t].*)?)\n", re.MULTILINE)


def test_command(readme: str) -> str | None:
    """Return the command without a comment behind it; None if there is none."""
    section = SECTION.search(readme)
    found = BLOCK.search(section[1]) if section else None
    return re.sub(r"[ \t]+#.*$", "", found[2]) if found else None


if __name__ == "__main__":
    print(test_command(Path(sys.argv[1]).read_text()) or sys.exit(1))
