"""The version that the package names is the version that is installed."""

from importlib import metadata

import echod


def test_installed_version_is_the_packages() -> None:
    assert echod.__version__ == metadata.version("echod")
