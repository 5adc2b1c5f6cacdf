"""A long fit that was cut short resumes, and ends at exactly the net it would have given."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tests.training.digits import CONFIG, DroppingNet
from training import trainer as module
from training.checkpoint import load_checkpoint
from training.config import TrainConfig
from training.data import Split, Splits
from training.progress import Progress
from training.trainer import Fitted, Trainer


def build_trainer(splits: Splits, config: TrainConfig = CONFIG, net: nn.Module | None = None) -> Trainer:
    """Return a trainer of a small net."""
    return Trainer(net or DroppingNet(), "multiclass", config, splits.train, splits.validation)


def fit(
    splits: Splits,
    config: TrainConfig = CONFIG,
    checkpoint: Path | None = None,
    seed: int = 3,
    net: nn.Module | None = None,
) -> Fitted:
    """Return a small net after a fit."""
    torch.manual_seed(seed)
    return build_trainer(splits, config, net).fit("test", checkpoint=checkpoint)


def are_equal(first: Fitted, second: Fitted) -> bool:
    """Tell whether the parameters of two nets are equal bit for bit."""
    states: list[dict[str, Tensor]] = [first.net.state_dict(), second.net.state_dict()]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumed_is_bit_equal(
    optimizer: Literal["adamw", "sgd"], images: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit interrupted after two of four epochs and started again gives the same net as an uninterrupted one."""
    config = replace(CONFIG, optimizer=optimizer)
    whole = fit(images, config)
    monkeypatch.setattr(module, "CHECKPOINT_INTERVAL", 0.0)
    run_epoch = Trainer.run_epoch

    def run_two(self: Trainer, progress: Progress) -> object:
        if len(self.history) == 2:
            raise KeyboardInterrupt
        return run_epoch(self, progress)

    monkeypatch.setattr(Trainer, "run_epoch", run_two)
    with pytest.raises(KeyboardInterrupt):
        fit(images, config, tmp_path / "state.pt")
    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
    torch.rand(7)  # other random numbers drawn meanwhile do not matter
    resumed = fit(images, config, tmp_path / "state.pt")
    assert are_equal(resumed, whole)
    assert resumed.earlier_seconds > 0
    assert not are_equal(fit(images, config, seed=4), whole)


def test_finished_fit_is_resumed_at_once(images: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after the last epoch is saved too, so that a run which failed later need not fit again."""
    whole = fit(images, checkpoint=tmp_path / "state.pt")
    monkeypatch.delattr(Trainer, "run_epoch")
    assert are_equal(fit(images, checkpoint=tmp_path / "state.pt"), whole)


def test_state_of_another_fit_is_ignored(images: Splits, tmp_path: Path) -> None:
    """Another seed, other hyperparameters or other data start from the beginning."""
    checkpoint = tmp_path / "state.pt"
    fit(images, checkpoint=checkpoint)
    for seed, config in ((4, CONFIG), (3, replace(CONFIG, lr=0.002))):
        assert are_equal(fit(images, config, checkpoint, seed), fit(images, config, seed=seed))
    fewer = replace(images, train=Split(images.train.inputs[:64], images.train.targets[:64]))
    assert are_equal(fit(fewer, checkpoint=checkpoint), fit(fewer))


def test_state_of_another_net_is_ignored(images: Splits, tmp_path: Path) -> None:
    """A net with other layers starts from the beginning, with the same seed, hyperparameters and data."""
    fit(images, checkpoint=tmp_path / "state.pt")
    assert fit(images, checkpoint=tmp_path / "state.pt", net=nn.Linear(784, 10)).earlier_seconds == 0


def test_state_of_another_device_is_ignored(
    images: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random streams cannot continue on another device: the fit starts from the beginning, and says so."""
    fit(images, checkpoint=tmp_path / "state.pt")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    assert load_checkpoint(tmp_path / "state.pt", build_trainer(images).identity()) is None
    assert "another fit" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04half"])
def test_damaged_state_is_reported_and_ignored(
    content: bytes, images: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that cannot be read costs time and a line on stderr, and is replaced."""
    state = tmp_path / "state.pt"
    state.write_bytes(content)
    whole = fit(images, checkpoint=state)
    assert capsys.readouterr().err.splitlines()[0] == f"cannot read {state}; starting from the beginning"
    assert are_equal(fit(images, checkpoint=state), whole)
    assert f"resuming from {state} after epoch 4" in capsys.readouterr().err


def test_state_that_cannot_be_saved_does_not_end_the_fit(
    images: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that cannot be created is reported once; the fit is the same."""
    (tmp_path / "file").write_text("in the way")
    assert are_equal(fit(images, checkpoint=tmp_path / "file" / "state.pt"), fit(images))
    assert capsys.readouterr().err.count("cannot save") == 1
