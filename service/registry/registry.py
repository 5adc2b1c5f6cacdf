"""The registry: the models and versions that this worker serves.

A change is prepared beside what is served (verified, opened, measured) and then committed, so that all workers can
commit at the same moment. A version that fails a check is never served, and one that is replaced answers the requests
it has accepted and is freed after the last of them.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

from service.errors import NotFoundError, StartError, UnavailableError
from service.model.backends import check_backend
from service.model.remote import Engines
from service.model.signature import check_public_key
from service.registry.changes import record_changes
from service.registry.loading import Change, Loader
from service.registry.model_folder import Scan
from service.registry.versions import AnyBatcher, LoadedVersion, Model, list_served
from service.settings import Settings
from service.telemetry.metrics import ModelMetrics


class Registry:
    """What is served, by name and version. `prepare` may run in a thread; the rest belongs to the event loop.

    Args:
        settings: how to run.
        threads: CPU threads that one backend call may use.
        preferred_device: the accelerator that "auto" takes where there are several.
        engines: where versions are checked first, and where heavy ones run; without, all of that happens here.

    Attributes:
        models: every model that has a version or a reason for having none, by name.
        routes: every served version by model name and what a request may call it: its number, a label of the model's
            settings, or None for the latest.
    """

    def __init__(
        self,
        settings: Settings,
        threads: int = 1,
        preferred_device: str = "cpu",
        engines: Engines | None = None,
    ) -> None:
        self.models: Mapping[str, Model] = {}
        self.routes: Mapping[tuple[str, str | None], LoadedVersion] = {}
        self.loader = Loader(settings, threads, preferred_device, engines)
        self._models_dir = settings.models_dir
        self._is_loaded = False
        self._committed = Change()
        # Of every version that was ever served, until its last call has ended.
        self._batchers: WeakKeyDictionary[AnyBatcher, tuple[str, ModelMetrics]] = WeakKeyDictionary()
        self._written: set[ModelMetrics] = set()

    @property
    def problem(self) -> str:
        """Why the models are not ready; empty when every model that should be served is."""
        if not self._is_loaded:
            return "models are being loaded"
        models = list(self.models.values())
        if not models:
            return f"there is no model in {self._models_dir}"
        problems = {model.name: model.latest.problem if model.latest else model.reason for model in models}
        return "; ".join(f"{name}: {problem}" for name, problem in problems.items() if problem)

    @property
    def cold(self) -> int:
        """How many versions are only opened when they are asked for."""
        return sum(loaded.is_cold for loaded in list_served(self.models).values())

    @property
    def scan(self) -> Scan:
        """The models folder as it was for the change committed last."""
        return self._committed.scan

    @property
    def misplaced(self) -> tuple[str, ...]:
        """A sentence for each model that is in the wrong place in the models folder."""
        return self._committed.misplaced

    @property
    def retry_at(self) -> float:
        """When, by the monotonic clock, a version is to be tried again though nothing in the folder has changed."""
        return min(self._committed.retry_at.values(), default=math.inf)

    def get(self, name: str, version: str | None = None) -> LoadedVersion:
        """Return a served version by its number or label, the latest when none is named.

        Raises:
            NotFoundError: no such model or version.
            UnavailableError: it exists and is not served.
        """
        loaded = self.routes.get((name, version))
        if loaded is not None:
            return loaded
        model = self.models.get(name)
        if model is None:
            raise self._explain_missing_model(name)
        if version is None:
            raise UnavailableError(f"model '{name}' is not ready: {model.reason}")
        raise _explain_missing_version(model, version)

    def _explain_missing_model(self, name: str) -> NotFoundError | UnavailableError:
        if not self._is_loaded:
            return UnavailableError("models are being loaded; try again in a moment")
        if name in self._committed.unloaded:
            return UnavailableError(
                f"model '{name}' has been unloaded; `python -m service models load {name}` loads it"
            )
        known = ", ".join(sorted(self.models)) or "(none)"
        return NotFoundError(f"Request for unknown model: '{name}' is not found; it is not one of {known}")

    def load(self, unloaded: Collection[str] = ()) -> None:
        """Load every version for the first time, except of the models in `unloaded`.

        Raises:
            StartError: no version can run on the backend or device asked for.
            OSError: the models folder cannot be read.
        """
        change = self.prepare(unloaded)
        if change.start_error and not change.opened:
            raise change.start_error
        self.commit(change)
        self._is_loaded = True

    def prepare(self, unloaded: Collection[str] = (), debounce: bool = False) -> Change:
        """Prepare what to serve from now on; see `Loader.prepare`."""
        return self.loader.prepare(self.models, self._committed, unloaded, debounce)

    def commit(self, change: Change) -> None:
        """Serve what was prepared, all of it from one moment on; requests in flight keep the version they have."""
        before, self.models = self.models, {model.name: model for model in _build_models(change, self.models)}
        self.routes = dict(_build_routes(self.models))
        self._batchers |= {loaded.batcher: (key.name, loaded.metrics) for key, loaded in change.opened.items()}
        self._committed = replace(change, opened={})  # versions removed later must not be kept alive here
        record_changes(before, self.models)

    def write_metrics(self) -> None:
        """Write each version's gauges and what its counters have gathered; called a few times a second."""
        written = set()
        for batcher, (_, metrics) in self._batchers.items():
            metrics.write(batcher.rows, batcher.backlog)
            written.add(metrics)
        for gone in self._written - written:
            gone.write(0)
        self._written = written

    def find_stuck(self, seconds: float) -> str:
        """Return the name of a model with a backend call that has run for longer than `seconds`, or ""."""
        return next((name for batcher, (name, _) in self._batchers.items() if batcher.running > seconds), "")


def _explain_missing_version(model: Model, version: str) -> NotFoundError | UnavailableError:
    number = str(model.settings.labels.get(version, version))
    if number in model.refused:
        return UnavailableError(f"version {number} of model '{model.name}' is not ready: {model.refused[number]}")
    has_no = f"Request for unknown model: '{model.name}' has no version"
    if number != version:
        return NotFoundError(f"{has_no} {number}, which {version!r} names")
    known = ", ".join(map(str, [*sorted(model.versions), *model.settings.labels])) or "none"
    return NotFoundError(f"{has_no} '{version[:40]}'; it has {known}")


def _build_models(change: Change, before: Mapping[str, Model]) -> Iterator[Model]:
    """Yield what is to be served of each model: what a change opened, and what it leaves as it was before."""
    for name, settings in change.settings.items():
        old = before.get(name, Model(name))
        wanted = {key.version for key in change.wanted if key.name == name}
        opened = {key.version: loaded for key, loaded in change.opened.items() if key.name == name}
        versions = {version: loaded for version, loaded in old.versions.items() if version in wanted} | opened
        refused = {
            version: reason
            for version, reason in old.refused.items()
            if version.isdigit() and int(version) in wanted - opened.keys()
        }
        refused |= {str(key.version): reason for key, reason in change.failed.refused.items() if key.name == name}
        if name in change.bad_settings:
            refused["settings"] = f"{change.bad_settings[name]}; keeping the previous settings"
        elif versions and settings.latest is not None and settings.latest not in versions:
            refused["settings"] = f"latest is {settings.latest}, which is not served; using the newest, {max(versions)}"
        if versions or refused:  # else all its versions are still being copied
            yield Model(name, versions, refused, settings)


def _build_routes(models: Mapping[str, Model]) -> Iterator[tuple[tuple[str, str | None], LoadedVersion]]:
    for name, model in models.items():
        if model.latest:
            yield (name, None), model.latest
        for label, version in model.settings.labels.items():
            if version in model.versions:
                yield (name, label), model.versions[version]
        for version, loaded in model.versions.items():
            yield (name, str(version)), loaded


def check_settings(settings: Settings) -> None:
    """Refuse a models folder or a backend that is missing, before anything is started for it.

    Raises:
        StartError: the sentence says which setting to change.
    """
    folder = settings.models_dir
    if not folder.is_dir():
        wrong = "is a file, not a folder" if folder.exists() else "does not exist"
        raise StartError(f"models folder {folder} {wrong}; pass --models-dir")
    check_backend(settings.backend)
    if settings.require_signature:
        check_public_key(Path(settings.require_signature))
