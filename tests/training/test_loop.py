"""The training loop counts, keeps the best epoch, stops when told, and refuses a loss that is not finite."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from training.data import Split
from training.errors import CheckError
from training.loop import Learner, count_correct, fit, measure
from training.nets import LinearNet
from training.progress import Epoch, Progress

INPUTS = torch.tensor([[-2.0], [-1.0], [1.0], [2.0], [3.0]])
TARGETS = (INPUTS > 0).float()


def build_learner(lr: float = 0.1, reduction: str = "mean") -> Learner:
    """Return a small binary learner from fixed parameters."""
    net = LinearNet(1)
    nn.init.constant_(net.weight, 0.5)
    nn.init.zeros_(net.bias)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    return Learner(net, nn.BCEWithLogitsLoss(reduction=reduction), optimizer, "binary")


def run_fit(learner: Learner, epochs: int, batch_size: int = 2, **options: object) -> list[Epoch]:
    """Fit on the five points."""
    loader = DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=batch_size)
    with Progress("test", epochs, len(loader)) as progress:
        return fit(learner, loader, epochs, progress, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_epoch_loss_weighs_instances_not_batches(reduction: str) -> None:
    """With a rate of 0, an epoch in batches of 2, 2 and 1 has the loss of all five points at once."""
    learner = build_learner(lr=0.0, reduction=reduction)
    epoch = run_fit(learner, 1)[0]
    whole = learner.criterion(learner.net(INPUTS), TARGETS).item()
    assert epoch.loss == pytest.approx(whole)
    assert epoch.accuracy == 1
    assert measure(learner, Split(INPUTS, TARGETS)).loss == pytest.approx(whole)


def test_best_epoch_is_kept() -> None:
    """With validation labels turned round, every step does harm: the net ends as it was after the first epoch."""
    learner = build_learner()
    validation = Split(INPUTS, 1 - TARGETS)
    history = run_fit(learner, 5, validation=validation)
    losses = [epoch.validation_loss for epoch in history]
    assert losses == sorted(losses, key=lambda loss: loss or 0)
    assert measure(learner, validation).loss == pytest.approx(losses[0])


def test_stop() -> None:
    """Training ends after the epoch for which `stop` says True, and `stop` sees every epoch's number."""
    seen: list[int] = []

    def stop(number: int) -> bool:
        seen.append(number)
        return number == 3

    assert len(run_fit(build_learner(), 10, stop=stop)) == 3
    assert seen == [1, 2, 3]


def test_loss_that_is_not_finite_ends_the_run() -> None:
    """A rate that blows the parameters up raises, and says in which epoch."""
    net = LinearNet(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e30)
    learner = Learner(net, nn.MSELoss(), optimizer, "regression")
    with pytest.raises(CheckError, match=r"training loss became (nan|inf) in epoch"):
        run_fit(learner, 10)


def test_count_correct() -> None:
    """A logit of exactly 0 is probability 0.5 and counts as class 1; the largest of several logits wins."""
    assert count_correct(torch.tensor([[0.0], [-1.0]]), torch.tensor([[1.0], [1.0]]), "binary") == 1
    assert count_correct(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]), "multiclass") == 1


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal, about ten lines with loss and accuracy go to stdout, and nothing to stderr."""
    run_fit(build_learner(), 100)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("test: epoch 100/100  loss 0.")
    assert "accuracy 1.0000" in lines[-1]
    assert captured.err == ""


def test_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a bar with loss and accuracy goes to stderr, and nothing to stdout."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run_fit(build_learner(), 100)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "epoch 100/100" in captured.err
    assert "accuracy 1.0000" in captured.err
