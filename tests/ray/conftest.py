"""One Ray of two nodes for all tests here, and models folders that they may change."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fakes
from tests.ray.cluster import RayServer


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayServer]:
    """The cluster; a test deploys what it needs, in the place of what was there."""
    pytest.importorskip("ray", reason="needs '.[ray]'")
    with RayServer() as running:
        yield running


@pytest.fixture
def models(tmp_path: Path, published: Path) -> Path:
    """A copy of the folder that the registry ships."""
    return Path(shutil.copytree(published, tmp_path / "models"))


@pytest.fixture
def doubler(empty_dir: Path) -> Path:
    """A folder with one small model."""
    fakes.write_version(empty_dir, fakes.doubler())
    return empty_dir
