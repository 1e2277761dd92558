"""Tell whether this Python can run echod: `PYTHON tools/check_python.py PYTHON`, where PYTHON is its name in messages.

Prints the interpreter below any virtual environment, then its release, or says what is missing and exits with 1.
Runs under every Python 3, and so uses no newer syntax.
"""

import os
import sys

if sys.version_info < (3, 11):
    sys.exit(
        "echod needs Python 3.11 or newer, but %s is %d.%d: name another with `make PYTHON=python3.12 ...`"
        % (sys.argv[1], *sys.version_info[:2])
    )
try:
    import ensurepip
    import venv
except ImportError as error:
    sys.exit(
        "%s has no module %s and can't create a virtual environment: on Debian and Ubuntu, `apt-get install python3-venv`"
        % (sys.argv[1], error.name)
    )
del ensurepip, venv
print(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined]  # noqa: SLF001 (not sys.executable, which may be in a virtual environment)
print(sys.version.replace("\n", " "))
