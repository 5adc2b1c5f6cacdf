"""A run publishes artifacts that agree; a failed run publishes nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from service.model.manifest import Manifest
from service.model.predictor import load_predictor, worst_excess
from service.model.version_folder import load_manifest
from training import run as module
from training.errors import CheckError, DeviceError
from training.parity import build_batches
from training.publish import write_manifest
from training.recipes import RECIPES
from training.run import Request, choose_device, find_checkpoint, run
from training.trainer import Trainer


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trained_small(name: str, tmp_path: Path, mnist_dir: Path) -> None:
    """Every recipe, trained for one epoch, publishes both artifacts, plots, a card and a complete manifest."""
    recipe = RECIPES[name]
    folder = run(recipe, Request(tmp_path / "models", mnist_dir, seeds=(3,), epochs=1))
    assert folder == tmp_path / "models" / name / "1"
    manifest = load_manifest(folder)
    artifacts = {artifact.file for artifact in manifest.artifacts.values()}
    assert {"model.onnx", "model.pt"} <= artifacts
    assert {path.name for path in folder.iterdir()} == {"README.md", "manifest.json", "golden.npz"} | artifacts | set(
        recipe.plots
    )
    assert manifest.training is not None
    assert (manifest.training.recipe, manifest.training.seed, manifest.training.epochs) == (name, 3, 1)
    assert {"train", "test"} <= set(manifest.training.data)
    assert {"torch", "onnxruntime"} <= set(manifest.training.libraries)
    assert manifest.golden_rows is not None
    assert all(np.isfinite(figure) for figure in manifest.metrics.values())
    for plot in recipe.plots:
        with Image.open(folder / plot) as image:
            assert min(image.size) > 300
        assert (folder / plot).stat().st_size < 250_000
    onnx, torchscript = (load_predictor(folder, backend, "cpu") for backend in ("onnx", "torchscript"))
    for inputs in build_batches(manifest, seed=5):
        assert worst_excess(onnx.predict(inputs), torchscript.predict(inputs)) <= 0


def test_equal_runs_give_equal_artifacts(tmp_path: Path) -> None:
    """The same recipe and seed give the same bytes; another seed gives others."""
    requests = [Request(tmp_path / str(i), seeds=(seed,), epochs=2) for i, seed in enumerate((0, 0, 1))]
    first, second, third = (load_manifest(run(RECIPES["linear"], request)).artifacts for request in requests)
    assert first == second
    assert all(first[name].sha256 != third[name].sha256 for name in first)


def test_several_seeds(tmp_path: Path) -> None:
    """With several seeds the metrics have a mean with its interval, and the card a row per seed."""
    folder = run(RECIPES["linear"], Request(tmp_path, seeds=(0, 1, 2), epochs=2))
    metrics = load_manifest(folder).metrics
    assert metrics["mse_low"] < metrics["mse_mean"] < metrics["mse_high"]
    card = (folder / "README.md").read_text()
    assert "| 0, published |" in card
    assert "| 2 |" in card


def test_versions_stand_side_by_side(tmp_path: Path) -> None:
    """A second run publishes version 2 and leaves version 1 unchanged."""
    request = Request(tmp_path, epochs=1)
    first = run(RECIPES["logistic-hours"], request)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    assert run(RECIPES["logistic-hours"], request).name == "2"
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


def test_failed_check_as_served_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A staged version that the service would refuse is removed."""

    def write_and_spoil(folder: Path, manifest: Manifest) -> None:
        write_manifest(folder, manifest)
        content = bytearray((folder / "model.onnx").read_bytes())
        content[-1] ^= 1
        (folder / "model.onnx").write_bytes(content)

    monkeypatch.setattr(module, "write_manifest", write_and_spoil)
    with pytest.raises(CheckError, match="would refuse"):
        run(RECIPES["logistic-hours"], Request(tmp_path / "models", epochs=1))
    assert list((tmp_path / "models").iterdir()) == []


def test_checkpoint_is_removed_once_published(tmp_path: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished fit keeps its state until it is published: a later failure costs no second fit."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "MNIST").symlink_to(mnist_dir / "MNIST")
    request = Request(tmp_path / "models", data_dir, epochs=1)
    monkeypatch.setattr(module, "build_draft", lambda *_: (_ for _ in ()).throw(CheckError("no")))
    with pytest.raises(CheckError):
        run(RECIPES["mnist-mlp-best"], request)
    (state,) = (data_dir / ".checkpoints").iterdir()
    monkeypatch.undo()
    monkeypatch.delattr(Trainer, "run_epoch")
    run(RECIPES["mnist-mlp-best"], request)
    assert not state.exists()


def test_trial_has_its_own_checkpoint(tmp_path: Path) -> None:
    """A fit with fewer epochs has another checkpoint file."""
    recipe, request = RECIPES["mnist-cnn"], Request(data_dir=tmp_path)
    whole = find_checkpoint(recipe, 0, request)
    assert whole == find_checkpoint(recipe, 0, replace(request, epochs=recipe.epochs))
    assert whole != find_checkpoint(recipe, 0, replace(request, epochs=1))


@pytest.mark.parametrize("wanted", ["cuda:99", "abacus"])
def test_missing_device_is_refused(wanted: str) -> None:
    """An explicit device that cannot be used is refused by name."""
    with pytest.raises(DeviceError, match=wanted):
        choose_device(wanted, RECIPES["mnist"])


def test_auto_trains_small_recipes_on_the_cpu() -> None:
    """Recipes with tiny steps train on the CPU by default; mnist uses a GPU if there is one."""
    assert choose_device("auto", RECIPES["linear"]).type == "cpu"
    assert choose_device("auto", RECIPES["mnist"]).type == ("cuda" if torch.cuda.is_available() else "cpu")
