"""The nets. A net's `forward` returns logits (or values); the activation belongs to the serving graph around it."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from service.model.manifest import Task


class LinearNet(nn.Linear):
    """One linear layer: float32 (N, features) -> (N, 1) values or logits."""

    def __init__(self, features: int) -> None:
        super().__init__(features, 1)


class Normalize(nn.Module):
    """Shift and scale inputs: (inputs − mean) / deviation.

    As part of the net it happens once, in training and in serving, and clients need not know about it.
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
    """The tutorial's 784-512-128-10 perceptron with sigmoids: pixels float32 (N, 784) in [0, 1] -> logits (N, 10).

    Without hidden layers it is a softmax regression.
    """

    def __init__(self, mean: float, deviation: float, hidden: Sequence[int] = (512, 128)) -> None:
        sizes = (784, *hidden)
        layers = [each for pair in pairwise(sizes) for each in (nn.Linear(*pair), nn.Sigmoid())]
        super().__init__(Normalize(mean, deviation), *layers, nn.Linear(sizes[-1], 10))


class NormedDigitsNet(nn.Sequential):
    """`DigitsNet` with batch norm (Ioffe & Szegedy 2015) before each sigmoid, which keeps sigmoids from saturating.

    A fitted norm is one scale and one shift per unit; `plain` folds it into the layer before, so that the tutorial's
    architecture is served.
    """

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__(
            Normalize(mean, deviation),
            nn.Linear(784, 512, bias=False),
            nn.BatchNorm1d(512),
            nn.Sigmoid(),
            nn.Linear(512, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.Sigmoid(),
            nn.Linear(128, 10),
        )

    def plain(self) -> DigitsNet:
        """Return the `DigitsNet` with the same logits as this net in evaluation mode."""
        normalize, *layers = (layer for layer in fold_norms(self) if not isinstance(layer, nn.Identity))
        assert isinstance(normalize, Normalize)
        net = DigitsNet(normalize.mean.item(), normalize.deviation.item())
        net.load_state_dict(nn.Sequential(normalize, *layers).state_dict())
        return net.eval()


class DigitsCnn(nn.Sequential):
    """A small convolutional net: pixels float32 (N, 784) in [0, 1] -> logits (N, 10).

    28² –5×5→ 24² –pool→ 12² –3×3→ 10² –3×3→ 8² –pool→ 4² –3×3→ 4² –3×3→ 4² –pool→ 2² → 256 → 10. Convolutions
    without padding and early pooling keep the large maps, where a CPU spends its time, few and narrow; the wide layers
    work on 4 × 4 maps.
    """

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__(
            Normalize(mean, deviation),
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 32, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            *_convolution(32, 64),
            *_convolution(64, 96),
            nn.MaxPool2d(2),
            *_convolution(96, 128, padding=1),
            *_convolution(128, 128, padding=1),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 256, bias=False),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(256, 10),
        )


def _convolution(inputs: int, outputs: int, padding: int = 0) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def fold_norms(net: nn.Sequential) -> nn.Sequential:
    """Return a copy in evaluation mode, its batch norms folded into the layers before and replaced by identities."""
    folded = copy.deepcopy(net).eval()
    for i in range(1, len(folded)):
        before, norm = folded[i - 1], folded[i]
        if isinstance(norm, nn.BatchNorm1d) and isinstance(before, nn.Linear):
            folded[i - 1], folded[i] = fuse_linear_bn_eval(before, norm), nn.Identity()
        elif isinstance(norm, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            folded[i - 1], folded[i] = fuse_conv_bn_eval(before, norm), nn.Identity()
    return folded


@torch.no_grad()
def rescale_logits(net: nn.Module, scale: float, shift: float = 0.0) -> None:
    """Multiply a net's logits by a scale and add a shift, through the weights and bias of its last layer."""
    last = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
    last.weight.mul_(scale)
    last.bias.mul_(scale).add_(shift)


class ServingNet(nn.Module):
    """The net to export: it adds the activation that turns logits into what the service reports.

    regression: values (N, 1), unchanged; binary: sigmoid, (N, 1) probabilities of the second label; multiclass:
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
