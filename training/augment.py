"""Augmentation: each training picture as another hand, pen or camera might have made it.

A batch is warped at once: one matrix product makes the sampling grid of every picture, one `grid_sample` reads them.
Affine and elastic distortions are those of Simard et al. 2003 (Best practices for convolutional neural networks applied
to visual document analysis); pen width, resolution and noise stand for pens, scanners and pads that MNIST has not seen.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

SIDE = 28
_KNOTS = 5  # of the elastic field, a side
_AFFINE = 3  # x, y and 1


@dataclass(frozen=True)
class Augmentation:
    """How far pictures are distorted. Lengths are pixels of 28; each amount is drawn for each picture anew.

    `rotation` (degrees), `scale` (share), `stretch` (share, width against height), `shear` and `shift` are the greatest
    amounts of uniform draws; `elastic` is the standard deviation of the knots of a 5 × 5 grid. `pen`, `coarse` and
    `noise` are the shares of pictures with thicker or thinner strokes, a resolution of 9 to 16 pixels, and grain.
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

    def distorting(self, share: float) -> "Augmentation":
        """Return these amounts with affine and elastic distortions of that share; pens, resolutions and grain stay."""
        lengths = ("rotation", "scale", "stretch", "shear", "shift", "elastic")
        return replace(self, **{name: share * getattr(self, name) for name in lengths})


class Augmenter:
    """Distorts batches of pictures with a random stream of its own, on the device of its generator."""

    def __init__(self, amounts: Augmentation, generator: torch.Generator) -> None:
        self._amounts = amounts
        self._generator = generator
        self._device = generator.device
        self._basis = build_basis().to(self._device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 (N, 784) in [0, 1], distorted; the pictures of a batch are taken to be in random order."""
        pictures = self._warp(pixels.reshape(-1, 1, SIDE, SIDE))
        count = len(pictures)
        stages = (
            (self._amounts.pen, self._change_pen),
            (self._amounts.coarse, self._coarsen),
            (self._amounts.noise, self._add_noise),
        )
        start = 0
        for share, change in stages:  # each its own part of the batch
            stop = start + round(share * count)
            if stop > start:
                pictures[start:stop] = change(pictures[start:stop])
            start = stop
        return pictures.reshape(count, -1)

    def _warp(self, pictures: Tensor) -> Tensor:
        count = len(pictures)
        planes = self._draw_coefficients(count).reshape(2 * count, -1) @ self._basis  # x, then y, of every pixel
        grid = planes.reshape(count, 2, SIDE, SIDE).permute(0, 2, 3, 1)
        return F.grid_sample(pictures, grid, align_corners=False)

    def _draw_coefficients(self, count: int) -> Tensor:
        """Return what the basis is multiplied by, (N, 2, 3 + 25): the affine map and the elastic knots."""
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

    def _change_pen(self, pictures: Tensor) -> Tensor:
        """Return thicker strokes for the first half and thinner ones for the second: blends with a 3 × 3 max or min."""
        half = len(pictures) // 2
        thick = F.max_pool2d(pictures[:half], 3, stride=1, padding=1)
        thin = -F.max_pool2d(-pictures[half:], 3, stride=1, padding=1)
        amount = self._share(len(pictures))
        return torch.lerp(pictures, torch.cat((thick, thin)), 0.8 * amount)

    def _coarsen(self, pictures: Tensor) -> Tensor:
        """Return pictures as from few pixels: averaged down, drawn up again, the ink made full as preparation does."""
        size = int(torch.randint(9, 17, (1,), generator=self._generator, device=self._device))
        small = F.interpolate(pictures, size=(size, size), mode="area")
        large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        peak = large.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)
        return (large / peak * (1 + 0.3 * self._share(len(pictures)))).clamp(max=1)

    def _add_noise(self, pictures: Tensor) -> Tensor:
        grain = torch.randn(pictures.shape, generator=self._generator, device=self._device)
        return (pictures + 0.2 * self._share(len(pictures)) * grain).clamp(0, 1)

    def _uniform(self, rows: int, count: int) -> Tensor:
        return torch.rand(rows, count, generator=self._generator, device=self._device) * 2 - 1

    def _share(self, count: int) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=self._generator, device=self._device)


def build_basis() -> Tensor:
    """Return what a sampling grid is a mixture of, float32 (3 + 25, 784): x, y, 1, and each knot's smooth bump."""
    places = (torch.arange(SIDE) * 2 + 1) / SIDE - 1
    down, right = torch.meshgrid(places, places, indexing="ij")
    plane = torch.stack([right, down, torch.ones_like(right)]).reshape(_AFFINE, -1)
    knots = torch.eye(_KNOTS**2).reshape(1, _KNOTS**2, _KNOTS, _KNOTS)
    bumps = F.interpolate(knots, size=(SIDE, SIDE), mode="bicubic", align_corners=True)
    return torch.cat((plane, bumps.reshape(_KNOTS**2, -1)))
