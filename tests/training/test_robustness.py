"""Each condition changes images as its name says; other images go through the service's preprocessing."""

import pytest
import torch

from service.model.manifest import ImageInput
from training.recipes import RECIPES
from training.robustness import CONDITIONS, coarsen, load_sklearn_digits, prepare, rotate, shift, thicken, thin

SPEC = RECIPES["mnist"].input
SIDE = 28


def draw_bar() -> torch.Tensor:
    """Return four images of an upright bar, 4 × 12, in the middle, (4, 1, 28, 28)."""
    images = torch.zeros(4, 1, SIDE, SIDE)
    images[:, :, 8:20, 12:16] = 1
    return images


def test_shift_goes_in_four_directions() -> None:
    """Right, down, left and up by exactly the pixels."""
    moved = shift(2)(draw_bar())
    corners = [tuple(int(each) for each in image[0].nonzero()[0]) for image in moved]
    assert corners == [(8, 14), (10, 12), (8, 10), (6, 12)]
    assert torch.equal(moved.sum(dim=(1, 2, 3)), torch.full((4,), 48.0))


def test_rotation_goes_both_ways() -> None:
    """Rotated by 90° a bar lies flat; by 20° neighbours are mirror images."""
    bar = draw_bar()
    torch.testing.assert_close(rotate(90)(bar), bar.transpose(2, 3), atol=1e-4, rtol=0)
    turned = rotate(20)(bar)
    torch.testing.assert_close(turned[0], turned[1].flip(2), atol=1e-4, rtol=0)


def test_strokes() -> None:
    """A 4 × 12 bar becomes 6 × 14 thickened, and 3 × 11 thinned."""
    assert thicken(draw_bar())[0].sum() == 6 * 14
    assert thin(draw_bar())[0].sum() == 3 * 11
    assert thin(draw_bar()).shape == (4, 1, SIDE, SIDE)


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_keep_shape_and_range(name: str) -> None:
    """Shape and range are kept, and the input is not modified."""
    given = draw_bar()
    changed = CONDITIONS[name](given)
    assert changed.shape == given.shape
    assert 0 <= changed.min() <= changed.max() <= 1
    assert torch.equal(given, draw_bar())


def test_coarse_pictures_keep_their_ink() -> None:
    """Averaging down and scaling up spreads the ink and keeps nearly all of it."""
    assert coarsen(14)(draw_bar())[0].sum() == pytest.approx(48, rel=0.02)


def test_sklearn_digits_are_prepared() -> None:
    """1,797 images, full ink, centred by mass as MNIST's are."""
    assert isinstance(SPEC, ImageInput)
    split = load_sklearn_digits(SPEC)
    assert split.inputs.shape == (1797, 784)
    assert split.inputs.max() == 1
    rows = split.inputs.reshape(-1, SIDE, SIDE).sum(dim=2)
    centres = (rows @ torch.arange(SIDE).float()) / rows.sum(dim=1)
    assert (centres - 14).abs().max() < 0.6


def test_polarity_does_not_matter_to_preparation() -> None:
    """An image and its inverse are prepared equally."""
    assert isinstance(SPEC, ImageInput)
    image = (draw_bar()[:, 0] * 255).byte().numpy()
    torch.testing.assert_close(prepare(image, SPEC), prepare(255 - image, SPEC), atol=0.01, rtol=0)
