"""Calibration error follows its definition, and a temperature corrects too high or too low confidence."""

import numpy as np
import pytest
import torch
from torch import nn

from training.calibration import BINS, choose_temperature, fit_temperature, measure_reliability, to_probabilities
from training.data import Split
from training.nets import LinearNet


def test_error_by_hand() -> None:
    """Two bins, confidence 0.9 with accuracy 0.5 and 0.6 with 1.0, are weighted by their counts."""
    rows = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    found = measure_reliability(rows, np.array([0, 0, 0, 1]))
    assert found.error == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert found.counts.sum() == 4
    assert found.counts[8] == 2  # (8/15, 9/15] holds 0.6
    assert len(found.counts) == BINS


def test_edges_have_a_bin() -> None:
    """A probability of exactly 1 is in the last bin, and one of 0.5 in the middle."""
    found = measure_reliability(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 0]))
    assert found.counts[-1] == 1
    assert found.counts[7] == 1
    assert found.error == pytest.approx(0.25)


def test_exact_probabilities_have_no_error() -> None:
    """With labels drawn from the reported probabilities, only sampling error remains."""
    generator = np.random.default_rng(0)
    sure = generator.uniform(0.5, 1, 100_000)
    targets = (generator.random(len(sure)) > sure).astype(int)
    assert measure_reliability(np.stack((sure, 1 - sure), axis=1), targets).error < 0.005


@pytest.mark.parametrize("truth", [0.4, 1.0, 2.5])
def test_temperature_is_found_for_many_classes(truth: float) -> None:
    """Logits too large by a factor get that factor as temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits * truth, targets, "multiclass") == pytest.approx(truth, rel=0.05)


def test_temperature_is_found_for_two_classes() -> None:
    """The same for one logit and targets in a column."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    targets = torch.bernoulli(torch.sigmoid(logits), generator=generator).float()
    assert fit_temperature(logits * 4, targets, "binary") == pytest.approx(4, rel=0.05)
    assert to_probabilities(logits, "binary").shape == (20_000, 2)


def test_temperature_only_where_it_helps() -> None:
    """A calibrated net is unchanged; a far too confident one is not."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(5000, 1, generator=generator)
    targets = torch.bernoulli(torch.sigmoid(2 * points), generator=generator)
    net = LinearNet(1)
    for weight, expected in ((2.0, 1.0), (10.0, 5.0)):
        nn.init.constant_(net.weight, weight)
        nn.init.zeros_(net.bias)
        assert choose_temperature(net, Split(points, targets), "binary") == pytest.approx(expected, rel=0.1)
