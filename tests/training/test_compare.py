"""A version that is significantly worse than the published one is told from one that merely differs."""

import numpy as np
import pytest
import torch

from training.compare import is_worse, measure_losses
from training.data import Split


def test_losses() -> None:
    """Squared errors of values; −log p of the true label; a probability of 0 is not infinite."""
    values = Split(torch.zeros(2, 1), torch.tensor([[1.0], [2.0]]))
    assert measure_losses(np.array([[1.0], [4.0]]), values, "regression").tolist() == [0, 4]
    labels = Split(torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [1.0]]))
    losses = measure_losses(np.array([[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]), labels, "binary")
    assert losses.tolist() == pytest.approx([np.log(2), 0, np.log(1e7)])


def test_noise_is_not_worse() -> None:
    """The same losses on average, a little better, or one outlier in a thousand: not significant."""
    before = np.random.default_rng(0).exponential(size=1000)
    after = np.random.default_rng(1).permutation(before)
    assert not is_worse(before, before)
    assert not is_worse(before, after)
    assert not is_worse(before, before - 0.01)


def test_a_difference_beyond_noise_is_worse() -> None:
    """Each loss a little larger; or, on a few instances, a mean that is more than a tenth larger."""
    before = np.random.default_rng(0).exponential(size=1000)
    assert is_worse(before, before * 1.01)
    assert is_worse(before[:3], before[:3] * 1.2)
    assert not is_worse(before[:3], before[:3] * 1.05)
