"""The command: a part of the benchmark, and echod's compiled row where there is none."""

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.bench.__main__ import DOCUMENT, without_missing_fastpath
from tests.bench.harness import Harness
from tests.bench.peers import COMPILED, bare, echod_python
from tests.support.daemon import DEADLINE_S


def _bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_S)


def test_a_part_is_printed_and_leaves_the_document_alone(harness: Harness) -> None:
    """The peers and workloads that are named, and no others."""
    assert harness.program, "there is a C compiler"
    before = DOCUMENT.read_text()
    done = _bench("--peers", "C,bare", "--workloads", "50", "--rounds", "1", "--seconds", "0.05")
    assert (done.returncode, done.stderr) == (0, "")
    assert "| workload | C | bare |\n| --- | ---: | ---: |\n| 50 connections, ping-pong | " in done.stdout
    assert "churn" not in done.stdout
    assert DOCUMENT.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(("--peers", "C,Rust"), "no peer 'rust'"), (("--workloads", "51"), "no workload '51'")],
    ids=["peer", "workload"],
)
def test_an_unknown_name_is_rejected(arguments: tuple[str, ...], complaint: str) -> None:
    """The message lists the names that there are."""
    done = _bench(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "echod-python" in done.stderr or "8x64x1k" in done.stderr


def test_the_compiled_row_is_left_out_where_the_fast_path_is_not_loaded(harness: Harness) -> None:
    """The kernel's list of what is mapped tells, and the report says why the row is missing."""
    disguised = replace(echod_python(), name=COMPILED)
    peers, missing = without_missing_fastpath(harness, [bare(), disguised], {})
    assert peers == [bare()]
    assert "without its compiled fast path" in missing[COMPILED]
