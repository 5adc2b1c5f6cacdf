"""Images, built once for all tests, and removed again."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose import engine, stand_ins


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these tests out unless they are asked for by their path: they build images and take minutes."""
    asked_for = any("tests/compose" in Path(argument).as_posix() for argument in config.args)
    return None if asked_for or collection_path.name == "conftest.py" else True


@pytest.fixture(autouse=True, scope="session")
def _engine() -> None:
    """Skip where there is no Docker."""
    if reason := engine.find_missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def image(_engine: None) -> Iterator[str]:
    """The image for CPUs."""
    yield (name := engine.build("cpu"))
    engine.docker("image", "rm", "--force", name)


@pytest.fixture(scope="session")
def train_image(image: str) -> Iterator[str]:
    """The image that trains, with the PyTorch that this machine can have."""
    del image  # built first: this one continues from its packages
    with engine.pytorch_arguments() as arguments:
        name = engine.build("train", **arguments)
    yield name
    engine.docker("image", "rm", "--force", name)


@pytest.fixture(scope="session")
def prometheus_image(_engine: None) -> Iterator[dict[str, str]]:
    """The setting that names Prometheus' image: a stand-in where the program is installed here."""
    with stand_ins.image("prometheus", stand_ins.PROMETHEUS, "PROMETHEUS_IMAGE") as setting:
        yield setting


@pytest.fixture(scope="session")
def proxy_image(_engine: None) -> Iterator[dict[str, str]]:
    """The setting that names HAProxy's image: a stand-in where the program is installed here."""
    with stand_ins.image("haproxy", stand_ins.HAPROXY, "PROXY_IMAGE") as setting:
        yield setting
