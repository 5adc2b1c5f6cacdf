"""Calibration error follows its definition, and too high or too low confidence is corrected."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.calibration import (
    BINS,
    Calibration,
    choose_calibration,
    fit_calibration,
    measure_reliability,
    measure_spread,
    to_probabilities,
)
from training.data import Split
from training.nets import LinearNet


def draw(scale: float, shift: float, count: int = 20_000) -> tuple[Tensor, Tensor]:
    """Return logits (N, 1), and labels drawn from the probabilities of `scale * logit + shift`."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return logits, torch.bernoulli(torch.sigmoid(scale * logits + shift), generator=generator).float()


def test_error_by_hand() -> None:
    """Two bins, confidence 0.9 with accuracy 0.5 and 0.6 with 1.0, are weighted by their counts."""
    rows = np.array([[0.9, 0.1, 0], [0.1, 0.9, 0], [0.6, 0.4, 0], [0.4, 0.6, 0]])
    found = measure_reliability(rows, np.array([0, 0, 0, 1]))
    assert found.error == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert found.counts.sum() == 4
    assert found.counts[8] == 2  # (8/15, 9/15] holds 0.6
    assert len(found.counts) == BINS


def test_two_classes_are_measured_by_class_1() -> None:
    """Errors on the two sides of the boundary do not cancel: 0.6 where it never happens, 0.4 where it always does."""
    rows = np.array([[0.4, 0.6]] * 5 + [[0.6, 0.4]] * 5)
    assert measure_reliability(rows, np.array([0] * 5 + [1] * 5)).error == pytest.approx(0.6)


def test_edges_have_a_bin() -> None:
    """A probability of exactly 1 is in the last bin, and one of 0 in the first."""
    found = measure_reliability(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1]))
    assert found.counts[-1] == 1
    assert found.counts[0] == 1
    assert found.error == pytest.approx(0.5)


def test_exact_probabilities_have_no_error() -> None:
    """With labels drawn from the reported probabilities, only sampling error remains, and the spread says how much."""
    logits, targets = draw(1, 0)
    rows, labels = to_probabilities(logits, "binary"), targets[:, 0].numpy()
    error, spread = measure_reliability(rows, labels).error, measure_spread(rows, labels)
    assert error < 0.01
    assert spread.low < spread.by_chance < spread.high
    assert error == pytest.approx(spread.by_chance, abs=0.004)


@pytest.mark.parametrize("truth", [0.4, 1.0, 2.5])
def test_scale_is_found_for_many_classes(truth: float) -> None:
    """Logits too large by a factor are divided by it; there is no shift."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator)[:, 0]
    found = fit_calibration(logits * truth, targets, "multiclass")
    assert 1 / found.scale == pytest.approx(truth, rel=0.05)
    assert found.shift == 0


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.25, 1.5), (3.0, -1.0)])
def test_scale_and_shift_are_found_for_two_classes(scale: float, shift: float) -> None:
    """Platt's two numbers, from one logit and targets in a column."""
    found = fit_calibration(*draw(scale, shift), "binary")
    assert (found.scale, found.shift) == pytest.approx((scale, shift), rel=0.05, abs=0.1)


def build_net(weight: float) -> LinearNet:
    """Return a net of one feature without bias."""
    net = LinearNet(1)
    nn.init.constant_(net.weight, weight)
    nn.init.zeros_(net.bias)
    return net


def test_calibrated_only_where_it_helps() -> None:
    """A far too confident net is corrected."""
    logits, targets = draw(2, 0)
    found = choose_calibration(build_net(10), Split(logits.float(), targets), "binary")
    assert (found.scale, found.shift) == pytest.approx((0.2, 0), rel=0.05, abs=0.1)


@pytest.mark.parametrize("count", [30, 2000], ids=["few", "separated"])
def test_little_or_separated_data_changes_nothing(count: int) -> None:
    """A handful of instances, or two classes that a threshold separates, say nothing of how sure to be."""
    inputs = torch.linspace(-1, 1, count).reshape(-1, 1)
    assert choose_calibration(build_net(1), Split(inputs, (inputs > 0).float()), "binary") == Calibration()
