"""A whole run publishes what serves as the net does; a failed one publishes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from service.manifest import Manifest, load_manifest
from service.predictor import load_predictor, worst_excess
from training import run as module
from training.errors import CheckError, DeviceError
from training.parity import build_batches
from training.publish import write_manifest
from training.recipes import RECIPES, Recipe
from training.run import Request, choose_device, run

FILES = {"manifest.json", "model.onnx", "model.pt"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trained_small(name: str, tmp_path: Path, mnist_dir: Path) -> None:
    """Every recipe, trained for one epoch, publishes both artifacts, its plots, and a manifest that says how."""
    recipe = RECIPES[name]
    folder = run(recipe, Request(tmp_path / "models", mnist_dir, seed=3, epochs=1))
    assert folder == tmp_path / "models" / name / "1"
    assert {path.name for path in folder.iterdir()} == FILES | set(recipe.plots)
    manifest = load_manifest(folder)
    assert manifest.training is not None
    assert (manifest.training.recipe, manifest.training.seed, manifest.training.epochs) == (name, 3, 1)
    assert {"train", "test"} <= set(manifest.training.data)
    assert {"torch", "onnxruntime"} <= set(manifest.training.libraries)
    assert manifest.golden is not None
    assert all(np.isfinite(figure) for figure in manifest.metrics.values())
    for plot in recipe.plots:
        with Image.open(folder / plot) as image:
            assert min(image.size) > 300
        assert (folder / plot).stat().st_size < 150_000
    onnx, torchscript = (load_predictor(folder, backend, "cpu") for backend in ("onnx", "torchscript"))
    for inputs in build_batches(manifest, seed=5):
        assert worst_excess(onnx.predict(inputs), torchscript.predict(inputs)) <= 0


def test_equal_runs_give_equal_artifacts(tmp_path: Path) -> None:
    """The same recipe and seed give the same bytes; another seed gives others."""
    requests = [Request(tmp_path / str(i), seed=seed, epochs=2) for i, seed in enumerate((0, 0, 1))]
    first, second, third = (load_manifest(run(RECIPES["linear"], request)).artifacts for request in requests)
    assert first == second
    assert all(first[name].sha256 != third[name].sha256 for name in first)


def test_versions_stand_side_by_side(tmp_path: Path) -> None:
    """A second run publishes version 2 and leaves version 1 as it was."""
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


def test_ranges_are_those_of_the_training_data() -> None:
    """Feature ranges hold every training point and are whole numbers."""
    recipe: Recipe = RECIPES["logistic-by-hand"]
    train = recipe.load(Path()).train
    described = module.add_ranges(recipe.input, train)
    assert described.kind == "tabular"
    for column, feature in enumerate(described.features):
        assert feature.minimum is not None
        assert feature.maximum is not None
        assert feature.minimum <= train.inputs[:, column].min() <= train.inputs[:, column].max() <= feature.maximum
        assert feature.minimum == int(feature.minimum)


def test_golden_rows_read_back_exactly() -> None:
    """Short decimal numbers, read as float32, are the inputs and outputs bit for bit."""
    array = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    assert np.array_equal(np.array(module._rows(array), dtype=np.float32), array)


@pytest.mark.parametrize("wanted", ["cuda:99", "abacus"])
def test_device_that_is_not_there(wanted: str) -> None:
    """An explicit device that cannot be used is refused by name."""
    with pytest.raises(DeviceError, match=wanted):
        choose_device(wanted, RECIPES["mnist"])


def test_auto_trains_small_recipes_on_the_cpu() -> None:
    """A recipe whose steps are tiny does not go to a GPU by itself; mnist does where there is one."""
    assert choose_device("auto", RECIPES["linear"]).type == "cpu"
    assert choose_device("auto", RECIPES["mnist"]).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("status", "head", "commit"),
    [("", "abc", "abc"), (" M training/run.py", "abc", None), (None, None, None), ("", None, None)],
)
def test_commit_is_that_of_the_code(
    status: str | None, head: str | None, commit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit is recorded only if it holds the code as it ran."""
    monkeypatch.setattr(module, "_git", lambda _, command, *__: status if command == "status" else head)
    assert module.find_commit() == commit
