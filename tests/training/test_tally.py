"""Hits are counted as the service decides labels."""

import pytest
import torch

from training.tally import Tally, count_correct


def test_count_correct() -> None:
    """A logit of exactly 0 is probability 0.5 and counts as class 1; the largest of several logits wins."""
    assert count_correct(torch.tensor([[0.0], [-1.0]]), torch.tensor([[1.0], [1.0]]), "binary") == 1
    assert count_correct(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]), "multiclass") == 1


@pytest.mark.parametrize(("reduction", "loss"), [("mean", 2.5), ("sum", 5.0)])
def test_mean_loss_weighs_instances_not_batches(reduction: str, loss: float) -> None:
    """A mean of 1 over one instance and of 4 over one are 2.5; sums are added."""
    tally = Tally("regression", reduction)  # type: ignore[arg-type]
    for value in (1.0, 4.0):
        tally.add(torch.tensor(value), torch.zeros(1, 1), torch.zeros(1, 1))
    assert tally.epoch().loss == loss
    assert tally.epoch().accuracy is None
    assert tally.count == 2
