"""The data sets are the tutorials', and their splits do not overlap."""

from pathlib import Path

import pytest
import torch
from torchvision.datasets import mnist

from training import data
from training.data import IndexBatches, Split
from training.errors import DataError


def test_half_plane_is_the_tutorials() -> None:
    """The points are `torch.manual_seed(123); randn(1000, 2)` and the labels follow the rule."""
    torch.manual_seed(123)
    points = torch.randn(1000, 2)
    splits = data.load_half_plane()
    assert torch.equal(splits.train.inputs, points)
    for split in (splits.train, splits.validation, splits.test):
        assert split is not None
        rule = 0.5 * split.inputs[:, 0] - 1.5 * split.inputs[:, 1] > 0
        assert torch.equal(split.targets[:, 0], rule.float())


def test_clouds_are_the_tutorials() -> None:
    """The points are those that the tutorial draws after `torch.manual_seed(10)`."""
    torch.manual_seed(10)
    ones = torch.ones(100, 2)
    first = torch.normal(1.7 * ones, 1) + 1
    second = torch.normal(-1.7 * ones, 1) + 1
    train = data.load_clouds().train
    assert torch.equal(train.inputs, torch.cat((first, second)))
    assert train.targets.flatten().tolist() == [0.0] * 100 + [1.0] * 100


def test_line_and_its_closed_form() -> None:
    """scikit-learn's true slope and the least squares line have the known values, and targets are a column."""
    train = data.load_line().train
    assert train.targets.shape == (100, 1)
    assert data.true_slope() == pytest.approx(42.3855, abs=1e-4)
    assert data.least_squares(train) == pytest.approx((42.6194, 13.6858), abs=1e-3)


def test_data_does_not_depend_on_the_seed_of_a_run() -> None:
    """Loading neither depends on torch's global generator nor advances it."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    digests = [load().digests() for load in (data.load_half_plane, data.load_clouds, data.load_line)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert digests == [load().digests() for load in (data.load_half_plane, data.load_clouds, data.load_line)]


def test_test_points_are_fresh() -> None:
    """No point is in two splits."""
    for load in (data.load_half_plane, data.load_clouds, data.load_line):
        splits = load()
        parts = [splits.train, splits.test] + [splits.validation] * (splits.validation is not None)
        points = [tuple(row) for part in parts if part is not None for row in part.inputs.tolist()]
        assert len(set(points)) == len(points)


def test_digest_sees_every_value_shape_and_dtype() -> None:
    """Splits that differ in one value, in shape or in dtype have different digests; equal ones have equal digests."""
    zeros = torch.zeros(4, 2)
    changed = zeros.clone()
    changed[3, 1] = 1
    labels = torch.zeros(4)
    splits = [Split(x, labels) for x in (zeros, changed, zeros.reshape(2, 4), zeros.double())]
    digests = [split.digest() for split in splits]
    assert len(set(digests)) == 4
    assert Split(zeros.clone(), labels.clone()).digest() == digests[0]


def test_index_batches() -> None:
    """An epoch yields every instance once as float32 in [0, 1], in a new order that depends on the seed."""
    split = Split(torch.arange(250, dtype=torch.uint8).reshape(250, 1), torch.arange(250))
    orders = []
    for _ in range(2):
        batches = IndexBatches(split, 64, torch.Generator().manual_seed(0))
        assert len(batches) == 4
        epochs = [list(batches), list(batches)]
        assert [len(targets) for _, targets in epochs[0]] == [64, 64, 64, 58]
        for inputs, targets in epochs[0]:
            assert inputs.dtype == torch.float32
            assert torch.equal(inputs[:, 0], targets.float() / 255)
        orders.append([torch.cat([targets for _, targets in epoch]) for epoch in epochs])
    assert torch.equal(orders[0][0].sort().values, torch.arange(250))
    assert not torch.equal(orders[0][0], orders[0][1])
    assert torch.equal(orders[0][1], orders[1][1])


def test_digits(mnist_dir: Path) -> None:
    """Training images are split 11/12 to 1/12 without overlap; the test images are separate."""
    splits = data.load_digits(mnist_dir)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (3667, 333, 1000)
    assert splits.train.inputs.dtype == torch.uint8
    assert splits.train.inputs.shape == (3667, 784)
    train = {row.numpy().tobytes() for row in splits.train.inputs}
    assert not train & {row.numpy().tobytes() for row in splits.validation.inputs}
    assert set(splits.digests()) == {"train", "validation", "test"}


def test_missing_mnist_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without files and network, the error names the folder, the option and the files to put there, in one line."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(mnist, "download_and_extract_archive", refuse)
    with pytest.raises(DataError) as caught:
        data.load_digits(tmp_path / "nowhere")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("cannot be downloaded", "--data-dir", "MNIST/raw", "-ubyte.gz"):
        assert part in message
