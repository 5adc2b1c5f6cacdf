"""Robustness: how often a digit model is right when the test pictures are not as MNIST made them.

Each condition changes all of them alike, without chance but for the noise, whose seed is fixed. Two groups go through
the service's own picture preparation, as a client's pictures do: MNIST's in either polarity, and scikit-learn's 8 × 8
digits (Alpaydin & Kaynak 1998, https://archive.ics.uci.edu/dataset/80), which other people wrote for another scanner.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from service.model import postprocess
from service.model.manifest import ImageInput
from service.model.predictor import Predictor
from service.model.preprocess import fit_picture
from training.augment import SIDE
from training.data import Split, as_floats
from training.evaluate import predict

Change = Callable[[Tensor], Tensor]  # pictures float32 (N, 1, 28, 28) in [0, 1] to the same

_DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def shift(pixels: int) -> Change:
    """Return a change that moves every fourth picture right, down, left, up by whole pixels."""

    def change(pictures: Tensor) -> Tensor:
        moved = torch.zeros_like(pictures)
        padded = F.pad(pictures, (pixels,) * 4)
        for i, (down, right) in enumerate(_DIRECTIONS):
            top, left = pixels * (1 - down), pixels * (1 - right)
            moved[i::4] = padded[i::4, :, top : top + SIDE, left : left + SIDE]
        return moved

    return change


def rotate(degrees: float) -> Change:
    """Return a change that turns every other picture clockwise and the rest the other way."""

    def change(pictures: Tensor) -> Tensor:
        angles = torch.full((len(pictures),), math.radians(degrees))
        angles[1::2] *= -1
        cos, sin, none = torch.cos(angles), torch.sin(angles), torch.zeros_like(angles)
        turns = torch.stack((torch.stack((cos, sin, none), dim=1), torch.stack((-sin, cos, none), dim=1)), dim=1)
        grid = F.affine_grid(turns, list(pictures.shape), align_corners=False)
        return F.grid_sample(pictures, grid, align_corners=False)

    return change


def thicken(pictures: Tensor) -> Tensor:
    """Return strokes two pixels thicker."""
    return F.max_pool2d(pictures, 3, stride=1, padding=1)


def thin(pictures: Tensor) -> Tensor:
    """Return strokes one pixel thinner."""
    return -F.max_pool2d(-F.pad(pictures, (0, 1, 0, 1)), 2, stride=1)


def coarsen(size: int) -> Change:
    """Return a change that averages pictures down to a size and draws them up again."""

    def change(pictures: Tensor) -> Tensor:
        small = F.interpolate(pictures, size=(size, size), mode="area")
        return F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)

    return change


def add_noise(deviation: float) -> Change:
    """Return a change that adds normal noise and keeps to [0, 1]."""

    def change(pictures: Tensor) -> Tensor:
        grain = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
        return (pictures + deviation * grain).clamp(0, 1)

    return change


CONDITIONS: dict[str, Change] = {
    "as they are": lambda pictures: pictures,
    **{f"shifted by {pixels} px": shift(pixels) for pixels in (1, 2, 3)},
    **{f"rotated by {degrees}°": rotate(degrees) for degrees in (10, 20, 30)},
    "strokes 2 px thicker": thicken,
    "strokes 1 px thinner": thin,
    "half the contrast": lambda pictures: pictures / 2,
    "drawn with 10 × 10 pixels": coarsen(10),
    **{f"noise of {deviation:g}": add_noise(deviation) for deviation in (0.1, 0.2, 0.3)},
    "inverted, as numbers": lambda pictures: 1 - pictures,
}


def measure_robustness(predictor: Predictor, test: Split) -> dict[str, float]:
    """Return the share of hits by condition: on the test split, and on scikit-learn's digits."""
    pictures = as_floats(test.inputs).reshape(-1, 1, SIDE, SIDE)
    found = {
        name: count_hits(predictor, Split(change(pictures).reshape(len(test), -1), test.targets))
        for name, change in CONDITIONS.items()
    }
    spec = predictor.manifest.input
    assert isinstance(spec, ImageInput)
    planes = test.inputs.reshape(-1, SIDE, SIDE).numpy()
    for name, shown in (("as a picture, prepared", planes), ("as an inverted picture, prepared", 255 - planes)):
        found[name] = count_hits(predictor, Split(prepare(shown, spec), test.targets))
    elsewhere = load_elsewhere(spec)
    found["scikit-learn's 8 × 8 digits, prepared"] = count_hits(predictor, elsewhere)
    return found


def count_hits(predictor: Predictor, split: Split) -> float:
    """Return the share of a split that is predicted right."""
    decided = postprocess.decide(predict(predictor, split), predictor.manifest)
    return float(np.mean(decided == split.targets.numpy()))


def prepare(pictures: NDArray[np.uint8], spec: ImageInput) -> Tensor:
    """Return grey pictures uint8 (N, height, width) as the service prepares them for a model, float32 (N, *shape)."""
    fitted = [fit_picture(Image.fromarray(picture), spec.image) for picture in pictures]
    return torch.from_numpy(np.stack(fitted).astype(np.float32)).reshape(len(fitted), *spec.shape)


@cache
def load_elsewhere(spec: ImageInput) -> Split:
    """Return scikit-learn's 1,797 digits, 8 × 8 with 17 levels, as 8 × 8 pictures through the service's preparation."""
    digits = load_digits()
    pictures = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Split(prepare(pictures, spec), torch.from_numpy(digits.target))
