"""The nets. A net's `forward` returns logits (or values); the activation belongs to the serving graph around it."""

import torch
from torch import Tensor, nn

from service.manifest import Task


class LinearNet(nn.Linear):
    """One linear layer: float32 (N, features) -> (N, 1) values or logits."""

    def __init__(self, features: int) -> None:
        super().__init__(features, 1)


class Normalize(nn.Module):
    """Shift and scale inputs: (inputs − mean) / deviation.

    It is a part of the net, so it happens once, in training as in serving, and clients need not know of it.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return float32 of the inputs' shape."""
        return (inputs - self.mean) / self.deviation


class DigitsNet(nn.Sequential):
    """The tutorial's 784-512-128-10 perceptron with sigmoids: pixels float32 (N, 784) in [0, 1] -> logits (N, 10)."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__(
            Normalize(mean, deviation),
            nn.Linear(784, 512),
            nn.Sigmoid(),
            nn.Linear(512, 128),
            nn.Sigmoid(),
            nn.Linear(128, 10),
        )


class ServingNet(nn.Module):
    """What is exported: a net and the activation that turns its logits into what the service reports.

    regression: values (N, 1) as they are; binary: sigmoid, (N, 1) probabilities of the second label; multiclass:
    softmax, (N, K), rows sum to 1.
    """

    def __init__(self, net: nn.Module, task: Task) -> None:
        super().__init__()
        self.net = net
        self.task = task

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the served outputs float32 (N, K) for inputs float32 (N, *shape)."""
        logits: Tensor = self.net(inputs)
        if self.task == "binary":
            return torch.sigmoid(logits)
        if self.task == "multiclass":
            return torch.softmax(logits, dim=1)
        return logits


def linear_net(weights: Tensor, bias: Tensor) -> LinearNet:
    """Return a `LinearNet` with the given weights (features values) and bias (one value), as float32."""
    net = LinearNet(weights.numel())
    with torch.no_grad():
        net.weight.copy_(weights.reshape(1, -1))
        net.bias.copy_(bias.reshape(1))
    return net
