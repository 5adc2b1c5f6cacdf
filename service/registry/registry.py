"""The registry: what of the models folder is served, version by version, and how that changes while it serves.

A version is verified, opened and measured (`prepare`), and only then put in place (`commit`), so that all workers can
do the second at the same moment; the one it replaces answers what it has accepted and is freed when the last of that is
gone. One that fails a check is never served, and what was served before goes on. It knows predictors and batchers; it
does not know HTTP.
"""

import ctypes
import gc
import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from weakref import WeakKeyDictionary

from service.errors import ModelRefusedError, NotFoundError, ServiceError, StartError, UnavailableError
from service.model.backends import check_backend
from service.model.batching import Batcher
from service.model.predictor import load_any_predictor
from service.registry.model_folder import Fingerprint, ModelSettings, Slot, find_strays, list_slots, load_settings, look
from service.registry.versions import NO_FAILURES, Change, Failures, Key, LoadedVersion, Model, ReadSettings
from service.settings import Settings
from service.telemetry import metrics
from service.telemetry.metrics import ModelMetrics

logger = logging.getLogger("service")


class Registry:
    """What is served, by name and version. `prepare` may run in a thread; everything else belongs to the event loop."""

    def __init__(self, settings: Settings, threads: int = 1, preferred_device: str = "cpu") -> None:
        self.models: Mapping[str, Model] = {}
        self.draining = False
        self.loaded = False
        self.speaks = True  # for all workers: what they do alike is logged by one
        self.seen: frozenset[tuple[str, int, int]] = frozenset()  # the folder that was last prepared
        self.batchers: WeakKeyDictionary[Batcher, str] = WeakKeyDictionary()  # also of versions removed in a call
        self._settings = settings
        self._threads = threads
        self._preferred_device = preferred_device
        self._tried: dict[Key, Fingerprint] = {}
        self._doubts: dict[Key, str] = {}
        self._unloaded: frozenset[str] = frozenset()
        self._strays: list[str] = []
        self._told: list[str] = []
        self._written: set[ModelMetrics] = set()

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

    def get(self, name: str, version: str | None = None) -> LoadedVersion:
        """Return a served version, the latest when none is named.

        Raises:
            NotFoundError: no such model or version.
            UnavailableError: it exists and does not serve.
        """
        model = self.models.get(name)
        if model is None:
            if not self.loaded:
                raise UnavailableError("models are being loaded; try again in a moment")
            if name in self._unloaded:
                raise UnavailableError(
                    f"model '{name}' has been unloaded; `python -m service models load {name}` loads it"
                )
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

    def write_metrics(self) -> None:
        """Write the gauges of each version and what the counters have gathered; called a few times a second."""
        every = {loaded.metrics: loaded.batcher.rows for loaded in list_served(self.models).values()}
        for version_metrics, rows in every.items():
            version_metrics.write(rows)
        for gone in self._written - every.keys():  # no longer served
            gone.write(0)
        self._written = set(every)
        metrics.write_rest()

    def find_stuck(self, seconds: float) -> str:
        """Return the name of a model with a backend call that runs for longer than `seconds`, or ""."""
        return next((name for batcher, name in self.batchers.items() if batcher.running > seconds), "")

    def load(self, unloaded: Collection[str] = ()) -> None:
        """Load every version for the first time, but for the models in `unloaded`.

        Raises:
            StartError: no model can use the device asked for; see `check_settings` for what must be there.
        """
        change = self.prepare(unloaded)
        if change.unusable and not change.opened:
            raise change.unusable[0]
        self.commit(change)
        self.loaded = True

    def refresh(self, unloaded: Collection[str] = (), patient: bool = False) -> None:
        """Prepare and commit, where no other worker has a say."""
        self.commit(self.prepare(unloaded, patient))

    def prepare(self, unloaded: Collection[str] = (), patient: bool = False) -> Change:
        """Find out what is to be served, and verify and open what is new; what is served now stays as it is.

        Args:
            unloaded: models to treat as if they were not there.
            patient: what fails its checks may still be being copied; it is only refused if its files are the same at
                the next look. Without patience, what was refused before is tried again.

        Raises:
            OSError: the models folder is not there.
        """
        root = self._settings.models_dir
        seen = look(root)
        served = next(iter(list_served(self.models)), None)
        found = list_slots(root, self._settings.model_name, served)
        slots = [slot for slot in found if slot.name not in unloaded]
        settings = {name: self._read_settings(name) for name in {slot.name for slot in slots}}
        change = Change(settings, frozenset(slot.name for slot in found).intersection(unloaded))
        for slot in slots:
            chosen = settings[slot.name].chosen.versions
            if chosen is None or slot.version in chosen:
                self._prepare_version(slot, patient, change)
        self.seen, self._strays = seen, find_strays(root, seen)
        return change

    def _prepare_version(self, slot: Slot, patient: bool, change: Change) -> None:
        key = Key(slot.name, slot.version)
        is_same = self._tried.get(key) == slot.fingerprint
        change.wanted.add(key)
        change.tried[key] = slot.fingerprint
        if is_same and patient and key in self._doubts:  # nobody is copying it any more
            change.refused[key] = self._doubts[key]
            return
        model = self.models.get(slot.name)
        is_refused = key in self._doubts or (model is not None and str(slot.version) in model.refused)
        if is_same and (patient or not is_refused):
            return
        try:
            change.opened[key] = self._open(slot)
        except Exception as error:  # whatever is wrong with one version, the others are served
            if isinstance(error, StartError):
                change.unusable.append(error)
            reason = str(error)
            if not isinstance(error, ServiceError):
                logger.exception("model %s version %d could not be opened", *key)
                reason = f"it could not be opened ({type(error).__name__}); the log says more"
            (change.doubted if patient else change.refused)[key] = reason

    def _read_settings(self, name: str) -> ReadSettings:
        try:
            return ReadSettings(load_settings(self._settings.models_dir, name))
        except ModelRefusedError as error:
            model = self.models.get(name)
            return ReadSettings(model.settings if model else ModelSettings(), str(error))

    def _open(self, slot: Slot) -> LoadedVersion:
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
        rows = 1 if predictor.manifest.task == "tensors" else settings.max_batch_size  # tensors share no call
        cost = predictor.measure_cost(rows)
        figures = ModelMetrics(slot.name, slot.version)
        batcher = Batcher(predictor.predict, cost, rows, settings.queue_size, figures)
        return LoadedVersion(predictor, batcher, figures)

    def commit(self, change: Change, elsewhere: Failures = NO_FAILURES) -> None:
        """Serve what was prepared, all of it from one moment on.

        Requests that were accepted hold the version they need until they are answered.

        Args:
            change: what `prepare` returned.
            elsewhere: versions that failed their checks in another worker, with the reasons: none serves them then.
        """
        for key in [key for key in change.opened if key in elsewhere.refused or key in elsewhere.doubted]:
            del change.opened[key]
            if key in elsewhere.refused:
                change.refused[key] = elsewhere.refused[key]
            else:
                change.doubted[key] = elsewhere.doubted[key]
                del change.tried[key]  # it is opened again when the other's doubt is settled
        self.batchers |= {served.batcher: key.name for key, served in change.opened.items()}
        self._tried, self._doubts = change.tried, change.doubted
        before, self._unloaded = self.models, change.unloaded
        self.models = {model.name: model for model in self._build_models(change)}
        self._tell(before)

    def _tell_changes(self, before: Mapping[str, Model]) -> None:
        served, was_served = list_served(self.models), list_served(before)
        for key in sorted(was_served.keys() - served.keys()):
            logger.info("no longer serving %s version %d", *key)
        _log_served(one for key, one in served.items() if was_served.get(key) is not one)
        for name in sorted(self.models.keys() & before.keys()):
            now, then = (models[name].latest for models in (self.models, before))
            if now and then and now.manifest.version != then.manifest.version:
                numbers = now.manifest.version, then.manifest.version
                logger.info("the latest version of %s is now %d, not %d", name, *numbers)

    def tell_served(self) -> None:
        """Log every version that is served, and where it runs."""
        _log_served(list_served(self.models).values())

    def tell_strays(self) -> None:
        """Warn of folders that hold a model where none is looked for: once of each, as long as it stands there."""
        strays = self._strays
        for sentence in strays:
            if sentence not in self._told:
                logger.warning("%s", sentence)
        self._told = strays

    def _build_models(self, change: Change) -> Iterator[Model]:
        for name, settings in change.settings.items():
            old = self.models.get(name, Model(name))
            kept = {version: served for version, served in old.versions.items() if Key(name, version) in change.wanted}
            opened = {key.version: served for key, served in change.opened.items() if key.name == name}
            still = {
                version: reason
                for version, reason in old.refused.items()
                if version.isdigit() and Key(name, int(version)) in change.wanted and int(version) not in opened
            }
            refused = {str(key.version): reason for key, reason in change.refused.items() if key.name == name}
            pinned, versions = settings.chosen.latest, kept | opened
            if settings.problem:
                refused["settings"] = f"{settings.problem}; the settings before it stay in force"
            elif versions and pinned is not None and pinned not in versions:
                refused["settings"] = (
                    f"latest is {pinned}, which does not serve; the newest, {max(versions)}, stands in"
                )
            model = Model(name, versions, still | refused, settings.chosen)
            if model.versions or model.refused:  # else it is still being copied
                yield model

    def _tell(self, before: Mapping[str, Model]) -> None:
        """Note in log and figures what has changed."""
        metrics.set_serving(sum(bool(model.versions) for model in self.models.values()))
        served, was_served = list_served(self.models), list_served(before)
        if self.loaded and self.speaks:
            self._tell_changes(before)
        for key, one in was_served.items():
            if served.get(key) is not one:
                _note_served(one, False)
        for key, one in served.items():
            if was_served.get(key) is not one:
                _note_served(one, True)
        refused, was_refused = _list_refused(self.models), _list_refused(before)
        for name, version in was_refused.keys() - refused.keys():
            if version.isdigit():
                metrics.record_refused(name, version, False)
        for (name, version), reason in refused.items():
            if was_refused.get((name, version)) == reason:
                continue
            if not version.isdigit():
                logger.warning("settings of model %s: %s", name, reason)
                continue
            metrics.record_refused(name, version, True)
            goes_on = "; what was served before goes on" if self.models[name].versions else ""
            logger.error("model %s version %s is not served: %s%s", name, version, reason, goes_on)

    def _names(self) -> str:
        return ", ".join(sorted(self.models)) or "(none)"


def list_served(models: Mapping[str, Model]) -> dict[Key, LoadedVersion]:
    """Return every version that serves."""
    return {Key(model.name, key): served for model in models.values() for key, served in model.versions.items()}


def _list_refused(models: Mapping[str, Model]) -> dict[tuple[str, str], str]:
    return {(model.name, key): reason for model in models.values() for key, reason in model.refused.items()}


def _log_served(every: Iterable[LoadedVersion]) -> None:
    for served in sorted(every, key=lambda one: (one.manifest.name, one.manifest.version)):
        manifest, backend = served.manifest, served.predictor.backend
        where = backend.name, backend.device, backend.provider
        logger.info("serving %s version %d by %s on %s (%s)", manifest.name, manifest.version, *where)


def _note_served(served: LoadedVersion, serves: bool) -> None:
    manifest, backend = served.manifest, served.predictor.backend
    metrics.record_served(manifest.name, manifest.version, backend.name, backend.device, backend.provider, serves)


def check_settings(settings: Settings) -> None:
    """Refuse a models folder or a backend that is not there, before anything is started for it.

    Raises:
        StartError: the sentence says which setting to change.
    """
    folder = settings.models_dir
    if not folder.is_dir():
        wrong = "is a file, not a folder" if folder.exists() else "does not exist"
        raise StartError(f"models folder {folder} {wrong}; pass --models-dir")
    check_backend(settings.backend)


def give_back_memory() -> None:
    """Free what is only held in cycles, and have the C library return what graphs leave behind."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
