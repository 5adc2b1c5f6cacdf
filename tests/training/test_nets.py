"""Nets return logits; the serving net adds the activation."""

import pytest
import torch

from service.model.manifest import Task
from training.nets import (
    DigitsCnn,
    DigitsNet,
    LinearNet,
    Normalize,
    NormedDigitsNet,
    ServingNet,
    fold_norms,
    linear_net,
    rescale_logits,
)


def test_digits_net_is_the_tutorials() -> None:
    """784-512-128-10 has 468,874 parameters and returns logits (N, 10)."""
    net = DigitsNet(mean=0.0, deviation=1.0)
    assert sum(parameter.numel() for parameter in net.parameters()) == 468_874
    assert net(torch.zeros(3, 784)).shape == (3, 10)


def test_digits_net_without_hidden_layers_is_a_softmax_regression() -> None:
    """One linear layer: 7,840 weights and 10 biases."""
    net = DigitsNet(mean=0.1, deviation=1.0, hidden=())
    assert sum(each.numel() for each in net.parameters()) == 7850
    assert net(torch.zeros(3, 784)).shape == (3, 10)


def test_normalize() -> None:
    """Inputs are shifted, then scaled."""
    assert Normalize(mean=0.5, deviation=0.25)(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-2, 0, 2]


@pytest.mark.parametrize("task", ["regression", "binary", "multiclass"])
def test_serving_net(task: Task) -> None:
    """Values are unchanged, binary outputs are in [0, 1], multiclass rows sum to 1; extremes stay finite."""
    net = torch.nn.Linear(2, 3) if task == "multiclass" else LinearNet(2)
    inputs = torch.cat((torch.randn(5, 2), torch.full((1, 2), 1e6), torch.full((1, 2), -1e6)))
    outputs = ServingNet(net, task)(inputs)
    assert torch.isfinite(outputs).all()
    if task == "regression":
        assert torch.equal(outputs, net(inputs))
    elif task == "binary":
        assert ((outputs >= 0) & (outputs <= 1)).all()
    else:
        torch.testing.assert_close(outputs.sum(dim=1), torch.ones(7))


def test_linear_net_holds_the_parameters() -> None:
    """Parameters found by hand, float64 or columns, become those of a float32 layer."""
    net = linear_net(torch.tensor([[2.0], [3.0]], dtype=torch.float64), torch.tensor([[1.0]]))
    assert net(torch.tensor([[1.0, 1.0]])).item() == 6


def train_norms(net: torch.nn.Sequential) -> None:
    """Give batch norms statistics and random parameters."""
    net.train()
    for _ in range(3):
        net(torch.rand(16, 784))
    for layer in net:
        if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, -2, 2)
            torch.nn.init.uniform_(layer.bias, -1, 1)
    net.eval()


def test_plain_net_is_the_normed_one() -> None:
    """With its norms folded the net has the tutorial's architecture and the same logits."""
    net = NormedDigitsNet(mean=0.13, deviation=1.0)
    train_norms(net)
    inputs = torch.rand(8, 784)
    plain = net.plain()
    assert type(plain) is DigitsNet
    torch.testing.assert_close(plain(inputs), net(inputs), atol=1e-4, rtol=1e-4)


def test_cnn_folds() -> None:
    """It has at most a million parameters; folded, it has no norms and the same logits."""
    net = DigitsCnn(mean=0.13, deviation=0.3)
    train_norms(net)
    folded = fold_norms(net)
    assert sum(parameter.numel() for parameter in net.parameters()) <= 1_000_000
    assert not any(isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d) for layer in folded)
    inputs = torch.rand(8, 784)
    torch.testing.assert_close(folded(inputs), net(inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("net", [DigitsNet(0.0, 1.0), LinearNet(784)], ids=["digits", "linear"])
def test_logits_are_rescaled(net: torch.nn.Module) -> None:
    """Scaling and shifting the last layer's parameters does so to the net's outputs."""
    inputs = torch.rand(4, 784)
    before = net(inputs)
    rescale_logits(net, 0.4, 0.1)
    torch.testing.assert_close(net(inputs), before * 0.4 + 0.1)
