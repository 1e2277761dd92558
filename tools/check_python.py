"""Check whether this Python can run echod: `PYTHON tools/check_python.py PYTHON`; the argument is its name in messages.

Print the interpreter below any virtual environment and its release, or say what is missing and exit with 1. The syntax
is that of every Python, so that an old one reports its version instead of a syntax error.
"""

import os
import sys

NAME = sys.argv[1]

if sys.version_info < (3, 11):
    version = sys.version.split()[0]
    sys.exit("echod needs Python 3.11 or newer, %s is %s: name one with `make PYTHON=python3.12 ...`" % (NAME, version))
try:
    import ensurepip
    import venv
except ImportError as error:
    needed = "on Debian and Ubuntu, `apt-get install python3-venv`"
    sys.exit("%s has no module %s and can't create a virtual environment: %s" % (NAME, error.name, needed))
del ensurepip, venv
print(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined]  # noqa: SLF001 (sys.executable may be a venv's)
print(sys.version.replace("\n", " "))
