"""Run each target under every fuzzer, for this many seconds in all, and print what was tried, reached and found.

Inputs that reach new code, and findings, are kept in DIRECTORY, where the next run begins.
"""

import importlib.util
import os
import re
import subprocess
import sys
import time
import traceback

from tests.fuzz.hunt import hunt
from tests.fuzz.targets import TARGETS
from tests.support.daemon import UNMEASURED

DIRECTORY = ".fuzz"

FOUND = "FOUND, see above"

SHARES = {"protocol": 0.6, "settings": 0.25, "address": 0.15}

GUIDED = 0.75
"""Share of the time for atheris, if installed: it tries ten times as many inputs, hypothesis likelier ones."""

LONGEST_INPUT = 4096

LATE_S = 60


def main(seconds: float) -> int:
    """Run all targets; return 0 if nothing was found, else 1."""
    guided = GUIDED if importlib.util.find_spec("atheris") else 0
    results = []
    for name, share in SHARES.items():
        results.append(_hypothesis(name, seconds * share * (1 - guided)))
        if guided:
            results.append(_atheris(name, max(1, round(seconds * share * guided))))
    findings = sum(FOUND in result for result in results)
    print("", *results, f"{findings} findings" if findings else "nothing found", sep="\n")
    return min(findings, 1)


def _hypothesis(name: str, seconds: float) -> str:
    began = time.monotonic()
    try:
        tried = hunt(name, seconds)
    except Exception:
        traceback.print_exc()
        return f"{name}, hypothesis: {FOUND}"
    return f"{name}, hypothesis: {tried} inputs in {time.monotonic() - began:.0f} s"


def _atheris(name: str, seconds: int) -> str:
    corpus = _corpus(name)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz.guided", name, corpus),
            *(f"-max_total_time={seconds}", f"-max_len={LONGEST_INPUT}", f"-dict={_dictionary(name)}"),
            *(f"-artifact_prefix={DIRECTORY}/{name}-", "-timeout=10", "-print_final_stats=1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds + LATE_S,
        env=os.environ | UNMEASURED,
    )
    if run.returncode:
        print(run.stdout[-5000:])
        return f"{name}, atheris: {FOUND}"
    tried = re.findall(r"number_of_executed_units: (\d+)", run.stdout)
    reached = re.findall(r"cov: (\d+) ft: (\d+)", run.stdout)
    return f"{name}, atheris: {tried[-1]} inputs in {seconds} s, {reached[-1][0]} edges, {len(os.listdir(corpus))} kept"


def _corpus(name: str) -> str:
    directory = os.path.join(DIRECTORY, name)
    os.makedirs(directory, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds):
        with open(os.path.join(directory, f"seed-{number}"), "wb") as file:
            file.write(seed)
    return directory


def _dictionary(name: str) -> str:
    path = os.path.join(DIRECTORY, f"{name}.dict")
    with open(path, "w") as file:
        for word in TARGETS[name].words:
            print('"', *(f"\\x{byte:02x}" for byte in word), '"', sep="", file=file)
    return path


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
