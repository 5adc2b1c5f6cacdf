"""Prepare a change of what is served: compare the models folder with what is loaded, verify and open what is new.

Preparing touches nothing that is being served, so it may run in a thread; `Registry.commit` then serves the change.
"""

import contextlib
import logging
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat

from service.errors import ModelRefusedError, ServiceError, StartError
from service.model.batching import Batcher
from service.model.channel import Fields, build_error
from service.model.checker import choose_rows
from service.model.cold import Budget, ColdBatcher, divide_budget
from service.model.cost import Cost
from service.model.manifest import digest
from service.model.openings import build_refusal, is_quarantined
from service.model.predictor import AnyPredictor, digest_manifest, load_any_predictor, load_named_manifest
from service.model.remote import EngineClient, Engines, RemoteBackend, RemotePredictor
from service.registry.model_folder import (
    Fingerprint,
    ModelSettings,
    Scan,
    VersionFolder,
    find_misplaced,
    list_versions,
    load_settings,
    scan,
)
from service.registry.versions import NO_FAILURES, FailedVersions, LoadedVersion, Model, VersionKey, list_served
from service.settings import Settings
from service.telemetry.metrics import ModelMetrics

logger = logging.getLogger("service")

CPU_ENGINE = "engine-cpu"  # the name of the process


@dataclass(frozen=True)
class Change:
    """What a preparation found, opened and refused.

    Attributes:
        scan: the models folder as it was.
        misplaced: a sentence for each model in the wrong place.
        unloaded: models that are in the folder but not to be served.
        settings: of every other model; the previous ones where the file is malformed.
        bad_settings: what is wrong with a model's settings file.
        wanted: versions that are to be served.
        fingerprints: of these, when they were last tried.
        opened: new versions, ready to be served.
        failed: versions that failed a check, now or before.
        retry_at: of these, which are tried again though their files stay the same, and when, by the monotonic clock.
        start_error: why a version cannot run on the backend or device asked for, if that was a reason to fail.
    """

    scan: Scan = frozenset()
    misplaced: tuple[str, ...] = ()
    unloaded: frozenset[str] = frozenset()
    settings: Mapping[str, ModelSettings] = field(default_factory=dict)
    bad_settings: Mapping[str, str] = field(default_factory=dict)
    wanted: frozenset[VersionKey] = frozenset()
    fingerprints: Mapping[VersionKey, Fingerprint] = field(default_factory=dict)
    opened: Mapping[VersionKey, LoadedVersion] = field(default_factory=dict)
    failed: FailedVersions = NO_FAILURES
    retry_at: Mapping[VersionKey, float] = field(default_factory=dict)
    start_error: StartError | None = None

    def exclude(self, failed: FailedVersions) -> "Change":
        """Return this change without the versions that failed in another worker, so that all serve the same."""
        refused = {key: reason for key, reason in failed.refused.items() if key in self.opened}
        pending = {key: reason for key, reason in failed.pending.items() if key in self.opened and key not in refused}
        return replace(
            self,
            opened={key: loaded for key, loaded in self.opened.items() if key not in refused and key not in pending},
            failed=FailedVersions({**self.failed.refused, **refused}, {**self.failed.pending, **pending}),
            # Without a fingerprint they are opened again: the other worker may have seen other files, half copied.
            fingerprints={key: known for key, known in self.fingerprints.items() if key not in refused | pending},
        )


class Loader:
    """Opens versions as the settings say.

    Args:
        settings: how to run.
        threads: CPU threads that one backend call may use.
        preferred_device: the accelerator that "auto" takes where there are several.
        engines: where versions are checked first, and where heavy ones run; without, all of that happens here.

    Raises:
        StartError: a memory budget is set where there are no engines.
    """

    def __init__(self, settings: Settings, threads: int, preferred_device: str, engines: Engines | None = None) -> None:
        self._settings = settings
        self._engines = engines
        self._threads = threads
        self._preferred_device = preferred_device
        if settings.memory_budget and engines is None:
            raise StartError("--memory-budget needs the processes of `python -m service serve`; do without it here")
        self._budget = Budget(ThreadPoolExecutor(1, "open")) if settings.memory_budget else None
        self._engine_share = 0  # of the budget, in bytes
        self._root: tuple[int, int] | None = None  # device and inode of the models folder when it had a version
        self._memory: dict[VersionKey, tuple[str, int]] = {}  # where each version runs, and bytes that it takes open

    def prepare(
        self, models: Mapping[str, Model], last: Change, unloaded: Collection[str] = (), debounce: bool = False
    ) -> Change:
        """Find what is to be served, and verify and open what is new.

        Args:
            models: what is served now.
            last: the change that was committed last.
            unloaded: models to leave out.
            debounce: a version that fails its checks may still be being copied; it is only refused if its files are
                the same at the next call. Without it, versions that were refused before are tried again; with it, only
                those that are due.

        Raises:
            OSError: the models folder cannot be read, or an empty one has taken its place.
        """
        root = self._settings.models_dir
        found = scan(root)
        folders = list_versions(root, self._settings.model_name, served=next(iter(list_served(models)), None))
        self._check_root(bool(folders))
        names = {folder.name for folder in folders}
        settings, bad_settings = self._load_settings(names.difference(unloaded), models)
        wanted = {
            VersionKey(folder.name, folder.version): folder
            for folder in folders
            if folder.name in settings and settings[folder.name].includes(folder.version)
        }
        unchanged = {key for key, folder in wanted.items() if last.fingerprints.get(key) == folder.fingerprint}
        # Pending at the last call and not touched since: nobody is copying them any more.
        complete = {key: reason for key, reason in last.failed.pending.items() if key in unchanged}
        refused = {key: models[key.name].refused[str(key.version)] for key in unchanged if _is_refused(key, models)}
        due = {key for key in refused if last.retry_at.get(key, math.inf) <= time.monotonic()}
        retried = due if debounce else {*complete, *refused}
        new = [folder for key, folder in wanted.items() if key not in unchanged - retried]
        self._memory = {key: memory for key, memory in self._memory.items() if key in wanted}
        opened, errors = self._open_all(new, settings, retried)
        reasons = {key: str(error) for key, error in errors.items()}
        kept = {key: reason for key, reason in (refused | complete).items() if key not in retried}
        retry_at = {key: at for key, at in last.retry_at.items() if key in kept}
        retry_at |= {key: at for key, error in errors.items() if (at := getattr(error, "retry_at", 0))}
        return Change(
            scan=found,
            misplaced=find_misplaced(root, found),
            unloaded=frozenset(names.intersection(unloaded)),
            settings=settings,
            bad_settings=bad_settings,
            wanted=frozenset(wanted),
            fingerprints={key: folder.fingerprint for key, folder in wanted.items()},
            opened=opened,
            failed=FailedVersions(kept, reasons) if debounce else FailedVersions(reasons, {}),
            retry_at=retry_at,
            start_error=next((error for error in errors.values() if isinstance(error, StartError)), None),
        )

    def _check_root(self, has_versions: bool) -> None:
        """Tell a folder that was emptied, whose models are then not to be served, from what an unmount leaves.

        Raises:
            OSError: the folder is another than before, and empty.
        """
        root: tuple[int, int] | None = None
        with contextlib.suppress(OSError):
            status = self._settings.models_dir.stat()
            root = status.st_dev, status.st_ino
        if has_versions:
            self._root = root
        elif self._root not in (None, root):
            raise OSError("an empty folder has taken its place, as after an unmount")

    def _load_settings(
        self, names: Collection[str], models: Mapping[str, Model]
    ) -> tuple[dict[str, ModelSettings], dict[str, str]]:
        """Return settings by model, and what is wrong with those whose previous settings are returned instead."""
        settings: dict[str, ModelSettings] = {}
        wrong: dict[str, str] = {}
        for name in names:
            try:
                settings[name] = load_settings(self._settings.models_dir, name)
            except ModelRefusedError as error:
                settings[name] = models[name].settings if name in models else ModelSettings()
                wrong[name] = str(error)
        return settings, wrong

    def _open_all(
        self, folders: Sequence[VersionFolder], settings: Mapping[str, ModelSettings], retried: Collection[VersionKey]
    ) -> tuple[dict[VersionKey, LoadedVersion], dict[VersionKey, ServiceError]]:
        """Verify, open and measure versions, in the checker first if there is one."""
        opened: dict[VersionKey, LoadedVersion] = {}
        errors: dict[VersionKey, ServiceError] = {}
        described = [self._describe(folder, settings[folder.name], retried) for folder in folders]
        answers: Iterable[Fields | None] = self._engines.checker.check(described) if self._engines else repeat(None)
        if self._budget is not None and self._engines is not None:  # what each gets depends on all
            answers = list(answers)
            self._divide_budget(folders, answers)
        for folder, fields, answer in zip(folders, described, answers, strict=False):
            key = VersionKey(folder.name, folder.version)
            try:
                if answer and self._engines:
                    opened[key] = self._place(folder, fields, answer, self._engines)
                else:
                    opened[key] = self.open_version(folder)
            except Exception as error:  # whatever is wrong with one version, the others are served
                errors[key] = build_refusal(error, *key)
        return opened, errors

    def _divide_budget(self, folders: Sequence[VersionFolder], answers: Sequence[Fields | None]) -> None:
        """Divide the memory budget between this worker, the others, and the engine, with new versions."""
        for folder, answer in zip(folders, answers, strict=True):
            if answer and "error" not in answer:
                self._memory[VersionKey(folder.name, folder.version)] = answer["place"], answer["memory"]
        inline, heavy = (
            sum(memory for place, memory in self._memory.values() if place == where) for where in ("inline", "engine")
        )
        assert self._budget is not None
        budget, workers = self._settings.memory_budget, max(1, self._settings.workers)
        self._budget.limit, self._engine_share = divide_budget(budget, workers, inline, heavy)

    def _describe(self, folder: VersionFolder, settings: ModelSettings, retried: Collection[VersionKey]) -> Fields:
        """Return what the checker and the engines are told of a version."""
        placement = settings.placement or self._settings.placement
        if self._engines is None or not self._engines.by_name:
            placement = "inline"
        return {
            "key": f"{folder.name}/{folder.version}/{placement}/{digest(repr(folder.fingerprint).encode())[:16]}",
            "name": folder.name,
            "version": folder.version,
            "path": str(folder.path.absolute()),
            "serve_as": folder.serve_as,
            "placement": placement,
            "threads": self._threads,
            "retry": VersionKey(folder.name, folder.version) in retried,
        }

    def _place(self, folder: VersionFolder, fields: Fields, answer: Fields, engines: Engines) -> LoadedVersion:
        """Open a version that the checker has checked on the CPU, here or in an engine, wherever it belongs.

        One that is not clearly inline runs where a row of its best batch takes fewer seconds. One that fails on the
        accelerator runs on the CPU, unless the accelerator was asked for by name.
        """
        is_asked_for = self._settings.device != "auto"
        if engines.accelerator and not is_quarantined(answer) and (is_asked_for or answer.get("place") != "inline"):
            rival = None if is_asked_for or "error" in answer else Cost(*answer["cost"]).per_row
            try:
                return self._open_in(engines.by_name[engines.accelerator], folder, fields | {"rival": rival})
            except ServiceError:  # which its engine has logged
                if is_asked_for:
                    raise
        if "error" in answer:
            raise build_error(answer["error"])
        if answer["place"] == "inline":
            return self._open_inline(folder, answer)
        known = {"cost": answer["cost"], "verified": answer["manifest"]}
        if self._budget is not None:
            known |= {"share": self._engine_share, "memory": answer["memory"], "backend": answer["backend"]}
        return self._open_in(engines.by_name[CPU_ENGINE], folder, fields | known)

    def _open_inline(self, folder: VersionFolder, answer: Fields) -> LoadedVersion:
        """Open a version here that the checker has checked; within a memory budget, if there is room."""
        cost, verified = Cost(*answer["cost"]), answer["manifest"]
        if self._budget is None:
            return self.open_version(folder, cost, verified)
        manifest = load_named_manifest(folder.path, folder.serve_as)
        if digest_manifest(manifest) != verified:
            raise ModelRefusedError("its manifest was replaced while it was opened")
        metrics = ModelMetrics(folder.name, folder.version, is_shown=False)

        def load() -> Batcher:
            metrics.show()
            return self._open_batcher(folder, metrics, cost, verified)[1]

        name, queue_size = f"{folder.name} version {folder.version}", self._settings.queue_size
        cold = ColdBatcher(name, answer["memory"], load, self._budget, queue_size, metrics)
        cold.open_now()
        return LoadedVersion(RemotePredictor(manifest, RemoteBackend(*answer["backend"])), cold, metrics)

    def _open_in(self, engine: EngineClient, folder: VersionFolder, fields: Fields) -> LoadedVersion:
        predictor, batcher = engine.open(load_named_manifest(folder.path, folder.serve_as), fields)
        return LoadedVersion(predictor, batcher, ModelMetrics(folder.name, folder.version))

    def open_version(self, folder: VersionFolder, cost: Cost | None = None, verified: str = "") -> LoadedVersion:
        """Verify, open and measure a version here.

        Args:
            folder: of the version.
            cost: of its calls, if the checker has measured it.
            verified: the digest of the manifest that the checker has verified, if it has.

        Raises:
            ModelRefusedError: it fails a check.
            StartError: it cannot run on the backend or device asked for.
        """
        metrics = ModelMetrics(folder.name, folder.version)
        predictor, batcher = self._open_batcher(folder, metrics, cost, verified)
        return LoadedVersion(predictor, batcher, metrics)

    def _open_batcher(
        self, folder: VersionFolder, metrics: ModelMetrics, cost: Cost | None, verified: str
    ) -> tuple[AnyPredictor, Batcher]:
        settings = self._settings
        predictor = load_any_predictor(
            folder.path,
            settings.backend,
            "cpu" if self._engines else settings.device,  # accelerators belong to engines
            self._threads,
            self._preferred_device,
            serve_as=folder.serve_as,
            tf32=settings.tf32,
            verified=verified,
            public_key=settings.require_signature,
        )
        rows = choose_rows(predictor.manifest, settings)
        cost = cost or predictor.measure_cost(rows)
        return predictor, Batcher(predictor.predict, cost, rows, settings.queue_size, metrics)


def _is_refused(key: VersionKey, models: Mapping[str, Model]) -> bool:
    return key.name in models and str(key.version) in models[key.name].refused
