"""Check that tests notice changes of the code: `python -m tests.support.mutants FILE... -- PYTEST_ARGUMENTS`.

In a copy of the project, changes one thing at a time: flips a comparison or a condition, changes a number or an
operator, or removes a statement. Runs pytest each time, and prints the mutants that no test has killed. Several groups
of arguments, each after its own `--`, are run one after the other until one kills the mutant: put quick tests first.

    python -m tests.support.mutants echod/server/timeouts.py --sample 40 -- tests/unit -- -n 6 tests/integration
"""

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

PROJECT = Path.cwd()
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "build", "dist", "__pycache__")

PAIRS = (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
    (ast.And, ast.Or),
    (ast.Add, ast.Sub),
    (ast.Mult, ast.FloorDiv),
)
OTHER: dict[type[ast.AST], type[ast.AST]] = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
"""For each operator the one that replaces it."""

UNCHANGED = ("TYPE_CHECKING", "True")  # conditions that are not inverted

Mutation = tuple[ast.AST, str, Callable[[], object]]
"""The node, what is done to it, and the function that does it."""


def mutations(tree: ast.Module) -> Iterator[Mutation]:
    """Yield every mutation of the tree, always in the same order."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare(ops=[operator]) if type(operator) in OTHER:
                yield node, "other comparison", partial(setattr, node, "ops", [OTHER[type(operator)]()])
            case ast.BoolOp(op=operator) | ast.BinOp(op=operator) if type(operator) in OTHER:
                yield node, "other operator", partial(setattr, node, "op", OTHER[type(operator)]())
            case ast.Constant(bool() as value):
                yield node, str(not value), partial(setattr, node, "value", not value)
            case ast.Constant(int() | float() as value):
                yield node, str(value + 1), partial(setattr, node, "value", value + 1)
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if ast.unparse(test) not in UNCHANGED:
                yield test, "inverted", partial(setattr, node, "test", ast.UnaryOp(ast.Not(), test))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield node, "not removed", partial(setattr, node, "operand", ast.UnaryOp(ast.Not(), operand))
            case ast.Return(ast.expr()):
                yield node, "returns nothing", partial(setattr, node, "value", None)
        if not isinstance(node, ast.Module | ast.ClassDef):
            yield from removals(node)


def removals(node: ast.AST) -> Iterator[Mutation]:
    """Yield the removal of each statement in the body of the node."""
    for name in ("body", "orelse", "finalbody"):
        statements: object = getattr(node, name, None)
        if not isinstance(statements, list):  # the body of a lambda is an expression
            continue
        for index, statement in enumerate(statements):
            match statement:
                case (
                    ast.Expr(ast.Call() | ast.Await())
                    | (ast.Assign() | ast.AugAssign() | ast.Delete())
                    | (ast.Raise() | ast.Return(None) | ast.Break() | ast.Continue())
                ):
                    yield statement, "removed", partial(statements.__setitem__, index, ast.Pass())


def mutated(source: str, number: int) -> tuple[str, str]:
    """Return the source with this mutation, and a description of it."""
    tree = ast.parse(source)
    node, change, apply = list(mutations(tree))[number]
    description = f"{getattr(node, 'lineno', 0)}: {ast.unparse(node).splitlines()[0]}: {change}"
    apply()
    return ast.unparse(ast.fix_missing_locations(tree)), description


def passes(copy: Path, arguments: list[str], limit_s: float) -> bool:
    """Run pytest in the copy; a run that takes longer than `limit_s` does not pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    with subprocess.Popen(
        command, cwd=copy, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.wait(limit_s) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return False


def try_mutants(copy: Path, file: str, chosen: list[int], groups: list[tuple[list[str], float]]) -> int:
    """Print the mutants of the file that survive every group of arguments, and return how many they are."""
    target, source = copy / file, (PROJECT / file).read_text()
    survivors = 0
    for number in chosen:
        text, description = mutated(source, number)
        target.write_text(text)
        shutil.rmtree(target.parent / "__pycache__", ignore_errors=True)  # bytecode knows only the second of its source
        if all(passes(copy, arguments, limit_s) for arguments, limit_s in groups):
            survivors += 1
            print(f"{file}:{description}: survived", flush=True)
    target.write_text(source)
    return survivors


def main() -> int:
    given, *groups = ([*group] for is_end, group in groupby(sys.argv[1:], "--".__eq__) if not is_end)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--sample", type=int, metavar="N", help="try N mutants of each file instead of all")
    parser.add_argument("--seed", default="1", help="choose the sample by this text")
    options = parser.parse_args(given)
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        copy = shutil.copytree(PROJECT, Path(directory, "m"), ignore=NOT_COPIED)
        limited: list[tuple[list[str], float]] = []
        for arguments in groups:
            began = time.monotonic()
            if not passes(copy, arguments, 600):
                parser.error(f"the tests fail without a mutation: {' '.join(arguments)}")
            limited.append((arguments, 3 * (time.monotonic() - began) + 30))
        for file in options.files:
            total = len(list(mutations(ast.parse((PROJECT / file).read_text()))))
            chosen = sorted(random.Random(options.seed).sample(range(total), min(options.sample or total, total)))
            survived = try_mutants(copy, file, chosen, limited)
            print(f"{file}: {len(chosen)} of {total} mutants tried, {survived} survived", flush=True)
            survivors += survived
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
