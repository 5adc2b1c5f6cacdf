"""One Ray cluster for all tests here, and models folders that they may change."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fakes
from tests.ray.cluster import RayServer


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayServer]:
    """The cluster; each test deploys what it needs, replacing the deployment before."""
    pytest.importorskip("ray", reason="needs '.[ray]'")
    with RayServer() as running:
        yield running


@pytest.fixture
def models(tmp_path: Path, published: Path) -> Path:
    """A copy of the models folder of the repository."""
    return Path(shutil.copytree(published, tmp_path / "models"))


@pytest.fixture
def doubler(empty_dir: Path) -> Path:
    """A folder with one small model."""
    fakes.write_version(empty_dir, fakes.doubler())
    return empty_dir
