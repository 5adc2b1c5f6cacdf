"""What the docs and docstrings say of the tutorials is so when their own code is run."""

import pytest
import torch

from tests.training.tutorials import texts
from training import data, recipes
from training.trainer import Settings


def test_clouds_stop_as_the_recipe_does() -> None:
    """The accuracy is a Python float, so 198 of 200 is not more than 0.99: it stops at 380 with 199, as we do."""
    printed = texts.separate_clouds()
    assert (printed.iteration, printed.right) == (380, 199)
    assert (printed.loss, printed.bias) == pytest.approx((0.0493, 1.926), abs=1e-3)
    assert printed.weights == pytest.approx([-1.414, -1.477], abs=1e-3)
    torch.manual_seed(10)
    for side in (1, -1):
        torch.normal(1.7 * side * torch.ones(100, 2), 1.0)  # the text draws its data first
    fitted = recipes.fit_logistic_clusters(data.load_clouds(), Settings(1000, torch.device("cpu")))
    # The text measures before the step and keeps what comes after it: here one step more has been taken there.
    assert len(fitted.history) == printed.iteration
    assert torch.allclose(fitted.net.weight, torch.tensor([printed.weights]), atol=2e-2)  # type: ignore[arg-type]


def test_summed_loss_depends_on_the_initial_parameters() -> None:
    """2.4511 and 1.1204, which the text prints, are one seed's; over seeds it ends between 0.92 and 1.17."""
    for seed in range(5):
        torch.manual_seed(seed)
        assert 0.92 < texts.study()[-1] < 1.17


def test_summed_loss_is_three_times_as_fast_as_its_mean() -> None:
    """1,000 epochs of the sum are 3,000 of the mean."""
    torch.manual_seed(0)
    summed = texts.study()[-1]
    torch.manual_seed(0)
    assert texts.study(3000, reduction="mean")[-1] * 3 == pytest.approx(summed, rel=0.01)


def test_loss_by_hand_becomes_nan() -> None:
    """With seed 0 a probability rounds to 1 in epoch 81, and 0·log 0 is NaN."""
    assert texts.descend_by_hand(seed=0, epochs=85) == (81, 239)


def test_line_by_hand_never_trains_on_its_last_points() -> None:
    """100 // 16 batches in the data's own order: 96 points train, and still the line is close."""
    fit = texts.fit_line_by_hand()
    assert fit.trained == set(range(96))
    assert (fit.w, fit.b) == pytest.approx((42.62, 13.69), abs=0.4)


def test_targets_without_a_column_end_at_a_flat_line() -> None:
    """Each prediction is compared with each target, nothing fails, and the slope is a tenth of 42.6."""
    torch.manual_seed(0)
    slope, error = texts.fit_line_without_reshape()
    assert slope < 6
    assert error > 1500


def test_third_derivative_needs_no_help() -> None:
    """Plain `torch.autograd.grad` gives 0 for the third derivative of x²."""
    assert texts.third_derivative().item() == 0
