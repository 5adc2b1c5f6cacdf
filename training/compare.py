"""Compare a new version with the newest published one, so that a trial does not replace a good model unseen."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import ServiceError
from service.model.manifest import ColumnsInput, Manifest, Task
from service.model.predictor import Predictor, load_predictor
from training.data import Split, Splits
from training.errors import CheckError
from training.evaluate import predict
from training.publish import find_newest

FEW = 30  # instances; fewer show no significant difference, so their mean loss decides
MARGIN = 1.1  # times the mean loss on a few instances that a new version may have
DEVIATIONS = 2.0  # standard errors of the mean difference that count as significant
_LEAST = 1e-7  # a probability of 0 would cost infinitely much


def check_not_worse(models_dir: Path, predictor: Predictor, splits: Splits) -> None:
    """Compare losses on the validation split, or on the training split where there is none.

    Instance by instance, the squared error, or the log loss in nats: a paired comparison. With no published version, or
    one that cannot be read any more or takes other inputs, there is nothing to compare with.

    Raises:
        CheckError: the new version is significantly worse.
    """
    published = find_newest(models_dir, predictor.manifest.name)
    if published is None:
        return
    name, split = ("training", splits.train) if splits.validation is None else ("validation", splits.validation)
    try:
        old = load_predictor(published, device="cpu")
    except ServiceError:
        return
    if describe_interface(old.manifest) != describe_interface(predictor.manifest):
        return
    before, after = (measure_losses(predict(each, split), split, each.manifest.task) for each in (old, predictor))
    if is_worse(before, after):
        raise CheckError(
            f"version {published.name}, which is published, is better on the {name} split (mean loss"
            f" {before.mean():.4f}, now {after.mean():.4f}); train for longer, or publish it with --force"
        )


def describe_interface(manifest: Manifest) -> tuple[object, ...]:
    """Return what two versions must share to be compared: task, labels, shape, and the columns with their values."""
    described = manifest.input
    typed = described.columns if isinstance(described, ColumnsInput) else ()
    columns = [(each.name, each.type, each.values) for each in typed]
    return manifest.task, manifest.output.labels, described.shape, columns


def measure_losses(results: NDArray[np.floating], split: Split, task: Task) -> NDArray[np.float64]:
    """Return the loss of each instance (N,): of values (N, 1) the squared error, of probabilities (N, labels) −log p.

    Args:
        results: as `predict` returns them.
        split: with N instances.
        task: of the model.
    """
    targets = split.targets.cpu().numpy().reshape(-1)
    if task == "regression":
        squares: NDArray[np.float64] = (results[:, 0].astype(np.float64) - targets) ** 2
        return squares
    chosen = np.take_along_axis(results, targets.astype(np.int64)[:, None], axis=1)[:, 0]
    losses: NDArray[np.float64] = -np.log(np.maximum(chosen.astype(np.float64), _LEAST))
    return losses


def is_worse(before: NDArray[np.float64], after: NDArray[np.float64]) -> bool:
    """Tell whether losses of the same instances (N,) became significantly larger."""
    if len(before) < FEW:
        return bool(after.mean() > MARGIN * before.mean())
    differences = after - before
    return bool(differences.mean() > DEVIATIONS * differences.std(ddof=1) / np.sqrt(len(differences)))
