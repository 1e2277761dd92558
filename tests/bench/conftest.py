"""The load generator."""

import pytest

from tests.bench.harness import Harness
from tests.bench.peers import MissingError


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """Built once."""
    try:
        return Harness(tmp_path_factory.mktemp("bench"))
    except MissingError as error:
        pytest.skip(str(error))
