"""A target under atheris, which looks for inputs that reach new branches of echod.

The arguments are the name of the target and those of libFuzzer; a single file, such as a finding, is tried once.
"""

import sys

import atheris  # type: ignore[import-untyped] # not in dev.lock: the Makefile says why

with atheris.instrument_imports(include=["echod"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]].check)
    atheris.Fuzz()
