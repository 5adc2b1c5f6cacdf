"""Tests of service.registry.registry."""

import errno
import gc
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ModelRefusedError, NotFoundError, StartError, UnavailableError
from service.model.backends import onnx_runtime
from service.model.batching import Batcher
from service.model.predictor import AnyPredictor, Predictor, load_any_predictor
from service.registry.changes import log_served
from service.registry.model_folder import SETTINGS_FILE
from service.registry.registry import Registry, check_settings
from service.registry.versions import NO_FAILURES, FailedVersions, VersionKey
from service.settings import Settings
from service.telemetry.metrics import ModelMetrics
from tests import fakes


@pytest.fixture
def loaded(empty_dir: Path, caplog: pytest.LogCaptureFixture) -> Registry:
    """Two versions of one model, one broken model, and things in the folder that are no models."""
    fakes.write_version(empty_dir, fakes.doubler())
    fakes.write_version(empty_dir, fakes.doubler(version=10, factor=3))
    folder = fakes.write_version(empty_dir, fakes.doubler(version=11))
    (folder / "model.onnx").write_bytes(b"truncated")
    fakes.write_version(empty_dir, fakes.liar())
    (empty_dir / "README.md").write_text("not a model")
    (empty_dir / "doubler" / "12").mkdir()  # without a manifest: it does not exist yet
    shutil.copytree(empty_dir / "doubler", empty_dir / ".staging-x")
    shutil.copytree(empty_dir / "doubler" / "1", empty_dir / "doubler" / "latest")
    with caplog.at_level(logging.ERROR, "service"):
        registry = Registry(Settings(models_dir=empty_dir, device="cpu"))
        registry.load()
    return registry


def load(root: Path) -> Registry:
    """Return a registry of a models folder."""
    registry = Registry(Settings(models_dir=root, device="cpu"))
    registry.load()
    return registry


def test_serves_every_good_version_and_says_why_not(loaded: Registry, caplog: pytest.LogCaptureFixture) -> None:
    """Good versions serve beside broken ones; each broken one has its reason, in the log too; the rest is ignored."""
    assert sorted(loaded.models) == ["doubler", "liar"]
    assert sorted(loaded.models["doubler"].versions) == [1, 10]
    assert loaded.models["doubler"].refused["11"].startswith("model.onnx has 9 bytes, the manifest says ")
    assert "misses a golden output" in loaded.models["liar"].refused["1"]
    log_served(loaded.models)
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("model liar version 1 is not served: its onnx graph") for line in lines)


def test_newest_is_by_number(loaded: Registry) -> None:
    """The newest version that serves is the largest number, not the last word: 10 after 1, and 11 is broken."""
    assert loaded.get("doubler").manifest.version == 10
    assert loaded.get("doubler", "1").manifest.version == 1
    predictor = loaded.get("doubler").predictor
    assert isinstance(predictor, Predictor)
    np.testing.assert_array_equal(predictor.predict(np.ones((1, 1), np.float32)), [[3]])


def test_unknown_is_not_found_and_broken_is_unavailable(loaded: Registry) -> None:
    """404 for what is not there, naming what is; 503 for what is there and does not serve, saying why."""
    with pytest.raises(NotFoundError, match="'nosuch' is not found; it is not one of doubler, liar"):
        loaded.get("nosuch")
    for version in ("2", "01", "x", "12", "1.0", "²"):
        with pytest.raises(NotFoundError, match=f"'doubler' has no version '{version}'; it has 1, 10"):
            loaded.get("doubler", version)
    with pytest.raises(UnavailableError, match=r"version 11 of model 'doubler' is not ready: model\.onnx has 9 bytes"):
        loaded.get("doubler", "11")
    with pytest.raises(UnavailableError, match="model 'liar' is not ready: its onnx graph"):
        loaded.get("liar")


def test_problem_names_models_without_a_version(loaded: Registry) -> None:
    """A model with a version that serves is no problem; one without is."""
    assert loaded.problem.startswith("liar: its onnx graph on cpu misses")


def test_problem_of_an_empty_folder(empty_dir: Path) -> None:
    """Nothing loaded yet, and nothing to load, are both named."""
    registry = Registry(Settings(models_dir=empty_dir))
    assert registry.problem == "models are being loaded"
    with pytest.raises(UnavailableError, match="being loaded"):
        registry.get("doubler")
    registry.load()
    assert registry.problem == f"there is no model in {empty_dir}"
    with pytest.raises(NotFoundError, match=r"not one of \(none\)"):
        registry.get("doubler")


def test_missing_folder_is_a_start_error(tmp_path: Path) -> None:
    """A models folder that does not exist stops the start with one line."""
    with pytest.raises(StartError, match=r"models folder .* does not exist; pass --models-dir"):
        check_settings(Settings(models_dir=tmp_path / "nosuch"))


def test_model_that_is_not_finite_at_zero_is_served(empty_dir: Path) -> None:
    """A graph like a logarithm, not finite for the zeros of the warm-up, is served and takes no other model down."""
    fakes.write_version(empty_dir, fakes.logarithm())
    fakes.write_version(empty_dir, fakes.doubler())
    registry = load(empty_dir)
    predictor = registry.get("logarithm").predictor
    assert isinstance(predictor, Predictor)
    np.testing.assert_array_equal(predictor.predict(np.ones((1, 1), np.float32)), [[0]])
    assert not registry.problem


def test_version_that_cannot_use_the_device_stops_no_other(empty_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version whose backend does not reach the device asked for is refused, also at a start; the others serve."""
    monkeypatch.setattr("service.model.backends.list_accelerators", lambda name: ["cuda:0"] if name == "onnx" else [])
    real = onnx_runtime.open_session
    monkeypatch.setattr(onnx_runtime, "open_session", lambda content, _, threads, tf32: real(content, "cpu", threads))
    settings = Settings(models_dir=empty_dir, device="cuda")
    fakes.write_version(empty_dir, fakes.coin().only("torchscript"))
    with pytest.raises(StartError, match="device cuda is not usable by the torchscript backend"):
        Registry(settings).load()
    fakes.write_version(empty_dir, fakes.doubler())
    registry = Registry(settings)
    registry.load()
    fakes.write_version(empty_dir, fakes.compass().only("torchscript"))
    fakes.write_version(empty_dir, fakes.doubler(version=2))
    for _ in range(2):
        registry.commit(registry.prepare(debounce=True))
    assert sorted(registry.models["doubler"].versions) == [1, 2]
    for name in ("coin", "compass"):
        assert f"{name}: device cuda is not usable by the torchscript backend here" in registry.problem


def test_version_that_fails_unexpectedly_stops_no_other(
    empty_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever opening a version raises, it is refused, with a stack in the log, and the others serve."""
    fakes.write_version(empty_dir, fakes.coin())
    fakes.write_version(empty_dir, fakes.doubler())

    def fail_for_coin(folder: Path, *arguments: Any, **more: Any) -> AnyPredictor:
        if folder.parent.name == "coin":
            raise MemoryError("no room")
        return load_any_predictor(folder, *arguments, **more)

    monkeypatch.setattr("service.registry.loading.load_any_predictor", fail_for_coin)
    registry = load(empty_dir)
    assert registry.get("doubler").manifest.version == 1
    assert registry.problem == "coin: it could not be opened (MemoryError); see the log"
    assert any(record.exc_info for record in caplog.records)


def test_routes_are_every_name_of_a_served_version(empty_dir: Path) -> None:
    """A version is found by its number and its labels, the latest without one; a commit replaces the whole mapping."""
    for version in (1, 2):
        fakes.write_version(empty_dir, fakes.doubler(version=version))
    fakes.write_version(empty_dir, fakes.liar())
    (empty_dir / "doubler" / SETTINGS_FILE).write_text('{"latest": 1, "labels": {"canary": 2, "old": 9}}')
    registry = load(empty_dir)
    routes = registry.routes
    assert {key: loaded.manifest.version for key, loaded in routes.items()} == {
        ("doubler", None): 1,
        ("doubler", "1"): 1,
        ("doubler", "2"): 2,
        ("doubler", "canary"): 2,
    }
    for (name, label), loaded in routes.items():
        assert registry.get(name, label) is loaded
    shutil.rmtree(empty_dir / "doubler" / "2")
    registry.commit(registry.prepare())
    assert registry.routes.keys() == {("doubler", None), ("doubler", "1")}
    assert len(routes) == 4
    with pytest.raises(NotFoundError, match="'doubler' has no version 2, which 'canary' names"):
        registry.get("doubler", "canary")


@pytest.mark.parametrize("own", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_version_that_a_worker_could_not_open_is_tried_again(
    own: Exception, empty_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files or too little memory of the process is not the version's fault."""
    fakes.write_version(empty_dir, fakes.doubler())

    def fail(*arguments: Any, **more: Any) -> AnyPredictor:
        raise ModelRefusedError("model.onnx cannot be read") from own

    with monkeypatch.context() as patch:
        patch.setattr("service.registry.loading.load_any_predictor", fail)
        registry = load(empty_dir)
        assert registry.problem == "doubler: model.onnx cannot be read"
        assert registry.retry_at > time.monotonic() + 1
        registry.commit(registry.prepare(debounce=True))  # not before
        assert registry.problem
    later = registry.retry_at
    monkeypatch.setattr("service.registry.loading.time.monotonic", lambda: later)
    registry.commit(registry.prepare(debounce=True))
    assert (registry.problem, registry.retry_at) == ("", math.inf)


def test_what_fails_elsewhere_is_left_out_of_a_change(empty_dir: Path) -> None:
    """A version that fails in another worker is not served here; the change itself stays as it is."""
    for version in (1, 2, 3):
        fakes.write_version(empty_dir, fakes.doubler(version=version))
    registry = Registry(Settings(models_dir=empty_dir, device="cpu"))
    change = registry.prepare()
    opened, fingerprints = dict(change.opened), dict(change.fingerprints)
    one, two, three = (VersionKey("doubler", version) for version in (1, 2, 3))
    unknown = VersionKey("coin", 1)
    reduced = change.exclude(FailedVersions({two: "broken", unknown: "broken"}, {three: "half there"}))
    assert (change.opened, change.fingerprints, change.failed) == (opened, fingerprints, NO_FAILURES)
    assert list(reduced.opened) == [one]
    assert reduced.failed == FailedVersions({two: "broken"}, {three: "half there"})
    registry.commit(reduced)
    assert sorted(registry.models["doubler"].versions) == [1]
    assert registry.models["doubler"].refused == {"2": "broken"}
    change = registry.prepare(debounce=True)  # complete for the other worker, too, which still refuses the second
    registry.commit(change.exclude(FailedVersions({two: "broken"}, {})))
    assert sorted(registry.models["doubler"].versions) == [1, 3]
    registry.commit(registry.prepare(debounce=True))  # it had seen other files
    assert sorted(registry.models["doubler"].versions) == [1, 2, 3]


def test_change_tells_what_is_still_refused(empty_dir: Path) -> None:
    """Other workers must know also later what a worker refuses, or they would serve it without that worker."""
    fakes.write_version(empty_dir, fakes.liar())
    registry = load(empty_dir)
    failed = registry.prepare(debounce=True).failed
    assert list(failed.refused) == [VersionKey("liar", 1)]
    assert not failed.pending


def test_removed_version_is_watched_until_its_last_call_ends(empty_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that runs on after its version is gone can be found, and is forgotten with its batcher."""
    folder = fakes.write_version(empty_dir, fakes.doubler())
    registry = load(empty_dir)
    batcher = registry.get("doubler").batcher
    shutil.rmtree(folder)
    registry.commit(registry.prepare())
    assert registry.find_stuck(5) == ""
    monkeypatch.setattr(Batcher, "running", 6.0)
    assert registry.find_stuck(5) == "doubler"
    del batcher
    gc.collect()
    assert registry.find_stuck(5) == ""


def test_metrics_of_a_removed_version_are_written_to_the_end(empty_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written while requests hold a version, served or not, and set to zero when it is freed."""
    written: list[int] = []
    monkeypatch.setattr(ModelMetrics, "write", lambda _, rows, backlog=0.0: written.append(rows))
    folder = fakes.write_version(empty_dir, fakes.doubler())
    registry = load(empty_dir)
    batcher = registry.get("doubler").batcher
    monkeypatch.setattr(Batcher, "rows", 3)
    registry.write_metrics()
    shutil.rmtree(folder)
    registry.commit(registry.prepare())
    registry.write_metrics()
    assert written == [3, 3]
    del batcher
    gc.collect()
    registry.write_metrics()
    registry.write_metrics()
    assert written == [3, 3, 0]
