"""Models and their versions as values: those that are served, and those that failed their checks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from service.model.batching import Batcher
from service.model.cold import ColdBatcher
from service.model.manifest import AnyManifest
from service.model.predictor import AnyPredictor
from service.model.remote import RemoteBatcher, RemotePredictor
from service.registry.model_folder import ModelSettings
from service.telemetry.metrics import ModelMetrics

AnyBatcher = Batcher | ColdBatcher | RemoteBatcher


class VersionKey(NamedTuple):
    """A model's name and a version's number."""

    name: str
    version: int


@dataclass(frozen=True)
class LoadedVersion:
    """A version that can answer requests: its predictor, and the queue in front of it."""

    predictor: AnyPredictor | RemotePredictor
    batcher: AnyBatcher
    metrics: ModelMetrics

    @property
    def manifest(self) -> AnyManifest:
        """The version's manifest."""
        return self.predictor.manifest

    @property
    def placement(self) -> str:
        """Where it runs: "inline", in this worker, or "engine"."""
        return "engine" if isinstance(self.batcher, RemoteBatcher) else "inline"

    @property
    def problem(self) -> str:
        """Why it cannot answer now, or nothing."""
        if isinstance(self.batcher, RemoteBatcher):
            return self.batcher.problem or self.batcher.refusal
        return self.batcher.problem if isinstance(self.batcher, ColdBatcher) else ""

    @property
    def is_cold(self) -> bool:
        """Whether it is only opened when it is asked for."""
        return not isinstance(self.batcher, Batcher) and self.batcher.is_cold


@dataclass(frozen=True)
class Model:
    """All versions of one name: those that are served, and why others are refused.

    `refused` maps a version's number to the reason, and "settings" to what is wrong with the model's settings.
    """

    name: str
    versions: Mapping[int, LoadedVersion] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    settings: ModelSettings = field(default_factory=ModelSettings)

    @property
    def latest(self) -> LoadedVersion | None:
        """The version for paths that name none: the one its settings pin if that is served, else the newest served."""
        pinned = self.versions.get(self.settings.latest or 0)
        return pinned or (self.versions[max(self.versions)] if self.versions else None)

    @property
    def reason(self) -> str:
        """Why no version is served."""
        return next(reversed(list(self.refused.values())), "it has no version")


def list_served(models: Mapping[str, Model]) -> dict[VersionKey, LoadedVersion]:
    """Return every version that is served."""
    return {
        VersionKey(model.name, version): loaded
        for model in models.values()
        for version, loaded in model.versions.items()
    }


class FailedVersions(NamedTuple):
    """Versions that failed a check, with the reasons.

    `refused` ones are not served until their files change or a load is asked for. `pending` ones may still be being
    copied: they are tried again when their files change, and refused once those stay the same.
    """

    refused: Mapping[VersionKey, str]
    pending: Mapping[VersionKey, str]


NO_FAILURES = FailedVersions({}, {})
