"""Seeds: fit a recipe several times, choose one fit, and estimate the spread of the metrics."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student  # type: ignore[import-untyped] # as scikit-learn depends on it

from service.model import postprocess
from service.model.manifest import Manifest
from training.calibration import RESAMPLES, Calibration, choose_calibration
from training.config import TrainConfig
from training.data import Splits, as_floats
from training.evaluate import measure_results
from training.nets import ServingNet, rescale_logits
from training.parity import run_net
from training.progress import Epoch
from training.recipe import Recipe
from training.trainer import EVALUATION_BATCH, Fitted, Settings, measure_split

CONFIDENCE = 0.95
_PLAIN_LOSS = TrainConfig(epochs=1, batch_size=1, lr=0.0)  # the mean, without label smoothing
_NORMAL = 1.959964  # standard deviations that contain 95 % of a normal distribution


@dataclass(frozen=True)
class Candidate:
    """One fit of a recipe.

    `calibration` has been applied to its net. `validation` are its figures on the validation split,
    the loss first; None where there is no such split.
    """

    seed: int
    fitted: Fitted
    calibration: Calibration
    seconds: float
    validation: Epoch | None = None


@dataclass(frozen=True)
class Interval:
    """A mean, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def fit_seed(recipe: Recipe, splits: Splits, seed: int, settings: Settings) -> Candidate:
    """Fit a recipe from one seed, and calibrate it if the recipe says so and has a validation split."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    fitted = recipe.fit(splits, settings)
    fitted.net.cpu().eval()
    calibration, validation = Calibration(), None
    if splits.validation is not None:
        validation = measure_split(fitted.net, splits.validation, recipe.task, _PLAIN_LOSS)
    if recipe.calibrates and splits.validation is not None:
        calibration = choose_calibration(fitted.net, splits.validation, recipe.task)
        rescale_logits(fitted.net, calibration.scale, calibration.shift)
    return Candidate(seed, fitted, calibration, fitted.earlier_seconds + time.perf_counter() - started, validation)


def choose_candidate(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the highest validation accuracy, then the lowest validation loss.

    Without a validation split, return the first.
    """

    def rank(candidate: Candidate) -> tuple[float, float]:
        figures = candidate.validation
        return (0.0, 0.0) if figures is None else (-(figures.accuracy or 0.0), figures.loss)

    return min(candidates, key=rank)


def measure_candidate(candidate: Candidate, splits: Splits, manifest: Manifest) -> dict[str, float]:
    """Return the metrics of a candidate's serving net on the test split."""
    serving = ServingNet(candidate.fitted.net, manifest.task)
    batches = torch.split(as_floats(splits.test.inputs), EVALUATION_BATCH)
    outputs = np.concatenate([run_net(serving, batch.numpy()) for batch in batches])
    return measure_results(postprocess.interpret(outputs, manifest), splits.test, manifest)


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of several seeds with its 95 % confidence interval, mean ± t·s/√n."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, mean, mean)
    reach = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return Interval(mean, mean - float(reach), mean + float(reach))


def bootstrap_interval(values: NDArray[np.float64]) -> Interval:
    """Return the mean of values (N,) with its 95 % confidence interval (bootstrap, percentiles)."""
    random = np.random.default_rng(0)
    means = [values[random.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(float(values.mean()), float(low), float(high))


def wilson_interval(hits: int, count: int) -> Interval:
    """Return a proportion with its 95 % confidence interval (Wilson 1927)."""
    share, z = hits / count, _NORMAL
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Interval(share, middle - reach, middle + reach)
