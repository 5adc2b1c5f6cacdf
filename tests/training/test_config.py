"""A config becomes the optimizer, schedule and loss it describes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.training.digits import CONFIG, DroppingNet
from training.config import TrainConfig, build_criterion, build_optimizer, build_schedule


def trace_lr(config: TrainConfig, steps: int) -> list[float]:
    """Return the learning rate of each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = build_schedule(optimizer, config, steps)
    rates: list[float] = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return rates


def test_lr_rises_and_falls() -> None:
    """From 4 % of the peak up to it, level until annealing starts, and down to zero at the end."""
    rates = trace_lr(replace(CONFIG, lr=0.5, warmup=0.2, anneal=0.5), steps=100)
    assert rates[0] == pytest.approx(0.02)
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:51] == pytest.approx([0.5] * 31, rel=1e-3)
    assert rates[75] == pytest.approx(0.25, rel=1e-2)
    assert rates[-1] < 0.001


def test_lr_is_constant_by_default() -> None:
    """Without warmup and annealing every step has exactly the configured rate."""
    assert set(trace_lr(TrainConfig(epochs=1, batch_size=1, lr=0.1), steps=10)) == {0.1}


def test_biases_and_norms_do_not_decay() -> None:
    """Only parameters that multiply inputs decay."""
    decayed, others = build_optimizer(DroppingNet(), CONFIG).param_groups
    assert [each.ndim for each in decayed["params"]] == [2, 2]
    assert [each.ndim for each in others["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.02, 0)


def test_adamw_without_decay_is_adam() -> None:
    """Parameters after a few steps are equal bit for bit."""
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    nets = [nn.Linear(3, 4), nn.Linear(3, 4)]
    config = TrainConfig(epochs=1, batch_size=1, lr=0.01, optimizer="adamw")
    optimizers = [build_optimizer(nets[0], config), torch.optim.Adam(nets[1].parameters(), lr=0.01, fused=True)]
    for net, optimizer in zip(nets, optimizers, strict=True):
        nn.init.zeros_(net.bias)
        with torch.no_grad():
            net.weight.copy_(start)
        for _ in range(5):
            optimizer.zero_grad()
            (net(torch.ones(2, 3)) ** 2).sum().backward()
            optimizer.step()
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert torch.equal(nets[0].bias, nets[1].bias)


def test_criterion_is_that_of_the_task() -> None:
    """Reduction and label smoothing are the config's."""
    summed = TrainConfig(epochs=1, batch_size=1, lr=0.1, reduction="sum")
    assert isinstance(build_criterion("regression", summed), nn.MSELoss)
    assert isinstance(build_criterion("binary", summed), nn.BCEWithLogitsLoss)
    logits, targets = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    assert torch.equal(build_criterion("multiclass", replace(summed, label_smoothing=0.1))(logits, targets), expected)


@pytest.mark.parametrize(("share", "expected"), [(0.0, [False] * 4), (0.25, [False] * 3 + [True]), (1.0, [True] * 4)])
def test_finetune_phase_is_the_last_epochs(share: float, expected: list[bool]) -> None:
    """The fraction is of the epochs, counted from the end."""
    config = replace(CONFIG, finetune=share)
    assert [config.is_finetuning(epoch) for epoch in range(4)] == expected
