"""Augmentation: random distortions, stroke widths, resolutions and noise of training images.

A batch is warped at once: one matrix product makes the sampling grids of all images, one `grid_sample` reads them.
Affine and elastic distortions are those of Simard et al. 2003 (Best practices for convolutional neural networks applied
to visual document analysis); stroke width, resolution and noise stand for pens, scanners and pads not in MNIST.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

SIDE = 28
_KNOTS = 5  # per side of the elastic field
_AFFINE = 3  # x, y and 1


@dataclass(frozen=True)
class Augmentation:
    """How far images are distorted. Lengths are pixels of 28; amounts are drawn anew for each image.

    `rotation` (degrees), `scale` (fraction), `stretch` (fraction, width against height), `shear` and `shift` bound
    uniform draws; `elastic` is the standard deviation of the knots of a 5 × 5 grid. `pen`, `coarse` and `noise` are
    the fractions of images with thicker or thinner strokes, a resolution of 9 to 16 pixels, and noise.
    """

    rotation: float = 12.0
    scale: float = 0.12
    stretch: float = 0.12
    shear: float = 0.15
    shift: float = 2.0
    elastic: float = 0.7
    pen: float = 0.0
    coarse: float = 0.0
    noise: float = 0.0

    def scale_distortions(self, factor: float) -> "Augmentation":
        """Return these amounts with the affine and elastic ones multiplied by a factor."""
        lengths = ("rotation", "scale", "stretch", "shear", "shift", "elastic")
        return replace(self, **{name: factor * getattr(self, name) for name in lengths})


class Augmenter:
    """Distorts batches of images on the device of its random generator."""

    def __init__(self, amounts: Augmentation, generator: torch.Generator) -> None:
        self._amounts = amounts
        self._generator = generator
        self._device = generator.device
        self._basis = build_basis().to(self._device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return distorted images, float32 (N, 784) in [0, 1]; it assumes that a batch is in random order."""
        images = self._warp(pixels.reshape(-1, 1, SIDE, SIDE))
        count = len(images)
        stages = (
            (self._amounts.pen, self._change_pen),
            (self._amounts.coarse, self._coarsen),
            (self._amounts.noise, self._add_noise),
        )
        start = 0
        for share, change in stages:  # each changes its own part of the batch
            stop = start + round(share * count)
            if stop > start:
                images[start:stop] = change(images[start:stop])
            start = stop
        return images.reshape(count, -1)

    def _warp(self, images: Tensor) -> Tensor:
        count = len(images)
        planes = self._draw_coefficients(count).reshape(2 * count, -1) @ self._basis  # x, then y, of every pixel
        grid = planes.reshape(count, 2, SIDE, SIDE).permute(0, 2, 3, 1)
        return F.grid_sample(images, grid, align_corners=False)

    def _draw_coefficients(self, count: int) -> Tensor:
        """Return the coefficients of the basis, (N, 2, 3 + 25): the affine map and the elastic knots."""
        amounts = self._amounts
        turn, size, stretch, shear, right, down = self._uniform(6, count)
        angle = turn * math.radians(amounts.rotation)
        wide = torch.exp(amounts.scale * size + amounts.stretch * stretch)
        tall = torch.exp(amounts.scale * size - amounts.stretch * stretch)
        cos, sin, lean = torch.cos(angle), torch.sin(angle), amounts.shear * shear
        pixel = 2 / SIDE  # the grid runs from −1 to 1
        move = amounts.shift * pixel
        affine = torch.stack(
            [
                torch.stack([cos * wide, (cos * lean - sin) * wide, right * move], dim=1),
                torch.stack([sin * tall, (sin * lean + cos) * tall, down * move], dim=1),
            ],
            dim=1,
        )
        knots = torch.randn(count, 2, _KNOTS**2, generator=self._generator, device=self._device)
        return torch.cat((affine, knots * (amounts.elastic * pixel)), dim=2)

    def _change_pen(self, images: Tensor) -> Tensor:
        """Return thicker strokes for the first half and thinner ones for the second: blends with a 3 × 3 max or min."""
        half = len(images) // 2
        thick = F.max_pool2d(images[:half], 3, stride=1, padding=1)
        thin = -F.max_pool2d(-images[half:], 3, stride=1, padding=1)
        amount = self._share(len(images))
        return torch.lerp(images, torch.cat((thick, thin)), 0.8 * amount)

    def _coarsen(self, images: Tensor) -> Tensor:
        """Return images averaged down to few pixels and scaled up again, at full contrast as after preparation."""
        size = int(torch.randint(9, 17, (1,), generator=self._generator, device=self._device))
        small = F.interpolate(images, size=(size, size), mode="area")
        large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        peak = large.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)
        return (large / peak * (1 + 0.3 * self._share(len(images)))).clamp(max=1)

    def _add_noise(self, images: Tensor) -> Tensor:
        grain = torch.randn(images.shape, generator=self._generator, device=self._device)
        return (images + 0.2 * self._share(len(images)) * grain).clamp(0, 1)

    def _uniform(self, rows: int, count: int) -> Tensor:
        return torch.rand(rows, count, generator=self._generator, device=self._device) * 2 - 1

    def _share(self, count: int) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=self._generator, device=self._device)


def build_basis() -> Tensor:
    """Return the basis of sampling grids, float32 (3 + 25, 784): x, y, 1, and a smooth bump for each knot."""
    places = (torch.arange(SIDE) * 2 + 1) / SIDE - 1
    down, right = torch.meshgrid(places, places, indexing="ij")
    plane = torch.stack([right, down, torch.ones_like(right)]).reshape(_AFFINE, -1)
    knots = torch.eye(_KNOTS**2).reshape(1, _KNOTS**2, _KNOTS, _KNOTS)
    bumps = F.interpolate(knots, size=(SIDE, SIDE), mode="bicubic", align_corners=True)
    return torch.cat((plane, bumps.reshape(_KNOTS**2, -1)))
