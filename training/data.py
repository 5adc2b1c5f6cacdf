"""The data sets, each generated or loaded exactly as in its tutorial, in splits that do not overlap unless stated.

Every data set has a seed of its own: `--seeds` changes initial parameters and shuffling, never the data.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import make_regression
from torch import Tensor

from training.errors import DataError

HALF_PLANE_DIRECTION = (0.5, -1.5)
LINE_INTERCEPT = 14.5
LINE_NOISE = 10.0
MNIST_TRAINING_SHARE = 11 / 12  # 55,000 of 60,000; the other 5,000 are for validation

FRESH_POINTS_SEED = 20_000  # of held-out points, a stream no training set uses


@dataclass(frozen=True)
class Split:
    """Instances with their targets.

    `inputs`: float32 (N, features), or uint8 (N, pixels) with 255 for full ink. `targets`: float32 (N, 1) values or
    0/1, or int64 (N,) class indices.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.inputs)

    def to(self, device: torch.device) -> "Split":
        """Return the split on a device."""
        return Split(self.inputs.to(device), self.targets.to(device))

    def digest(self) -> str:
        """Return the SHA-256 of shapes, dtypes and values, as 64 hex digits."""
        content = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            array = np.ascontiguousarray(tensor.cpu().numpy())
            content.update(f"{array.dtype.str} {array.shape}\n".encode())
            content.update(array.tobytes())
        return content.hexdigest()


@dataclass(frozen=True)
class Splits:
    """`train` fits the net, `validation` chooses epoch, temperature and seed, `test` is reported."""

    train: Split
    test: Split
    validation: Split | None = None

    def digests(self) -> dict[str, str]:
        """Return the digest of each split by its name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split.digest() for name, split in named.items() if split is not None}


class IndexBatches:
    """Shuffled batches of a split, each pass in a new order; a single batch of the whole split stays in order.

    It gathers once per epoch. A `DataLoader` over the torchvision data set makes one Python call per instance, which
    is most of the time of the tutorial's epoch (`benchmarks/mnist_epoch.py` measures it).
    """

    def __init__(self, split: Split, batch_size: int, generator: torch.Generator) -> None:
        self._split = split
        self._batch_size = batch_size
        self._generator = generator

    def __len__(self) -> int:
        """Return the number of batches; the last one may be short."""
        return math.ceil(len(self._split) / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs float32, targets) of each batch."""
        arrays = self._split.inputs, self._split.targets
        if len(self) > 1:
            device = self._generator.device
            order = torch.randperm(len(self._split), generator=self._generator, device=device)
            arrays = arrays[0][order], arrays[1][order]  # the batches are views of it
        for inputs, targets in zip(*(torch.split(array, self._batch_size) for array in arrays), strict=True):
            yield as_floats(inputs), targets


def as_floats(inputs: Tensor) -> Tensor:
    """Return inputs as the graph takes them: float32 unchanged, uint8 pixels divided by 255 into [0, 1]."""
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


def load_half_plane() -> Splits:
    """Draw points of the plane, labelled 1 where 0.5·x₀ − 1.5·x₁ > 0.

    Returns:
        train: the tutorial's 1,000 points (`torch.manual_seed(123)`); validation and test: 10,000 fresh points each,
        from the same rule, since the tutorial holds none out. Inputs float32 (N, 2), standard normal; targets
        float32 (N, 1).
    """
    fresh, more = FRESH_POINTS_SEED, FRESH_POINTS_SEED + 1
    return Splits(_draw_half_plane(123, 1000), _draw_half_plane(fresh, 10_000), _draw_half_plane(more, 10_000))


def _draw_half_plane(seed: int, count: int) -> Split:
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    scores = points @ torch.tensor(HALF_PLANE_DIRECTION).reshape(2, 1)
    return Split(points, (scores > 0).float())


def load_hours() -> Splits:
    """Return the tutorial's three students: 1, 2 and 3 hours of study; only the third passed.

    There is nothing to hold out: `test` is the same three points, and the description says so.
    """
    students = Split(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.0], [0.0], [1.0]]))
    return Splits(train=students, test=students)


def load_clouds() -> Splits:
    """Draw two Gaussian clouds: class 0 around (2.7, 2.7), class 1 around (−0.7, −0.7), standard deviation 1.

    Returns:
        train: the tutorial's 100 points per class (`torch.manual_seed(10)`); validation and test: 5,000 fresh ones per
        class. No rule does better than 99.19 % on fresh points: the clouds overlap.
    """
    fresh, more = FRESH_POINTS_SEED, FRESH_POINTS_SEED + 1
    return Splits(_draw_clouds(10, 100), test=_draw_clouds(fresh, 5000), validation=_draw_clouds(more, 5000))


def _draw_clouds(seed: int, each: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    ones = torch.ones(each, 2)
    clouds = [torch.normal(1.7 * side * ones, 1.0, generator=generator) + 1 for side in (1, -1)]
    return Split(torch.cat(clouds), torch.cat((torch.zeros(each, 1), torch.ones(each, 1))))


def load_line() -> Splits:
    """Draw points around a line, as scikit-learn's `make_regression` does for the tutorial.

    Returns:
        train: the tutorial's 100 points (noise 10, bias 14.5, random_state 0); test: 1,000 fresh points with the
        same line and noise. Inputs float32 (N, 1), targets float32 (N, 1): a column, since (N,) would broadcast
        against the net's (N, 1) into N × N differences.
    """
    inputs, targets, coefficient = _make_line()
    generator = torch.Generator().manual_seed(FRESH_POINTS_SEED)
    fresh = torch.randn(1000, 1, generator=generator)
    noise = LINE_NOISE * torch.randn(1000, 1, generator=generator)
    train = Split(torch.from_numpy(inputs).float(), torch.from_numpy(targets).float().reshape(-1, 1))
    return Splits(train=train, test=Split(fresh, float(coefficient) * fresh + LINE_INTERCEPT + noise))


def true_slope() -> float:
    """Return the slope of the line behind `load_line`: 42.3855."""
    return float(_make_line()[2])


def _make_line() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return inputs (100, 1), targets (100,) and the slope of the tutorial's points."""
    inputs, targets, slope = make_regression(
        n_samples=100, n_features=1, noise=LINE_NOISE, coef=True, bias=LINE_INTERCEPT, random_state=0
    )
    return inputs, targets, slope


def least_squares(split: Split) -> tuple[float, float]:
    """Return slope and intercept of the closed-form least squares line through a split with one feature."""
    x, y = split.inputs[:, 0].double(), split.targets[:, 0].double()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return slope.item(), (y.mean() - slope * x.mean()).item()


def load_digits(data_dir: Path) -> Splits:
    """Load MNIST (http://yann.lecun.com/exdb/mnist, CC BY-SA 3.0) through torchvision, which downloads it if needed.

    Returns:
        train and validation: 11/12 and 1/12 of the training images, split at random with a fixed seed; test: the test
        images. Inputs uint8 (N, 784), targets int64 (N,).

    Raises:
        DataError: the files are not in `data_dir` and cannot be downloaded.
    """
    training, test = (_load_mnist_part(data_dir, train) for train in (True, False))
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    chosen, held_out = order.split_with_sizes(
        [(count := round(len(training) * MNIST_TRAINING_SHARE)), len(training) - count]
    )
    return Splits(
        train=Split(training.inputs[chosen], training.targets[chosen]),
        validation=Split(training.inputs[held_out], training.targets[held_out]),
        test=test,
    )


def _load_mnist_part(data_dir: Path, train: bool) -> Split:
    from torchvision.datasets import MNIST  # noqa: PLC0415 - only the digits need torchvision

    try:
        part = MNIST(str(data_dir), train=train, download=True)
    except Exception as error:  # no network, no such folder, a damaged file: many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"MNIST is not in {data_dir} and cannot be downloaded ({reason}); put its four *-ubyte.gz files into"
            f" {data_dir / 'MNIST' / 'raw'}, or name another folder with --data-dir"
        ) from error
    return Split(part.data.reshape(len(part.data), -1), part.targets)
