"""Say what a commit changed: in the metrics of each worker, and in the log, where one worker says it for all."""

import logging
from collections.abc import Mapping

from service.registry.versions import LoadedVersion, Model, VersionKey, list_served
from service.telemetry import metrics

logger = logging.getLogger("service")
Models = Mapping[str, Model]


def log_served(models: Models) -> None:
    """Log every version that is served, and where it runs, or that is refused, and why."""
    _log_refusals({}, models)
    _log_served(list_served(models))


def log_changes(before: Models, after: Models) -> None:
    """Log which versions are newly served or refused, which no longer are, and which latest versions are others."""
    _log_refusals(before, after)
    was_served, served = list_served(before), list_served(after)
    for key in sorted(was_served.keys() - served.keys()):
        logger.info("no longer serving %s version %d", *key)
    _log_served({key: loaded for key, loaded in served.items() if was_served.get(key) is not loaded})
    for name in sorted(after.keys() & before.keys()):
        now, then = after[name].latest, before[name].latest
        if now and then and now.manifest.version != then.manifest.version:
            versions = now.manifest.version, then.manifest.version
            logger.info("the latest version of %s is now %d, not %d", name, *versions)


def _log_refusals(before: Models, after: Models) -> None:
    """Log which versions and settings are newly refused, and why."""
    was_refused = _list_refused(before)
    for (name, version), reason in _list_refused(after).items():
        if was_refused.get((name, version)) == reason:
            continue
        if not version.isdigit():
            logger.warning("settings of model %s: %s", name, reason)
            continue
        consequence = "; keeping the loaded versions" if after[name].versions else ""
        logger.error("model %s version %s is not served: %s%s", name, version, reason, consequence)


def record_changes(before: Models, after: Models) -> None:
    """Write to the metrics which versions this worker serves and refuses."""
    metrics.set_serving(sum(bool(model.versions) for model in after.values()))
    was_served, served = list_served(before), list_served(after)
    for key, loaded in was_served.items():
        if served.get(key) is not loaded:
            _record_served(loaded, False)
    for key, loaded in served.items():
        if was_served.get(key) is not loaded:
            _record_served(loaded, True)
    was_refused, refused = (_list_refused(models).keys() for models in (before, after))
    for name, version in was_refused ^ refused:
        if version.isdigit():
            metrics.record_refused(name, version, (name, version) in refused)


def _list_refused(models: Models) -> dict[tuple[str, str], str]:
    return {(model.name, version): reason for model in models.values() for version, reason in model.refused.items()}


def _log_served(served: Mapping[VersionKey, LoadedVersion]) -> None:
    for key, loaded in sorted(served.items()):
        backend = loaded.predictor.backend
        where = backend.name, backend.device, backend.provider
        logger.info("serving %s version %d by %s on %s (%s)", *key, *where)


def _record_served(loaded: LoadedVersion, is_served: bool) -> None:
    manifest, backend = loaded.manifest, loaded.predictor.backend
    where = backend.name, backend.device, backend.provider
    metrics.record_served(manifest.name, manifest.version, *where, is_served)
