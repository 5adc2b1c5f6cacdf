"""The repository: what of the models folder is served, version by version, and how that changes while it serves.

A version is verified, opened, measured and only then put in place; the one it replaces answers what it has accepted and
is freed when the last of that is gone. One that fails a check is never served, and what was served before goes on. It
knows predictors and batchers; it does not know HTTP.
"""

import ctypes
import gc
import logging
import sys
import threading
from collections.abc import Collection
from dataclasses import dataclass, field

from service import metrics
from service.batching import Batcher
from service.errors import InferenceError, ModelRefusedError, NotFoundError, StartError, UnavailableError
from service.manifest import AnyManifest
from service.metrics import ModelMetrics
from service.predictor import AnyPredictor, load_any_predictor
from service.settings import Settings
from service.shelf import Fingerprint, ModelSettings, Slot, list_slots, load_settings

logger = logging.getLogger("service")


@dataclass(frozen=True)
class Served:
    """One version that serves: the predictor, and the queue in front of it."""

    predictor: AnyPredictor
    batcher: Batcher
    metrics: ModelMetrics
    fingerprint: Fingerprint = ()

    @property
    def manifest(self) -> AnyManifest:
        """The version's manifest."""
        return self.predictor.manifest


@dataclass
class Model:
    """All versions of one name: those that serve, and why others do not."""

    name: str
    versions: dict[int, Served] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    settings: ModelSettings = field(default_factory=ModelSettings)

    @property
    def latest(self) -> Served | None:
        """The version of paths that name none: the one its settings pin if that serves, else the newest that serves."""
        pinned = self.versions.get(self.settings.latest or 0)
        return pinned or (self.versions[max(self.versions)] if self.versions else None)

    @property
    def reason(self) -> str:
        """Why no version serves."""
        return next(reversed(self.refused.values()), "it has no version")

    def find(self, version: str) -> Served | None:
        """Return a served version by its number or by a label of the model's settings."""
        number = self.settings.labels.get(version)
        return next((served for key, served in self.versions.items() if str(key) == version or key == number), None)


class Repository:
    """What is served, by name and version. `refresh` may run in a thread; everything else only reads."""

    def __init__(self, settings: Settings, threads: int = 1, preferred_device: str = "cpu") -> None:
        self.models: dict[str, Model] = {}
        self.draining = False
        self.loaded = False
        self._settings = settings
        self._threads = threads
        self._preferred_device = preferred_device
        self._tried: dict[tuple[str, int], Fingerprint] = {}
        self._doubts: dict[tuple[str, int], str] = {}
        self._arriving: dict[str, Model] = {}
        self._lock = threading.Lock()

    @property
    def problem(self) -> str:
        """Why the service is not ready, or the empty string when every model that should serve does."""
        if self.draining:
            return "the service is shutting down"
        if not self.loaded:
            return "models are being loaded"
        models = list(self.models.values())
        if not models:
            return f"there is no model in {self._settings.models_dir}"
        return "; ".join(f"{model.name}: {model.reason}" for model in models if not model.versions)

    def get(self, name: str, version: str | None = None) -> Served:
        """Return a served version, the latest when none is named.

        Raises:
            NotFoundError: no such model or version.
            UnavailableError: it exists and does not serve.
        """
        model = self.models.get(name)
        if model is None:
            if not self.loaded:
                raise UnavailableError("models are being loaded; try again in a moment")
            raise NotFoundError(f"Request for unknown model: '{name}' is not found; it is not one of {self._names()}")
        served = model.latest if version is None else model.find(version)
        if served is not None:
            return served
        if version is None:
            raise UnavailableError(f"model '{name}' is not ready: {model.reason}")
        number = str(model.settings.labels.get(version, version))
        if number in model.refused:
            raise UnavailableError(f"version {number} of model '{name}' is not ready: {model.refused[number]}")
        if number != version:
            raise NotFoundError(f"Request for unknown model: '{name}' has no version {number}, which {version!r} names")
        known = ", ".join(map(str, [*sorted(model.versions), *model.settings.labels])) or "none"
        raise NotFoundError(f"Request for unknown model: '{name}' has no version '{version[:40]}'; it has {known}")

    def load(self, unloaded: Collection[str] = ()) -> None:
        """Load every version for the first time, but for the models in `unloaded`.

        Raises:
            StartError: the models folder or the device asked for is not there.
        """
        if not self._settings.models_dir.is_dir():
            raise StartError(f"models folder {self._settings.models_dir} does not exist; pass --models-dir")
        self.refresh(unloaded)
        self.loaded = True

    def refresh(self, unloaded: Collection[str] = (), patient: bool = False) -> bool:
        """Make what is served equal to what stands in the folder, but for the models in `unloaded`.

        A version whose files have not changed since it was loaded or refused is left alone.

        Args:
            unloaded: models to treat as if they were not there.
            patient: what fails its checks may still be being copied; it is only refused if its files are the same at
                the next look.

        Returns:
            Whether a version has been taken in, refused or taken out.
        """
        with self._lock:
            root = self._settings.models_dir
            if not root.is_dir():
                logger.error("the models folder %s is not there; what was served before goes on", root)
                return False
            slots = [slot for slot in list_slots(root, self._settings.model_name) if slot.name not in unloaded]
            for name in {slot.name for slot in slots}:
                self._refresh_settings(self._find(name))
            wanted = [slot for slot in slots if self._is_wanted(slot)]
            changed = [slot for slot in wanted if self._tried.get((slot.name, slot.version)) != slot.fingerprint]
            served = [self._load_version(slot) for slot in changed]
            doubted = [slot for slot in wanted if (slot.name, slot.version) in self._doubts]
            refused = [slot for slot in doubted if not (patient and slot in changed)]
            for slot in refused:
                self._refuse(slot)
            removed = self._remove_others(wanted)
        if changed or removed:
            _give_back_memory()
        return bool(any(served) or refused or removed)

    def _find(self, name: str) -> Model:
        """Return a model, also one that no request sees yet because no version of it has been served or refused."""
        return self.models.get(name) or self._arriving.setdefault(name, Model(name))

    def _show(self, model: Model) -> None:
        """Let requests see a model; others may be going through `models`, so it is replaced and never changed."""
        self._arriving.pop(model.name, None)
        self.models = {**self.models, model.name: model}

    def _refresh_settings(self, model: Model) -> None:
        try:
            model.settings = load_settings(self._settings.models_dir, model.name)
        except ModelRefusedError as error:
            if model.refused.get("settings") != str(error):
                logger.error("model %s keeps its settings: %s", model.name, error)
                model.refused = {**model.refused, "settings": str(error)}
            return
        model.refused = {version: reason for version, reason in model.refused.items() if version != "settings"}

    def _is_wanted(self, slot: Slot) -> bool:
        versions = self._find(slot.name).settings.versions
        return versions is None or slot.version in versions

    def _refuse(self, slot: Slot) -> None:
        """Say everywhere why a version is not served."""
        model, version = self._find(slot.name), str(slot.version)
        reason = self._doubts.pop((slot.name, slot.version))
        model.refused = {**model.refused, version: reason}
        self._show(model)
        metrics.note_refused(slot.name, version, True)
        goes_on = "; what was served before goes on" if model.versions else ""
        logger.error("model %s version %s is not served: %s%s", slot.name, version, reason, goes_on)

    def _load_version(self, slot: Slot) -> bool:
        """Check and open a version, and serve it; one that fails is doubted, and goes on as it was."""
        model, version = self._find(slot.name), str(slot.version)
        self._tried[slot.name, slot.version] = slot.fingerprint
        try:
            served = self._open(slot)
        except (ModelRefusedError, InferenceError) as error:
            self._doubts[slot.name, slot.version] = str(error)
            return False
        self._doubts.pop((slot.name, slot.version), None)
        model.versions = {**model.versions, slot.version: served}
        self._show(model)
        if version in model.refused:
            model.refused = {key: reason for key, reason in model.refused.items() if key != version}
            metrics.note_refused(slot.name, version, False)
        backend = served.predictor.backend
        metrics.note_served(slot.name, slot.version, backend.name, backend.device, backend.provider, True)
        if self.loaded:
            logger.info("serving %s version %s on %s (%s)", slot.name, version, backend.device, backend.provider)
        return True

    def _open(self, slot: Slot) -> Served:
        settings = self._settings
        is_single = slot.folder == settings.models_dir
        predictor = load_any_predictor(
            slot.folder,
            settings.backend,
            settings.device,
            self._threads,
            self._preferred_device,
            serve_as=slot.name if is_single else None,
        )
        rows = settings.max_batch_size
        cost = predictor.measure_cost(rows)
        figures = ModelMetrics(slot.name, slot.version)
        joins = predictor.manifest.task != "tensors"
        batcher = Batcher(predictor.predict, cost, rows, settings.queue_size, figures, joins)
        return Served(predictor, batcher, figures, slot.fingerprint)

    def _remove_others(self, wanted: Collection[Slot]) -> bool:
        """Stop serving what is not wanted any more; requests that were accepted hold what they need until answered."""
        kept = {(slot.name, slot.version) for slot in wanted}
        self._tried = {key: seen for key, seen in self._tried.items() if key in kept}
        self._doubts = {key: reason for key, reason in self._doubts.items() if key in kept}
        self._arriving = {name: model for name, model in self._arriving.items() if any(name == key for key, _ in kept)}
        removed = False
        for model in list(self.models.values()):
            for version, served in model.versions.items():
                if (model.name, version) not in kept:
                    removed = True
                    backend = served.predictor.backend
                    metrics.note_served(model.name, version, backend.name, backend.device, backend.provider, False)
                    logger.info("no longer serving %s version %d", model.name, version)
            model.versions = {key: served for key, served in model.versions.items() if (model.name, key) in kept}
            refused = {key for key in model.refused if key.isdigit() and (model.name, int(key)) not in kept}
            for key in refused:
                metrics.note_refused(model.name, key, False)
                removed = True
            model.refused = {key: reason for key, reason in model.refused.items() if key not in refused}
            if not any(name == model.name for name, _ in kept):
                self.models = {name: other for name, other in self.models.items() if other is not model}
        return removed

    def _names(self) -> str:
        return ", ".join(sorted(self.models)) or "(none)"


def _give_back_memory() -> None:
    """Free what is only held in cycles, and have the C library return what graphs leave behind."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
