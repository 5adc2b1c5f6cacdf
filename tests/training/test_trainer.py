"""The trainer keeps the best epoch, averages weights, stops when told, and refuses a loss that is not finite."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.digits import CONFIG, DroppingNet
from training import trainer as module
from training.augment import Augmentation, Augmenter
from training.config import TrainConfig
from training.data import Split, Splits, as_floats
from training.errors import CheckError
from training.nets import LinearNet, NormedDigitsNet
from training.progress import Progress
from training.trainer import Trainer, set_training

INPUTS = torch.tensor([[-2.0], [-1.0], [1.0], [2.0], [3.0]])
POINTS = Split(INPUTS, (INPUTS > 0).float())


def build_trainer(epochs: int = 5, validation: Split | None = None, **changes: Any) -> Trainer:
    """Return a trainer of a small binary classifier, from fixed parameters, on five points."""
    net = LinearNet(1)
    nn.init.constant_(net.weight, 0.5)
    nn.init.zeros_(net.bias)
    config = replace(TrainConfig(epochs, batch_size=2, lr=0.1), **changes)
    return Trainer(net, "binary", config, POINTS, validation)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_epoch_loss_weighs_instances_not_batches(reduction: str) -> None:
    """With a learning rate of 0, an epoch in batches of 2, 2 and 1 has the loss of all five points at once."""
    trainer = build_trainer(epochs=1, lr=0.0, reduction=reduction)
    epoch = trainer.fit("test").history[0]
    whole = trainer.criterion(trainer.net(INPUTS), POINTS.targets).item()
    assert epoch.loss == pytest.approx(whole)
    assert epoch.accuracy == 1
    assert trainer.validate(POINTS).loss == pytest.approx(whole)


def test_best_epoch_is_kept() -> None:
    """With inverted validation labels every step does harm: the net ends as it was after the first epoch."""
    inverted = Split(INPUTS, 1 - POINTS.targets)
    trainer = build_trainer(validation=inverted)
    losses = [epoch.validation_loss for epoch in trainer.fit("test").history]
    assert losses == sorted(losses, key=lambda loss: loss or 0)
    assert trainer.validate(inverted).loss == pytest.approx(losses[0])


def test_best_average_is_kept(images: Splits) -> None:
    """The net ends as the average with the lowest validation loss, which the history shows."""
    torch.manual_seed(0)
    net, validation = NormedDigitsNet(0.13, 1.0), images.validation
    assert validation is not None
    fitted = Trainer(net, "multiclass", replace(CONFIG, epochs=6, lr=0.05), images.train, validation).fit("test")
    with torch.no_grad():
        logits = net(as_floats(validation.inputs))
    loss = nn.functional.cross_entropy(logits, validation.targets, label_smoothing=0.05).item()
    assert loss == pytest.approx(min(epoch.validation_loss or 9 for epoch in fitted.history), abs=1e-5)
    assert not net.training


def test_last_average_is_kept_without_validation(images: Splits) -> None:
    """With no validation split, the net ends as the average after the last epoch."""
    torch.manual_seed(0)
    trainer = Trainer(DroppingNet(), "multiclass", CONFIG, images.train)
    net = trainer.fit("test").net
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in trainer.ema.state_dict().items())


def test_stop() -> None:
    """Training ends after the epoch for which `stop` returns a reason; it is called with every epoch's number."""
    seen: list[int] = []

    def stop(number: int) -> str:
        seen.append(number)
        return "three are enough" if number == 3 else ""

    assert len(build_trainer(epochs=10).fit("test", stop).history) == 3
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("validated", [False, True])
def test_loss_that_is_not_finite_ends_the_fit(images: Splits, validated: bool) -> None:
    """A diverging fit raises, and says in which epoch."""
    config = replace(CONFIG, lr=1e30, optimizer="sgd")
    trainer = Trainer(DroppingNet(), "multiclass", config, images.train, images.validation if validated else None)
    with pytest.raises(CheckError, match=r"training loss became (nan|inf) in epoch"):
        trainer.fit("test")


def test_average_follows_the_weights(images: Splits) -> None:
    """The average of weights that do not change is those weights; its net stays in evaluation mode."""
    torch.manual_seed(0)
    net, config = DroppingNet(), replace(CONFIG, lr=0.0, weight_decay=0.0)
    trainer = Trainer(net, "multiclass", config, images.train, images.validation)
    with Progress("test", 1, 4) as progress:
        trainer.run_epoch(progress)
    assert torch.equal(trainer.ema.state_dict()["0.weight"], net.state_dict()["0.weight"])
    assert not trainer.ema.training


def test_average_is_the_formula(images: Splits) -> None:
    """The first step gives 1/11 of the start and 10/11 of the new weights; there is one average per step."""
    trainer = Trainer(DroppingNet(), "multiclass", replace(CONFIG, ema_decay=0.999), images.train)
    before = trainer.net.state_dict()["0.weight"].clone()
    trainer.train_step(as_floats(images.train.inputs[:32]), images.train.targets[:32])
    after = trainer.net.state_dict()["0.weight"]
    torch.testing.assert_close(trainer.ema.state_dict()["0.weight"], before / 11 + after * 10 / 11)
    assert not torch.equal(before, after)


def test_last_epochs_are_the_finetune_phase(images: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last epochs have their own augmentation, and no dropout."""
    seen: list[tuple[Augmentation, bool]] = []

    class Watched(Augmenter):
        def __init__(self, amounts: Augmentation, generator: torch.Generator) -> None:
            super().__init__(amounts, generator)
            seen.append((amounts, net[2].training))

    monkeypatch.setattr(module, "Augmenter", Watched)
    net = DroppingNet()
    Trainer(net, "multiclass", CONFIG, images.train, images.validation).fit("test")
    assert CONFIG.augmentation is not None
    assert CONFIG.finetune_augmentation is not None
    assert seen == [(CONFIG.augmentation, True)] * 3 + [(CONFIG.finetune_augmentation, False)]


def test_only_dropout_is_switched_off() -> None:
    """Batch norms stay in training mode; dropout comes back."""
    net = DroppingNet()
    for dropout in (False, True):
        set_training(net, dropout)
        assert [layer.training for layer in net] == [True, True, dropout, True]
