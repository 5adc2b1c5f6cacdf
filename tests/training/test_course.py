"""A long fit that is cut short goes on to the very net it would have given; rate and average are as described."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from training import course as module
from training.augment import Augmentation, Augmenter
from training.checkpoint import load_checkpoint
from training.course import (
    Course,
    Follower,
    build_optimizer,
    build_schedule,
    follow,
    identify,
    is_gentle,
    set_training,
)
from training.data import Split, Splits, as_floats
from training.errors import CheckError
from training.nets import NormedDigitsNet
from training.progress import Progress

CPU = torch.device("cpu")
COURSE = Course(
    epochs=4,
    batch_size=32,
    optimizer="adamw",
    rate=0.004,
    weight_decay=0.02,
    smoothing=0.05,
    average=0.9,
    augmentation=Augmentation(pen=0.1, coarse=0.1, noise=0.1),
    gentle=0.25,
    gentle_augmentation=Augmentation(rotation=2.0, pen=0.2),
)


class DroppingNet(nn.Sequential):
    """A small net with everything that has a state: batch norm, and dropout from torch's global generator."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(784, 16, bias=False), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 10))


@pytest.fixture(scope="module")
def splits() -> Splits:
    """128 pictures of noise with a bright row that is their label, and as many for validation."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 60, (256, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(256) % 10
    pictures[torch.arange(256), 4 + 2 * labels] = 255
    flat = pictures.reshape(256, -1)
    return Splits(
        Split(flat[:128], labels[:128]), Split(flat[:1], labels[:1]), validation=Split(flat[128:], labels[128:])
    )


def fit(splits: Splits, course: Course, checkpoint: Path | None = None, seed: int = 3) -> dict[str, Tensor]:
    """Return what a small net is after a course."""
    torch.manual_seed(seed)
    net = DroppingNet()
    follow(net, course, splits, CPU, "test", checkpoint)
    return net.state_dict()


def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tell whether two states are the same, bit for bit."""
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumed_is_bit_equal(
    optimizer: Literal["adamw", "sgd"], splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that ends after two of four epochs, and is started again, gives the same net as one that went through."""
    course = replace(COURSE, optimizer=optimizer)
    whole = fit(splits, course)
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 0.0)
    run_epoch = Follower.run_epoch

    def run_two(self: Follower, progress: Progress) -> object:
        if len(self.history) == 2:
            raise KeyboardInterrupt
        return run_epoch(self, progress)

    monkeypatch.setattr(Follower, "run_epoch", run_two)
    with pytest.raises(KeyboardInterrupt):
        fit(splits, course, tmp_path / "state.pt")
    monkeypatch.setattr(Follower, "run_epoch", run_epoch)
    torch.rand(7)  # what else happened meanwhile does not matter
    assert are_equal(fit(splits, course, tmp_path / "state.pt"), whole)
    assert not are_equal(fit(splits, course, seed=4), whole)


def test_finished_fit_is_taken_up_at_once(splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after the last epoch is kept too, so that a run which failed later need not fit again."""
    whole = fit(splits, COURSE, tmp_path / "state.pt")
    monkeypatch.delattr(Follower, "run_epoch")
    assert are_equal(fit(splits, COURSE, tmp_path / "state.pt"), whole)


def test_state_of_another_fit_is_not_taken_up(splits: Splits, tmp_path: Path) -> None:
    """Another seed, another course or other data begin anew."""
    checkpoint = tmp_path / "state.pt"
    fit(splits, COURSE, checkpoint)
    for seed, course in ((4, COURSE), (3, replace(COURSE, rate=0.002))):
        assert are_equal(fit(splits, course, checkpoint, seed), fit(splits, course, seed=seed))
    fewer = replace(splits, train=Split(splits.train.inputs[:64], splits.train.targets[:64]))
    assert are_equal(fit(fewer, COURSE, checkpoint), fit(fewer, COURSE))


def test_state_of_another_net_is_not_taken_up(splits: Splits, tmp_path: Path) -> None:
    """A net whose layers were changed begins anew, with the same seed, course and data."""
    fit(splits, COURSE, tmp_path / "state.pt")
    torch.manual_seed(3)
    followed = follow(nn.Linear(784, 10), COURSE, splits, CPU, "test", tmp_path / "state.pt")
    assert followed.earlier_seconds == 0


def test_state_of_another_device_is_not_taken_up(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random streams of one device cannot go on on another: a fit begins anew, and says so."""
    fit(splits, COURSE, tmp_path / "state.pt")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    assert (
        load_checkpoint(tmp_path / "state.pt", identify(Follower(DroppingNet(), COURSE, splits, CPU), splits)) is None
    )
    assert "another fit" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04half"])
def test_damaged_state_is_said_and_not_taken_up(
    content: bytes, splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that cannot be read costs time and a line, and is replaced."""
    state = tmp_path / "state.pt"
    state.write_bytes(content)
    whole = fit(splits, COURSE, state)
    assert capsys.readouterr().err.splitlines()[0] == f"{state} cannot be read; beginning anew"
    assert are_equal(fit(splits, COURSE, state), whole)
    assert f"going on from {state}, after epoch 4" in capsys.readouterr().err


def test_state_that_cannot_be_kept_ends_nothing(
    splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that cannot be made is said once; the fit is the same."""
    (tmp_path / "file").write_text("in the way")
    assert are_equal(fit(splits, COURSE, tmp_path / "file" / "state.pt"), fit(splits, COURSE))
    assert capsys.readouterr().err.count("no state is kept") == 1


def test_best_average_is_kept(splits: Splits) -> None:
    """The net ends as the average with the lowest validation loss, which the history says."""
    torch.manual_seed(0)
    net = NormedDigitsNet(0.13, 1.0)
    followed = follow(net, replace(COURSE, epochs=6, rate=0.05), splits, CPU, "test", None)
    validation = splits.validation
    assert validation is not None
    with torch.no_grad():
        logits = net(as_floats(validation.inputs))
    loss = nn.functional.cross_entropy(logits, validation.targets, label_smoothing=0.05).item()
    assert loss == pytest.approx(min(epoch.validation_loss or 9 for epoch in followed.history), abs=1e-5)
    assert not net.training


def test_average_follows_the_net(splits: Splits) -> None:
    """After many steps without change the average is the net; at first it is nearly so."""
    torch.manual_seed(0)
    follower = Follower(DroppingNet(), replace(COURSE, rate=0.0, weight_decay=0.0), splits, CPU)
    before = follower.average[0].weight.clone()  # type: ignore[index]
    with Progress("test", 1, 4) as progress:
        follower.run_epoch(progress)
    assert torch.equal(follower.average[0].weight, before)  # type: ignore[index]
    assert not follower.average.training


def test_rate_rises_and_falls() -> None:
    """From 4 % of the rate up to all of it, level until the fall begins, and down to nothing at the end."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = build_schedule(optimizer, replace(COURSE, warmup=0.2, fall=0.5), steps=100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.02)
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:51] == pytest.approx([0.5] * 31, rel=1e-3)
    assert rates[75] == pytest.approx(0.25, rel=1e-2)
    assert rates[-1] < 0.001


def test_last_epochs_are_gentle(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of epochs that is gentle is the last; those see their own pictures, and drop nothing out."""
    seen: list[tuple[Augmentation, bool]] = []

    class Watched(Augmenter):
        def __init__(self, amounts: Augmentation, generator: torch.Generator) -> None:
            super().__init__(amounts, generator)
            seen.append((amounts, dropout.training))

    monkeypatch.setattr(module, "Augmenter", Watched)
    net = DroppingNet()
    dropout = net[2]
    follow(net, COURSE, splits, CPU, "test", None)
    assert seen == [(COURSE.augmentation, True)] * 3 + [(COURSE.gentle_augmentation, False)]
    assert not any(is_gentle(replace(COURSE, gentle=0.0), epoch) for epoch in range(4))


def test_norms_go_on_learning_without_dropout() -> None:
    """Dropout alone is switched off, and on again."""
    net = DroppingNet()
    for dropout in (False, True):
        set_training(net, dropout)
        assert [layer.training for layer in net] == [True, True, dropout, True]


def test_gains_and_biases_do_not_decay() -> None:
    """Only what multiplies inputs decays."""
    decaying, free = build_optimizer(DroppingNet(), COURSE).param_groups
    assert [each.ndim for each in decaying["params"]] == [2, 2]
    assert [each.ndim for each in free["params"]] == [1, 1, 1]
    assert free["weight_decay"] == 0


def test_loss_that_is_not_finite_ends_the_fit(splits: Splits) -> None:
    """A rate that throws the net away is said, not published."""
    with pytest.raises(CheckError, match="loss became"):
        fit(splits, replace(COURSE, rate=1e30, optimizer="sgd"))
