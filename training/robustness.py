"""Robustness: the accuracy of a digit model on test images that differ from MNIST's.

Each condition changes all images in the same way; only the noise is random, with a fixed seed. Two groups go through
the service's own preprocessing, as a client's images do: MNIST's in either polarity, and scikit-learn's 8 × 8 digits
(Alpaydin & Kaynak 1998, https://archive.ics.uci.edu/dataset/80), from other writers and another scanner.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from service.model import postprocess
from service.model.manifest import ImageInput
from service.model.predictor import Predictor
from service.model.preprocess import fit_picture
from training.augment import SIDE
from training.card import show, table
from training.data import Split, Splits, as_floats
from training.evaluate import predict
from training.trainer import Fitted

Change = Callable[[Tensor], Tensor]  # images float32 (N, 1, 28, 28) in [0, 1] to the same

_DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def shift(pixels: int) -> Change:
    """Return a change that moves images right, down, left and up in turn."""

    def change(images: Tensor) -> Tensor:
        moved = torch.zeros_like(images)
        padded = F.pad(images, (pixels,) * 4)
        for i, (down, right) in enumerate(_DIRECTIONS):
            top, left = pixels * (1 - down), pixels * (1 - right)
            moved[i::4] = padded[i::4, :, top : top + SIDE, left : left + SIDE]
        return moved

    return change


def rotate(degrees: float) -> Change:
    """Return a change that turns every other image clockwise and the others counterclockwise."""

    def change(images: Tensor) -> Tensor:
        angles = torch.full((len(images),), math.radians(degrees))
        angles[1::2] *= -1
        cos, sin, none = torch.cos(angles), torch.sin(angles), torch.zeros_like(angles)
        turns = torch.stack((torch.stack((cos, sin, none), dim=1), torch.stack((-sin, cos, none), dim=1)), dim=1)
        grid = F.affine_grid(turns, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    return change


def thicken(images: Tensor) -> Tensor:
    """Return strokes two pixels thicker."""
    return F.max_pool2d(images, 3, stride=1, padding=1)


def thin(images: Tensor) -> Tensor:
    """Return strokes one pixel thinner."""
    return -F.max_pool2d(-F.pad(images, (0, 1, 0, 1)), 2, stride=1)


def coarsen(size: int) -> Change:
    """Return a change that averages images down to a size and scales them up again."""

    def change(images: Tensor) -> Tensor:
        small = F.interpolate(images, size=(size, size), mode="area")
        return F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)

    return change


def add_noise(deviation: float) -> Change:
    """Return a change that adds normal noise, clipped to [0, 1]."""

    def change(images: Tensor) -> Tensor:
        grain = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + deviation * grain).clamp(0, 1)

    return change


CONDITIONS: dict[str, Change] = {
    "unchanged": lambda images: images,
    **{f"shifted by {pixels} px": shift(pixels) for pixels in (1, 2, 3)},
    **{f"rotated by {degrees}°": rotate(degrees) for degrees in (10, 20, 30)},
    "strokes 2 px thicker": thicken,
    "strokes 1 px thinner": thin,
    "half the contrast": lambda images: images / 2,
    "reduced to 10 × 10 pixels": coarsen(10),
    **{f"noise of {deviation:g}": add_noise(deviation) for deviation in (0.1, 0.2, 0.3)},
    "inverted, as numbers": lambda images: 1 - images,
}


def write_robustness(fitted: Fitted, splits: Splits, predictor: Predictor) -> dict[str, str]:
    """Return the card's part on robustness."""
    del fitted
    found = measure_robustness(predictor, splits.test)
    rows = [[name, show("accuracy", share)] for name, share in found.items()]
    return {"Robustness": "Accuracy on changed test images:\n\n" + table(["images", "accuracy"], rows)}


def measure_robustness(predictor: Predictor, test: Split) -> dict[str, float]:
    """Return the accuracy by condition: on the test split, and on scikit-learn's digits."""
    images = as_floats(test.inputs).reshape(-1, 1, SIDE, SIDE)
    found = {
        name: measure_accuracy(predictor, Split(change(images).reshape(len(test), -1), test.targets))
        for name, change in CONDITIONS.items()
    }
    spec = predictor.manifest.input
    assert isinstance(spec, ImageInput)
    planes = test.inputs.reshape(-1, SIDE, SIDE).numpy()
    for name, shown in (("as an image file", planes), ("as an inverted image file", 255 - planes)):
        found[name] = measure_accuracy(predictor, Split(prepare(shown, spec), test.targets))
    found["scikit-learn's 8 × 8 digits"] = measure_accuracy(predictor, load_sklearn_digits(spec))
    return found


def measure_accuracy(predictor: Predictor, split: Split) -> float:
    """Return the accuracy on a split."""
    decided = postprocess.decide(predict(predictor, split), predictor.manifest)
    return float(np.mean(decided == split.targets.numpy()))


def prepare(images: NDArray[np.uint8], spec: ImageInput) -> Tensor:
    """Return grey images uint8 (N, height, width) as the service prepares them for a model, float32 (N, *shape)."""
    fitted = [fit_picture(Image.fromarray(image), spec.image) for image in images]
    return torch.from_numpy(np.stack(fitted).astype(np.float32)).reshape(len(fitted), *spec.shape)


@cache
def load_sklearn_digits(spec: ImageInput) -> Split:
    """Return scikit-learn's 1,797 digits, 8 × 8 with 17 levels, as the service prepares such images."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Split(prepare(images, spec), torch.from_numpy(digits.target))
