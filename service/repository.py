"""The repository: `models/<name>/<version>/` on disk, and which versions of it are served.

It loads every version it finds, keeps going when one is refused, and says why. It knows predictors and batchers; it
does not know HTTP.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from service import metrics
from service.batching import Batcher, measure_cost
from service.errors import InferenceError, ModelRefusedError, NotFoundError, StartError, UnavailableError
from service.manifest import MANIFEST_FILE, Manifest
from service.metrics import ModelMetrics
from service.predictor import Predictor, load_predictor
from service.settings import Settings

logger = logging.getLogger("service")


@dataclass(frozen=True)
class Served:
    """One version that serves: the predictor, and the queue in front of it."""

    predictor: Predictor
    batcher: Batcher
    metrics: ModelMetrics

    @property
    def manifest(self) -> Manifest:
        """The version's manifest."""
        return self.predictor.manifest


@dataclass
class Model:
    """All versions of one name: those that serve, newest last, and why others do not."""

    name: str
    versions: dict[int, Served] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def latest(self) -> Served | None:
        """The newest version that serves."""
        return self.versions[max(self.versions)] if self.versions else None


class Repository:
    """What is served, by name and version. Call `load` from a running event loop."""

    def __init__(self, settings: Settings, threads: int = 1, preferred_device: str = "cpu") -> None:
        self.models: dict[str, Model] = {}
        self.draining = False
        self.loaded = False
        self._settings = settings
        self._threads = threads
        self._preferred_device = preferred_device

    @property
    def problem(self) -> str:
        """Why the service is not ready, or the empty string when every model that should serve does."""
        if self.draining:
            return "the service is shutting down"
        if not self.loaded:
            return "models are being loaded"
        if not self.models:
            return f"there is no model in {self._settings.models_dir}"
        missing = [model for model in self.models.values() if not model.versions]
        return "; ".join(f"{model.name}: {next(iter(model.refused.values()))}" for model in missing)

    def get(self, name: str, version: str | None = None) -> Served:
        """Return a served version, the newest when none is named.

        Raises:
            NotFoundError: no such model or version.
            UnavailableError: it exists and does not serve.
        """
        model = self.models.get(name)
        if model is None:
            if not self.loaded:
                raise UnavailableError("models are being loaded; try again in a moment")
            raise NotFoundError(f"Request for unknown model: '{name}' is not found; it is not one of {self._names()}")
        if version is None:
            if model.latest is None:
                raise UnavailableError(f"model '{name}' is not ready: {next(iter(model.refused.values()))}")
            return model.latest
        served = next((served for number, served in model.versions.items() if str(number) == version), None)
        if served is None:
            if version in model.refused:
                raise UnavailableError(f"version {version} of model '{name}' is not ready: {model.refused[version]}")
            known = ", ".join(map(str, sorted(model.versions))) or "none"
            raise NotFoundError(f"Request for unknown model: '{name}' has no version '{version[:40]}'; it has {known}")
        return served

    def load(self) -> None:
        """Load every version folder that has a manifest.

        Raises:
            StartError: the models folder or the device asked for is not there.
        """
        root = self._settings.models_dir
        if not root.is_dir():
            raise StartError(f"models folder {root} does not exist; pass --models-dir")
        for folder in sorted(root.glob(f"*/*/{MANIFEST_FILE}")):
            self._load_version(folder.parent)
        self.loaded = True

    def close(self) -> None:
        """End every model's thread."""
        for model in self.models.values():
            for served in model.versions.values():
                served.batcher.close()

    def _load_version(self, folder: Path) -> None:
        name, version = folder.parent.name, folder.name
        if name.startswith(".") or not version.isdigit():
            return
        model = self.models.setdefault(name, Model(name))
        settings = self._settings
        try:
            predictor = load_predictor(folder, settings.backend, settings.device, self._threads, self._preferred_device)
            rows = settings.max_batch_size
            cost = measure_cost(predictor.run, predictor.manifest.input.shape, rows)  # zeros may give no finite number
            figures = ModelMetrics(name, int(version))
            batcher = Batcher(predictor.predict, cost, rows, settings.queue_size, figures)
        except (ModelRefusedError, InferenceError) as error:
            model.refused[version] = str(error)
            metrics.note_refused(name, version)
            logger.error("model %s version %s is not served: %s", name, version, error)
            return
        backend = predictor.backend
        metrics.note_served(name, int(version), backend.name, backend.device, backend.provider)
        model.versions[int(version)] = Served(predictor, batcher, figures)
        logger.debug("serving %s version %s on %s (%s)", name, version, *_place(predictor))

    def _names(self) -> str:
        return ", ".join(sorted(self.models)) or "(none)"


def _place(predictor: Predictor) -> tuple[str, str]:
    return predictor.backend.device, predictor.backend.provider
