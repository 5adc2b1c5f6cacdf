"""Fixtures for every test: folders with models of known answers, and real servers on them."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from tests import fakes
from tests.servers import ROOT, Server

RAY = "tests/ray/"

settings.register_profile("tests", deadline=None)  # a busy machine is no finding
settings.load_profile("tests")


class _ByFile(LoadFileScheduling):  # type: ignore[misc]
    """Gives each file to one of the processes that `-n` starts, and all of Ray's, which share a cluster, to one."""

    def _split_scope(self, nodeid: str) -> str:
        return RAY if nodeid.startswith(RAY) else str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the tests out by file."""
    config.option.loadscopereorder = False  # in the order below, and not the largest files first
    return _ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with Ray's, which take longest; the rest keeps its random order."""
    items.sort(key=lambda item: not item.nodeid.startswith(RAY))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Undo what a command does to logging, which belongs to the whole process."""
    root, service = logging.getLogger(), logging.getLogger("service")
    handlers, levels = root.handlers[:], (root.level, service.level)
    yield
    logging.disable(logging.NOTSET)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    service.setLevel(levels[1])


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good model of each task, in both backends, and a second version of one; for reading alone."""
    root: Path = tmp_path_factory.mktemp("good") / "models"
    for build in fakes.GOOD:
        fakes.write_version(root, build())
    fakes.write_version(root, fakes.doubler(version=2, factor=2.5))
    return root


@pytest.fixture(scope="session")
def doubler_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one version, which is opened fast; for reading alone."""
    root: Path = tmp_path_factory.mktemp("doubler") / "models"
    fakes.write_version(root, fakes.doubler(version=2, factor=2.5).only("onnx"))
    return root


@pytest.fixture
def empty_dir(tmp_path: Path) -> Path:
    """A models folder of the test's own, still empty."""
    root = tmp_path / "models"
    root.mkdir()
    return root


@pytest.fixture(scope="session")
def server(models_dir: Path) -> Iterator[Server]:
    """One running server on `models_dir`, shared by tests that only send requests."""
    with Server(models_dir, "--workers", "1") as running:
        yield running


@pytest.fixture(scope="session")
def published() -> Path:
    """The models folder that the registry ships."""
    return ROOT / "models"
