"""Metrics follow their formulas, and are measured through the artifacts."""

import math

import numpy as np
import pytest
import torch

from service.model.backends import Array
from service.model.manifest import Manifest, Task
from service.model.predictor import Predictor
from training.data import Split, Splits, load_half_plane, load_hours, load_line
from training.errors import CheckError
from training.evaluate import best_epoch, evaluate, measure_direction, measure_hours, measure_line
from training.nets import linear_net
from training.progress import Epoch
from training.recipes import RECIPES
from training.trainer import Fitted


class FixedBackend:
    """Returns fixed outputs."""

    device = "cpu"
    provider = "fixed"

    def __init__(self, name: str, outputs: Array) -> None:
        self.name = name
        self._outputs = outputs

    def run(self, inputs: Array) -> Array:
        """Return the fixed outputs."""
        return self._outputs[: len(inputs)]


def build_predictor(task: Task, outputs: list[list[float]], name: str = "onnx") -> Predictor:
    """Return a predictor of a manifest of this task over a fixed backend."""
    recipe = RECIPES[{"regression": "linear", "binary": "logistic-hours", "multiclass": "mnist"}[task]]
    artifacts = {"onnx": {"file": "model.onnx", "sha256": "0" * 64, "bytes": 1}}
    fields = {"name": "fixed", "version": 1, "task": task, "input": recipe.input.model_dump(), "artifacts": artifacts}
    manifest = Manifest.model_validate(fields | {"output": recipe.output.model_dump()})
    return Predictor(manifest, FixedBackend(name, np.array(outputs, dtype=np.float32)))  # type: ignore[arg-type]


def test_binary_figures() -> None:
    """Accuracy counts 0.5 as positive; loss, Brier score and AUC follow their formulas."""
    predictor = build_predictor("binary", [[0.9], [0.5], [0.2], [0.6]])
    split = Split(torch.zeros(4, 1), torch.tensor([[1.0], [1.0], [0.0], [0.0]]))
    figures = evaluate({"onnx": predictor}, split)
    assert figures["accuracy"] == 0.75
    expected = -np.mean([math.log(0.9), math.log(0.5), math.log(0.8), math.log(0.4)])
    assert figures["loss"] == pytest.approx(expected, abs=1e-6)
    assert figures["brier"] == pytest.approx((0.01 + 0.25 + 0.04 + 0.36) / 4, abs=1e-6)
    assert figures["auc"] == 0.75


def test_multiclass_figures() -> None:
    """Accuracy is of the largest probability; a probability of 0 for the truth keeps the loss finite."""
    rows = [[0.0] * 10, [0.0] * 10]
    rows[0][3], rows[1][4] = 1.0, 1.0
    figures = evaluate(
        {"onnx": build_predictor("multiclass", rows)},
        Split(torch.zeros(2, 784, dtype=torch.uint8), torch.tensor([3, 5])),
    )
    assert figures["accuracy"] == 0.5
    assert math.isfinite(figures["loss"])


def test_regression_figures() -> None:
    """The errors are squared and averaged; R² of a perfect fit is 1."""
    targets = torch.tensor([[1.0], [3.0]])
    split = Split(torch.zeros(2, 1), targets)
    assert evaluate({"onnx": build_predictor("regression", [[1.0], [3.0]])}, split) == {"mse": 0, "rmse": 0, "r2": 1}
    off = evaluate({"onnx": build_predictor("regression", [[2.0], [5.0]])}, split)
    assert off["mse"] == 2.5
    assert off["rmse"] == pytest.approx(2.5**0.5)


def test_backends_that_disagree_on_a_label() -> None:
    """One label on which the backends differ fails the run."""
    split = Split(torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]))
    predictors = {
        "onnx": build_predictor("binary", [[0.6], [0.1]]),
        "torchscript": build_predictor("binary", [[0.4], [0.1]], "torchscript"),
    }
    with pytest.raises(CheckError, match="different labels"):
        evaluate(predictors, split)  # type: ignore[arg-type]


def test_true_parameters_measure_as_true() -> None:
    """The true normal has cosine 1 with itself and misses no training point; its opposite has cosine −1."""
    net = linear_net(torch.tensor([1.0, -3.0]), torch.zeros(1))
    assert measure_direction(Fitted(net, []), load_half_plane()) == pytest.approx(
        {"direction_cosine": 1.0, "training_accuracy": 1.0}
    )
    turned = linear_net(torch.tensor([-1.0, 3.0]), torch.zeros(1))
    assert measure_direction(Fitted(turned, []), load_half_plane())["direction_cosine"] == pytest.approx(-1)


def test_hours_from_zero_parameters() -> None:
    """A net of zeros has a loss of 3·log 2 on three students and a probability of 0.5 at 4 hours."""
    net = linear_net(torch.tensor([1e-9]), torch.zeros(1))
    figures = measure_hours(Fitted(net, []), load_hours())
    assert figures["summed_loss"] == pytest.approx(3 * math.log(2))
    assert figures["probability_at_4_hours"] == pytest.approx(0.5)


def test_closed_form_error() -> None:
    """The least squares error over the training points is 114.171, and no other line has a smaller one."""
    splits: Splits = load_line()
    figures = measure_line(Fitted(linear_net(torch.tensor([42.0]), torch.tensor([14.0])), []), splits)
    assert figures["least_squares_training_mse"] == pytest.approx(114.171, abs=1e-3)
    assert figures["training_mse"] > figures["least_squares_training_mse"]


def test_best_epoch() -> None:
    """The kept epoch is the one with the lowest validation loss, or the last without validation."""
    checked = [Epoch(1, validation_loss=loss, validation_accuracy=0.5) for loss in (0.3, 0.1, 0.2)]
    assert best_epoch(Fitted(torch.nn.Identity(), checked)) is checked[1]
    plain = [Epoch(2), Epoch(1)]
    assert best_epoch(Fitted(torch.nn.Identity(), plain)) is plain[1]
