"""Calibration: of the cases to which a classifier gives 70 %, do seven in ten come true?

Measured by the expected calibration error: instances are sorted into 15 bins of equal width by a stated probability;
the error is the difference between mean probability and share that came true in each bin, averaged with the bins'
counts as weights. Of several classes, the probability is that of the predicted label (Guo et al. 2017, On calibration
of modern neural networks). Of two, it is that of class 1: by the predicted label, an error on one side of the boundary
would cancel one on the other.

Improved, where that helps, on the validation split: all logits are divided by a temperature (Guo et al. 2017), or for
two classes scaled and shifted (Platt 1999, Probabilistic outputs for support vector machines).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.model.manifest import Task
from training.data import Split, as_floats
from training.trainer import EVALUATION_BATCH

BINS = 15
LEAST_FOR_MEASURING = 30  # instances; fewer cannot tell how right the probabilities are
LEAST_FOR_FITTING = 200  # instances; fewer would rather fit their own noise
RESAMPLES = 200
_STEPS = 100

Floats = NDArray[np.floating]
Targets = NDArray[np.integer] | Floats


@dataclass(frozen=True)
class Reliability:
    """Number of instances, mean probability and share that came true by bin, (BINS,); 0 where a bin is empty."""

    counts: NDArray[np.int64]
    stated: NDArray[np.float64]
    observed: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error, a share."""
        return float((self.counts * np.abs(self.stated - self.observed)).sum() / self.counts.sum())


@dataclass(frozen=True)
class Spread:
    """What a calibration error of a finite number of instances is worth.

    `low` and `high` are its 95 % interval (bootstrap); `by_chance` is what exact probabilities would score on average.
    """

    low: float
    high: float
    by_chance: float


@dataclass(frozen=True)
class Calibration:
    """What becomes of a net's logits: `scale * logit + shift`; `1 / scale` is the temperature."""

    scale: float = 1.0
    shift: float = 0.0


def measure_reliability(probabilities: Floats, targets: Targets) -> Reliability:
    """Return stated probabilities and what came true, by bin.

    Args:
        probabilities: (N, labels), rows sum to 1.
        targets: (N,) indices of the true labels.
    """
    return _bin(*_find_events(probabilities, targets))


def measure_spread(probabilities: Floats, targets: Targets) -> Spread:
    """Return how much of the calibration error is the doing of a finite number of instances."""
    stated, came_true = _find_events(probabilities, targets)
    generator, count = np.random.default_rng(0), len(stated)
    drawn = [generator.integers(0, count, count) for _ in range(RESAMPLES)]
    errors = [_bin(stated[each], came_true[each]).error for each in drawn]
    exact = [_bin(stated, (generator.random(count) < stated).astype(np.float64)).error for _ in range(RESAMPLES)]
    low, high = np.quantile(errors, (0.025, 0.975))
    return Spread(float(low), float(high), float(np.mean(exact)))


def _find_events(probabilities: Floats, targets: Targets) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the stated probability of an event for each instance (N,), and 1 where it came true, else 0."""
    if probabilities.shape[1] == 2:  # noqa: PLR2004 - a binary classifier
        return probabilities[:, 1].astype(np.float64), (targets == 1).astype(np.float64)
    hits = probabilities.argmax(axis=1) == targets
    return probabilities.max(axis=1).astype(np.float64), hits.astype(np.float64)


def _bin(stated: NDArray[np.float64], came_true: NDArray[np.float64]) -> Reliability:
    bins = np.clip(np.ceil(stated * BINS).astype(int) - 1, 0, BINS - 1)  # [0, 1/15], (1/15, 2/15], …
    counts = np.bincount(bins, minlength=BINS)
    means = [np.bincount(bins, each, BINS) / np.maximum(counts, 1) for each in (stated, came_true)]
    return Reliability(counts, *means)


@torch.no_grad()
def choose_calibration(net: nn.Module, split: Split, task: Task) -> Calibration:
    """Return the scale and shift of the logits with the lowest mean loss on a split, or no change.

    None is made on few instances, where the split is separated perfectly (no finite scale would be enough), and where
    it does not lower the calibration error as well.
    """
    logits = torch.cat([net(as_floats(inputs)) for inputs in torch.split(split.inputs, EVALUATION_BATCH)]).double()
    if len(split) < LEAST_FOR_FITTING or is_separated(logits, split.targets, task):
        return Calibration()
    chosen = fit_calibration(logits, split.targets, task)
    targets = split.targets.reshape(-1).numpy()
    before, after = (
        measure_reliability(to_probabilities(each, task), targets).error
        for each in (logits, logits * chosen.scale + chosen.shift)
    )
    return chosen if after < before else Calibration()


def is_separated(logits: Tensor, targets: Tensor, task: Task) -> bool:
    """Tell whether a threshold separates two classes perfectly, or every one of several labels is right."""
    if task != "binary":
        return bool((logits.argmax(dim=1) == targets).all())
    ones, zeros = logits[targets == 1], logits[targets == 0]
    return not len(ones) or not len(zeros) or bool(ones.min() > zeros.max())


def fit_calibration(logits: Tensor, targets: Tensor, task: Task) -> Calibration:
    """Return the calibration of float64 logits (N, K) with the lowest mean loss; the loss is convex in both numbers."""
    scale, shift = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.0, 0.0))
    parameters = [scale, shift] if task == "binary" else [scale]
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    if task == "binary":
        loss, targets = nn.functional.binary_cross_entropy_with_logits, targets.double()
    optimizer = torch.optim.LBFGS(parameters, max_iter=_STEPS, line_search_fn="strong_wolfe")

    def measure() -> float:
        optimizer.zero_grad()
        found = loss(logits * scale + shift, targets)
        found.backward()  # type: ignore[no-untyped-call]
        return found.item()

    with torch.enable_grad():
        optimizer.step(measure)  # type: ignore[no-untyped-call]
    return Calibration(scale.item(), shift.item())


def to_probabilities(logits: Tensor, task: Task) -> NDArray[np.float64]:
    """Return the probabilities (N, labels) of logits (N, K)."""
    if task == "binary":
        positive = torch.sigmoid(logits)
        logits = torch.cat((1 - positive, positive), dim=1)
    else:
        logits = torch.softmax(logits, dim=1)
    probabilities: NDArray[np.float64] = logits.numpy()
    return probabilities
