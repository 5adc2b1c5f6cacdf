"""Augmentation moves, bends and thickens images as far as configured, and equally for equal seeds."""

from dataclasses import replace

import torch

from training.augment import SIDE, Augmentation, Augmenter, build_basis

STILL = Augmentation(rotation=0, scale=0, stretch=0, shear=0, shift=0, elastic=0)


def draw_square(count: int = 64) -> torch.Tensor:
    """Return images of a full 8 × 8 square in the middle, (count, 784)."""
    images = torch.zeros(count, SIDE, SIDE)
    images[:, 10:18, 10:18] = 1
    return images.reshape(count, -1)


def augment(amounts: Augmentation, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return images distorted from a seed, (N, 28, 28)."""
    return Augmenter(amounts, torch.Generator().manual_seed(seed))(images).reshape(-1, SIDE, SIDE)


def find_centres(images: torch.Tensor) -> torch.Tensor:
    """Return the centre of mass (N, 2), down and right."""
    places = torch.arange(SIDE).float()
    mass = images.sum(dim=(1, 2))
    down, right = (images.sum(dim=each) @ places / mass for each in (2, 1))
    return torch.stack((down, right), dim=1)


def test_nothing_asked_changes_nothing() -> None:
    """With all amounts at zero images are unchanged."""
    images = torch.rand(5, 784)
    torch.testing.assert_close(augment(STILL, images).reshape(5, -1), images, atol=1e-4, rtol=0)


def test_half_the_distortion() -> None:
    """Every affine and elastic amount is halved, and nothing else."""
    amounts = Augmentation(pen=0.1, coarse=0.2, noise=0.3)
    half = amounts.scale_distortions(0.5)
    assert half == Augmentation(6.0, 0.06, 0.06, 0.075, 1.0, 0.35, pen=0.1, coarse=0.2, noise=0.3)
    assert STILL.scale_distortions(3.0) == STILL


def test_shift_is_in_pixels() -> None:
    """Over many images, centres move by nearly the full amount in both directions."""
    moved = find_centres(augment(replace(STILL, shift=2.0), draw_square(400))) - 13.5
    assert 1.8 < moved.abs().max() < 2.01
    assert moved.mean().abs() < 0.3


def test_rotation_keeps_the_middle() -> None:
    """Rotated about the middle, a square keeps its centre and its ink, but changes."""
    turned = augment(replace(STILL, rotation=30), draw_square())
    assert (find_centres(turned) - 13.5).abs().max() < 0.05
    torch.testing.assert_close(turned.sum(dim=(1, 2)), torch.full((64,), 64.0), atol=2, rtol=0)
    assert (turned - draw_square().reshape(64, SIDE, SIDE)).abs().max() > 0.3


def test_scale_changes_the_ink() -> None:
    """A square scaled by up to 20 % per side has up to 1/0.67 of the ink."""
    ink = augment(replace(STILL, scale=0.2), draw_square(400)).sum(dim=(1, 2)) / 64
    assert 1.3 < ink.max() < 1.52
    assert 0.65 < ink.min() < 0.8


def test_elastic_moves_by_pixels_and_smoothly() -> None:
    """Knots of 1 pixel move centres by less than 2 pixels, each image differently."""
    moved = find_centres(augment(replace(STILL, elastic=1.0), draw_square(200))) - 13.5
    assert 0.2 < moved.std() < 1
    assert moved.abs().max() < 3


def test_pen_has_both_directions() -> None:
    """The first half of the images gains ink, the second loses some."""
    ink = augment(replace(STILL, pen=1.0), draw_square()).sum(dim=(1, 2))
    assert (ink[:32] > 64).all()
    assert (ink[32:] < 64).all()


def test_shares_are_shares() -> None:
    """Only the configured fraction of a batch changes, and all values stay in [0, 1]."""
    images = draw_square(100)
    for name in ("pen", "coarse", "noise"):
        changed = augment(replace(STILL, **{name: 0.2}), images)
        different = (changed.reshape(100, -1) - images).abs().amax(dim=1) > 1e-3
        assert 18 <= different.sum() <= 20
        assert 0 <= changed.min() <= changed.max() <= 1


def test_seed_decides() -> None:
    """Equal seeds give equal images, others do not, and torch's global generator is not used."""
    before = torch.get_rng_state()
    first, second, third = (augment(Augmentation(pen=0.5), draw_square(), seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), before)


def test_elastic_bumps_sum_to_one() -> None:
    """Moving all knots equally moves all pixels equally."""
    torch.testing.assert_close(build_basis()[3:].sum(dim=0), torch.ones(SIDE**2))
