"""Training in a container beside the running service."""

import os
from pathlib import Path
from shutil import copytree

import pytest
import requests

from tests.compose.engine import Callers, Project, inspect
from tests.servers import ROOT
from tests.wire import wait_until

OWNER = 1000


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The models of the registry, in a folder of a user who is not root."""
    folder = tmp_path / "models"
    copytree(ROOT / "models", folder)
    for path in (tmp_path, tmp_path.parent):
        path.chmod(0o755)
    if os.getuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, OWNER, OWNER)
    return folder


def test_a_run_is_served_without_a_restart(image: str, train_image: str, models: Path, tmp_path: Path) -> None:
    """The profile publishes the next version; the service serves it by itself, and no call fails meanwhile."""
    owner = models.stat()
    settings = {"IMAGE": image, "TRAIN_IMAGE": train_image, "MODELS_DIR": str(models)}
    settings |= {"MODELS_UID": str(owner.st_uid), "MODELS_GID": str(owner.st_gid)}
    with Project("train", tmp_path, **settings) as project:
        project.up("service")
        started = inspect(project.container())["State"]["StartedAt"]
        with Callers(project.url(), count=2) as callers:
            said = project.compose("run", "--rm", "-T", "train")
            assert "published /models/logistic-hours/2" in said
            wait_until(lambda: callers.answers[-1][1] == 2)
        assert not callers.failures
        assert {version for _, version in callers.answers} == {1, 2}
        state = inspect(project.container())["State"]
        assert (state["StartedAt"], state["Health"]["Status"]) == (started, "healthy")
        model = requests.get(project.url() + "/v1/models/logistic-hours", timeout=30).json()
        assert model["versions"] == [1, 2]
        assert (models / "logistic-hours" / "2").stat().st_uid == owner.st_uid
    print(f"{len(callers.answers)} calls while a version was trained and taken in, none failed")
