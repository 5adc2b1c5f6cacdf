"""Models and versions as values: what serves, what has failed its checks, and what is about to change."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from service.errors import StartError
from service.model.batching import Batcher
from service.model.manifest import AnyManifest
from service.model.predictor import AnyPredictor
from service.registry.model_folder import Fingerprint, ModelSettings
from service.telemetry.metrics import ModelMetrics


@dataclass(frozen=True)
class LoadedVersion:
    """One version that serves: the predictor, and the queue in front of it."""

    predictor: AnyPredictor
    batcher: Batcher
    metrics: ModelMetrics

    @property
    def manifest(self) -> AnyManifest:
        """The version's manifest."""
        return self.predictor.manifest


@dataclass(frozen=True)
class Model:
    """All versions of one name: those that serve, and why others do not."""

    name: str
    versions: Mapping[int, LoadedVersion] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    settings: ModelSettings = field(default_factory=ModelSettings)

    @property
    def latest(self) -> LoadedVersion | None:
        """The version of paths that name none: the one its settings pin if that serves, else the newest that serves."""
        pinned = self.versions.get(self.settings.latest or 0)
        return pinned or (self.versions[max(self.versions)] if self.versions else None)

    @property
    def reason(self) -> str:
        """Why no version serves."""
        return next(reversed(list(self.refused.values())), "it has no version")

    def find(self, version: str) -> LoadedVersion | None:
        """Return a served version by its number or by a label of the model's settings."""
        number = self.settings.labels.get(version)
        return next((served for key, served in self.versions.items() if str(key) == version or key == number), None)


class Key(NamedTuple):
    """A model's name and a version's number."""

    name: str
    version: int


class Failures(NamedTuple):
    """Versions that failed their checks: for good, and those that may still be being copied."""

    refused: Mapping[Key, str]
    doubted: Mapping[Key, str]


NO_FAILURES = Failures({}, {})


class ReadSettings(NamedTuple):
    """A model's settings, those before if the file is malformed, and why it is."""

    chosen: ModelSettings
    problem: str = ""


@dataclass(frozen=True)
class Change:
    """What `Registry.prepare` found and opened, and `Registry.commit` puts in place."""

    settings: Mapping[str, ReadSettings]
    unloaded: frozenset[str] = frozenset()
    wanted: set[Key] = field(default_factory=set)
    tried: dict[Key, Fingerprint] = field(default_factory=dict)
    opened: dict[Key, LoadedVersion] = field(default_factory=dict)
    refused: dict[Key, str] = field(default_factory=dict)
    doubted: dict[Key, str] = field(default_factory=dict)
    unusable: list[StartError] = field(default_factory=list)  # why some could not use the device asked for
