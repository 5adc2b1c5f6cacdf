"""Metrics: on the test split, through the exported artifacts and the service's backends; and of fitted parameters."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss, log_loss, r2_score, roc_auc_score

from service.model import postprocess
from service.model.backends import Array
from service.model.manifest import BackendName, ColumnsInput, Manifest
from service.model.predictor import Predictor
from training.calibration import LEAST_FOR_MEASURING, measure_reliability
from training.data import HALF_PLANE_DIRECTION, Split, Splits, as_floats, least_squares
from training.errors import CheckError
from training.nets import LinearNet
from training.progress import Epoch
from training.tally import count_correct
from training.trainer import EVALUATION_BATCH, Fitted


def as_rows(inputs: Array, manifest: Manifest) -> NDArray[Any]:
    """Return inputs float32 (N, *shape) as a backend takes them: of columns, rows with one field."""
    if not isinstance(manifest.input, ColumnsInput):
        return inputs
    rows: NDArray[Any] = np.ascontiguousarray(inputs).view(manifest.input.row_dtype)[:, 0]
    return rows


def predict(predictor: Predictor, split: Split) -> Array:
    """Return the served values (N, 1) or probabilities (N, labels), float32, of every instance of a split."""
    batches = torch.split(as_floats(split.inputs).cpu(), EVALUATION_BATCH)
    rows = (as_rows(batch.contiguous().numpy(), predictor.manifest) for batch in batches)
    outputs = np.concatenate([predictor.predict(each) for each in rows])
    return postprocess.interpret(outputs, predictor.manifest)


def evaluate(predictors: dict[BackendName, Predictor], split: Split) -> dict[str, float]:
    """Return the metrics of a model on a split; see `measure_results`.

    Raises:
        CheckError: the backends do not agree on every label.
    """
    results = {name: predict(predictor, split) for name, predictor in predictors.items()}
    reported, predictor = next(iter(results.values())), next(iter(predictors.values()))
    if predictor.manifest.task != "regression":
        decided = [postprocess.decide(probabilities, predictor.manifest) for probabilities in results.values()]
        if any((each != decided[0]).any() for each in decided):
            raise CheckError("the backends give different labels on the test split")
    return measure_results(reported, split, predictor.manifest)


def measure_split(predictor: Predictor, split: Split) -> dict[str, float]:
    """Return the metrics of one predictor on a split; see `measure_results`."""
    return measure_results(predict(predictor, split), split, predictor.manifest)


def measure_results(results: Array, split: Split, manifest: Manifest) -> dict[str, float]:
    """Return the metrics of a model's results on a split.

    Args:
        results: values (N, 1), or probabilities (N, labels).
        split: with N instances.
        manifest: its task and threshold.

    Returns:
        regression: `mse`, `rmse`, `r2`. binary: `accuracy` at the threshold, mean `loss` (nats), `ece`, `auc`, `brier`.
        multiclass: `accuracy`, mean `loss` (nats), `ece`.
    """
    targets = split.targets.cpu().numpy().reshape(-1)
    if manifest.task == "regression":
        return _measure_values(results[:, 0], targets)
    figures = {
        "accuracy": float(np.mean(postprocess.decide(results, manifest) == targets)),
        "loss": _mean_loss(results, targets),
    }
    if len(split) >= LEAST_FOR_MEASURING:
        figures["ece"] = measure_reliability(results, targets).error
    if manifest.task == "binary":
        figures["auc"] = float(roc_auc_score(targets, results[:, 1]))
        figures["brier"] = float(brier_score_loss(targets, results[:, 1]))
    return figures


def _measure_values(values: Array, targets: NDArray[np.float32]) -> dict[str, float]:
    mse = float(np.mean((values.astype(np.float64) - targets) ** 2))
    return {"mse": mse, "rmse": mse**0.5, "r2": float(r2_score(targets, values))}


def _mean_loss(probabilities: Array, targets: NDArray[np.float32]) -> float:
    # Rounded to float32, rows sum to 1 only approximately; log_loss requires more.
    rows = probabilities.astype(np.float64)
    return float(log_loss(targets, rows / rows.sum(axis=1, keepdims=True), labels=np.arange(rows.shape[1])))


def measure_direction(fitted: Fitted, splits: Splits) -> dict[str, float]:
    """Return the cosine between the normals of the fitted and the true boundary; 1 is the same direction."""
    weights = parameters(fitted)[0].reshape(-1).double()
    truth = torch.tensor(HALF_PLANE_DIRECTION, dtype=torch.float64)
    cosine = (weights @ truth / (weights.norm() * truth.norm())).item()
    return {"direction_cosine": cosine, **measure_training_hits(fitted, splits)}


def measure_training_hits(fitted: Fitted, splits: Splits) -> dict[str, float]:
    """Return the accuracy on the training points."""
    train = splits.train
    with torch.no_grad():
        return {"training_accuracy": count_correct(fitted.net(train.inputs), train.targets, "binary") / len(train)}


def measure_hours(fitted: Fitted, splits: Splits) -> dict[str, float]:
    """Return the summed loss after the last step, the hours at which P(pass) is 0.5, and P(pass | 4 h)."""
    weight, bias = (float(parameter) for parameter in parameters(fitted))
    with torch.no_grad():
        logits = fitted.net(splits.train.inputs)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, splits.train.targets, reduction="sum")
    return {
        "summed_loss": loss.item(),
        "boundary_hours": -bias / weight,
        "probability_at_4_hours": 1 / (1 + math.exp(-(4 * weight + bias))),
    }


def measure_line(fitted: Fitted, splits: Splits) -> dict[str, float]:
    """Return slope, intercept and training error, and those of closed-form least squares."""
    slope, intercept = (float(parameter) for parameter in parameters(fitted))
    best_slope, best_intercept = least_squares(splits.train)
    return {
        "slope": slope,
        "intercept": intercept,
        "least_squares_slope": best_slope,
        "least_squares_intercept": best_intercept,
        "training_mse": _line_mse(splits.train, slope, intercept),
        "least_squares_training_mse": _line_mse(splits.train, best_slope, best_intercept),
    }


def _line_mse(split: Split, slope: float, intercept: float) -> float:
    return ((split.inputs.double() * slope + intercept - split.targets) ** 2).mean().item()


def measure_validation(fitted: Fitted, splits: Splits) -> dict[str, float]:
    """Return the validation accuracy of the kept epoch."""
    del splits
    return {"validation_accuracy": best_epoch(fitted).validation_accuracy or 0.0}


def best_epoch(fitted: Fitted) -> Epoch:
    """Return the kept epoch: the one with the lowest validation loss, or the last without a validation split."""
    checked = [epoch for epoch in fitted.history if epoch.validation_loss is not None]
    return min(checked, key=lambda epoch: epoch.validation_loss or 0.0) if checked else fitted.history[-1]


def parameters(fitted: Fitted) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights (1, features) and bias (1,) of a fitted linear net."""
    net = fitted.net
    if not isinstance(net, LinearNet):
        raise TypeError(f"{type(net).__name__} is not linear")
    return net.weight.detach(), net.bias.detach()
