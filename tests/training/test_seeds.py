"""Of several seeds the best on validation is chosen; intervals follow their formulas."""

from pathlib import Path

import pytest
import torch

from training.calibration import Calibration
from training.nets import LinearNet
from training.progress import Epoch
from training.recipes import RECIPES
from training.seeds import Candidate, choose_candidate, fit_seed, mean_interval, wilson_interval
from training.trainer import Fitted, Settings


def build_candidate(seed: int, validation: Epoch | None) -> Candidate:
    """Return a candidate with validation figures, or without."""
    return Candidate(seed, Fitted(LinearNet(1), [Epoch(0.5)]), Calibration(), 0.0, validation)


def test_validation_chooses() -> None:
    """The highest validation accuracy wins, then the lowest loss."""
    first, second, third = (
        build_candidate(i, Epoch(*each)) for i, each in enumerate([(0.3, 0.97), (0.35, 0.98), (0.2, 0.98)])
    )
    assert choose_candidate([first, second, third]).seed == 2


def test_without_validation_the_first_is_chosen() -> None:
    """No other figure chooses, least of all the test split's."""
    assert choose_candidate([build_candidate(5, None), build_candidate(1, None)]).seed == 5


def test_every_recipe_with_a_validation_split_is_chosen_by_it() -> None:
    """Also one whose loop does not validate: its finished net is measured on the split."""
    recipe = RECIPES["logistic-clusters"]
    splits = recipe.load(Path())
    candidates = [
        fit_seed(recipe, splits, seed, Settings(epochs, torch.device("cpu"))) for seed, epochs in ((0, 1), (1, 300))
    ]
    figures = [each.validation for each in candidates]
    assert all(figures)
    assert choose_candidate(candidates).seed == 1


def test_mean_interval() -> None:
    """Three values 1, 2, 3: s = 1, t(2) = 4.303, so 2 ± 2.484; one value has no interval."""
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.low, interval.mean, interval.high) == pytest.approx((-0.484, 2.0, 4.484), abs=1e-3)
    assert mean_interval([0.5]).high == 0.5


def test_wilson_interval() -> None:
    """9,970 of 10,000 give 99.57 … 99.79 %; the upper end never exceeds 1."""
    interval = wilson_interval(9970, 10_000)
    assert (interval.low, interval.high) == pytest.approx((0.99572, 0.99790), abs=2e-5)
    assert wilson_interval(10, 10).high == pytest.approx(1)
    assert wilson_interval(10, 10).low == pytest.approx(0.722, abs=1e-3)
