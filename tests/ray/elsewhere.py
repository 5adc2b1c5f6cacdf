"""A pytest plugin: tests use the Ray Serve application at `SERVICE_TEST_URL` instead of starting servers.

    SERVICE_TEST_URL=http://… pytest -p tests.ray.elsewhere tests/contract/test_predictions.py

The models folder of the first server is copied to `SERVICE_TEST_MODELS_DIR`, which the application serves; a session
that needs a second one fails.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Self

import requests

from tests import servers

SECONDS = 60


class ElsewhereServer(servers.Server):
    """The interface of `Server`, without a process."""

    _served: Path | None = None

    def __init__(self, models_dir: Path, *flags: str, environment: object = None) -> None:
        assert set(flags) <= {"--workers", "1", "--device", "cpu"}, f"a server elsewhere cannot be told {flags}"
        assert environment is None
        assert ElsewhereServer._served in (None, models_dir), "there is but one server elsewhere"
        ElsewhereServer._served = models_dir
        self.url = os.environ["SERVICE_TEST_URL"]
        self._folder = Path(os.environ["SERVICE_TEST_MODELS_DIR"])
        self._models_dir = models_dir

    def __enter__(self) -> Self:
        """Copy the models, and wait until exactly these are served."""
        for old in self._folder.iterdir():
            shutil.rmtree(old)
        for new in self._models_dir.iterdir():
            shutil.copytree(new, self._folder / new.name)
        expected = {path.parent.name for path in self._folder.glob("*/*/")}
        until = time.monotonic() + SECONDS
        while self._list() != expected:
            assert time.monotonic() < until, f"{self._list()} are served, not {expected}"
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave it running."""

    def token_headers(self) -> dict[str, str]:
        """Return the header by which models may be loaded and unloaded."""
        return {"X-API-Key": os.environ["SERVICE_TEST_ADMIN_KEY"]}

    def _list(self) -> set[str]:
        models = requests.get(f"{self.url}/v1/models", timeout=10).json()["models"]
        return {model["name"] for model in models if model["ready"]}


servers.Server = ElsewhereServer  # type: ignore[misc]
