"""Options of the test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="what is a sample otherwise, in full")
    parser.addoption("--seed", default="1", help="what the clients of the fault suite choose by; any text")
