"""Skip the suite without HAProxy."""

import pytest

from tests.system.balancer.haproxy import PROGRAM


@pytest.fixture(autouse=True)
def _haproxy() -> None:
    if not PROGRAM:
        pytest.skip("no `haproxy` command: on Debian and Ubuntu, `apt-get install haproxy`")
