"""The documentation is true where a test can tell: links, generated tables, and the names that it lists."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import echod
from echod.telemetry.stats import CLOSE_REASONS

PROJECT = Path(__file__).parents[2]
README = PROJECT / "README.md"
SOURCES = sorted(Path(echod.__file__).parent.rglob("*.py"))
PAGES = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")])

LOG_METHODS = {"debug", "info", "warning", "error", "exception", "always"}


def prose(page: Path) -> str:
    """The page without its fenced blocks and code spans, in which nothing is a link or a heading."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    return re.sub(r"`[^`\n]*`(?!\])", lambda code: code[0].replace("](", ""), text)


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub forms them."""
    headings = re.findall(r"(?m)^#{1,6} (.*)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[str]:
    yield from re.findall(r"\]\(([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(PROJECT), f"{link}: outside the project"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    found, waiting = {README}, [README]
    while waiting:
        page = waiting.pop()
        pages = {(page.parent / link.partition("#")[0]).resolve() for link in links(page) if ".md" in link} - found
        found |= pages
        waiting += pages
    assert found == set(PAGES)


def test_the_readme_has_at_most_8_kib() -> None:
    assert README.stat().st_size <= 8192


def test_every_promise_of_the_readme_names_a_test_that_exists() -> None:
    table = README.read_text().partition("## What it promises")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| (?!promise|---)(.*?) \| (.*) \|$", table)
    assert len(rows) >= 10
    for promise, proof in rows:
        named = re.fullmatch(r"\[(test_\w+)\]\((tests/[\w/]+\.py)\)", proof)
        assert named, f"{promise} {proof}: expected a link to a test"
        assert re.search(rf"(?m)^(async )?def {named[1]}\(", (PROJECT / named[2]).read_text()), proof


def test_the_readme_gives_the_test_command_that_ci_runs() -> None:
    found = subprocess.run(
        [sys.executable, "tools/readme_command.py", "README.md"], cwd=PROJECT, capture_output=True, text=True
    )
    assert found.stdout.startswith("make test"), found.stderr


def test_the_generated_tables_are_up_to_date() -> None:
    checked = subprocess.run(
        [sys.executable, "tools/generate_docs.py", "--check"], cwd=PROJECT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_every_module_is_in_the_architecture() -> None:
    table = (PROJECT / "docs" / "architecture.md").read_text().partition("## Packages")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", table))
    for path in SOURCES:
        package, name = path.parent.name, path.stem
        if name != "__init__":
            assert (f"`{name}`" in rows[package]) if package != "echod" else (name in rows), f"{package}/{name}"


def events() -> Iterator[str]:
    """Every event that the code logs under a constant name."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOG_METHODS:
                match node.args:
                    case [ast.Constant(value=str(event)), *_]:
                        yield event


def test_every_event_of_the_log_is_documented() -> None:
    page = (PROJECT / "docs" / "logging.md").read_text().partition("## Events")[2].partition("\n## ")[0]
    documented = set(re.findall(r"(?m)^\| `([^`]+)` \|", page))
    assert documented - {"connection closed"} == set(events())


def test_every_close_reason_is_documented() -> None:
    page = (PROJECT / "docs" / "logging.md").read_text().partition("## Close reasons")[2].partition("\n## ")[0]
    assert set(re.findall(r"(?m)^\| `([^`]+)` \|", page)) == set(CLOSE_REASONS)
