"""A quantized graph is smaller and nearly as accurate, or it is left out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from service.model.manifest import BackendName
from service.model.predictor import Predictor
from training import data, mnist
from training import quantize as module
from training.data import Splits
from training.describe import build_manifest
from training.evaluate import predict
from training.export import export
from training.nets import ServingNet
from training.parity import open_predictors
from training.quantize import quantize
from training.recipes import RECIPES
from training.robustness import measure_accuracy
from training.trainer import Settings


@pytest.fixture(scope="module")
def splits(mnist_dir: Path) -> Splits:
    """A few real digits."""
    return data.load_digits(mnist_dir)


@pytest.fixture(scope="module")
def trained(splits: Splits) -> tuple[dict[BackendName, bytes], Predictor]:
    """Artifacts of the tutorial's net after four epochs, and a predictor of the ONNX one."""
    torch.manual_seed(0)
    fitted = mnist.fit_mnist(splits, Settings(4, torch.device("cpu")))
    serving = ServingNet(fitted.net, "multiclass").eval()
    contents = export(serving, (784,))
    manifest = build_manifest(RECIPES["mnist"], 1, splits, contents, serving)
    return contents, open_predictors(manifest, contents)["onnx"]


def test_quantized_graph(
    trained: tuple[dict[BackendName, bytes], Predictor], splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a quarter of the bytes, equal each time, similar probabilities, and an entry in the manifest."""
    contents, plain = trained
    monkeypatch.setattr(module, "MAX_ACCURACY_DROP", 0.01)  # of 333 pictures one is 0.3 %
    first, second = (quantize(contents["onnx"], plain, splits) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.content == second.content
    assert len(first.content) < 0.3 * len(contents["onnx"])
    assert b"/tmp" not in first.content
    artifact = first.predictor.manifest.artifacts["onnx-int8"]
    assert artifact.bytes == len(first.content)
    assert artifact.tolerance is not None
    assert artifact.tolerance >= 0.02
    apart = np.abs(predict(first.predictor, splits.test) - predict(plain, splits.test))
    assert np.mean(apart.max(axis=1)) < 0.02
    assert abs(measure_accuracy(first.predictor, splits.test) - measure_accuracy(plain, splits.test)) <= 0.01


def test_graph_that_loses_too_much_is_left_out(
    trained: tuple[dict[BackendName, bytes], Predictor], splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out if it loses more than allowed, or if there is no validation split to measure that."""
    contents, plain = trained
    for limit in ("MAX_ACCURACY_DROP", "MAX_LOSS_RISE"):
        with monkeypatch.context() as patched:
            patched.setattr(module, "MAX_ACCURACY_DROP", 1.0)
            patched.setattr(module, limit, -1.0)
            assert quantize(contents["onnx"], plain, splits) is None
    assert quantize(contents["onnx"], plain, Splits(splits.train, splits.test)) is None
