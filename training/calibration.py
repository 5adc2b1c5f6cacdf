"""Calibration: is a classifier that says 90 % right nine times in ten?

Measured by the expected calibration error of Guo et al. 2017 (On calibration of modern neural networks): instances are
sorted into 15 bins of equal width by the confidence of the predicted label; the error is the difference between mean
confidence and accuracy in each bin, averaged with the bins' counts as weights. Improved, where that helps, by
temperature scaling: all logits are divided by one number, chosen on the validation split.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.model.manifest import Task
from training.data import Split, as_floats
from training.trainer import EVALUATION_BATCH

BINS = 15
LEAST_FOR_CALIBRATION = 30  # instances; fewer cannot tell
_WIDEST = 3.0  # natural logarithm of the highest temperature searched; the lowest is its inverse
_ROUNDS = 60

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Reliability:
    """Number of instances, mean confidence and accuracy in each bin of confidence, (BINS,); 0 where a bin is empty."""

    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error, a share."""
        return float((self.counts * np.abs(self.confidence - self.accuracy)).sum() / self.counts.sum())


def measure_reliability(probabilities: Floats, targets: NDArray[np.integer] | Floats) -> Reliability:
    """Return confidence and accuracy of a classifier by bin.

    Args:
        probabilities: (N, labels), rows sum to 1; the predicted label is the most probable one.
        targets: (N,) indices of the true labels.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    hits = (probabilities.argmax(axis=1) == targets).astype(np.float64)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # (0, 1/15], (1/15, 2/15], …
    counts = np.bincount(bins, minlength=BINS)
    divisor = np.maximum(counts, 1)
    means = [np.bincount(bins, weights=each, minlength=BINS) / divisor for each in (confidence, hits)]
    return Reliability(counts, *means)


@torch.no_grad()
def choose_temperature(net: nn.Module, split: Split, task: Task) -> float:
    """Return the temperature with the lowest mean loss on a split, or 1 if it does not lower the error too."""
    logits = torch.cat([net(as_floats(inputs)) for inputs in torch.split(split.inputs, EVALUATION_BATCH)]).double()
    chosen = fit_temperature(logits, split.targets, task)
    before, after = (
        measure_reliability(to_probabilities(logits / each, task), split.targets.reshape(-1).numpy()).error
        for each in (1.0, chosen)
    )
    return chosen if after < before else 1.0


def fit_temperature(logits: Tensor, targets: Tensor, task: Task) -> float:
    """Return the temperature with the lowest mean loss, by golden-section search over its logarithm.

    The loss is convex in 1 / temperature, so it has one minimum.
    """

    def loss(power: float) -> float:
        scaled = logits / np.exp(power)
        if task == "binary":
            return nn.functional.binary_cross_entropy_with_logits(scaled, targets.double()).item()
        return nn.functional.cross_entropy(scaled, targets).item()

    golden = (np.sqrt(5) - 1) / 2
    low, high = -_WIDEST, _WIDEST
    for _ in range(_ROUNDS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return float(np.exp((low + high) / 2))


def to_probabilities(logits: Tensor, task: Task) -> NDArray[np.float64]:
    """Return the probabilities (N, labels) of logits (N, K)."""
    if task == "binary":
        positive = torch.sigmoid(logits)
        logits = torch.cat((1 - positive, positive), dim=1)
    else:
        logits = torch.softmax(logits, dim=1)
    probabilities: NDArray[np.float64] = logits.numpy()
    return probabilities
