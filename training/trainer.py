"""The training loop of every recipe that is not written by hand. It knows no data set and no file format."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from service.model.manifest import Task
from training.augment import Augmenter
from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import TrainConfig, build_criterion, build_optimizer, build_schedule
from training.data import IndexBatches, Split, as_floats
from training.errors import CheckError
from training.progress import Epoch, Progress
from training.tally import Tally

EVALUATION_BATCH = 1000  # instances
CHECKPOINT_INTERVAL = 60.0  # seconds
CRITERIA = {"regression": "mean squared error", "binary": "cross-entropy", "multiclass": "cross-entropy"}


class Batches(Sized, Iterable[tuple[Tensor, Tensor]], Protocol):
    """Yields (inputs, targets) of one epoch each time it is iterated, such as a `DataLoader`."""


@dataclass(frozen=True)
class Settings:
    """What the caller of a recipe chooses.

    `checkpoint` is the file for the state of a long fit. `changes` are other values of the recipe's hyperparameters,
    for a trial: fields of `TrainConfig`, or `hidden`, the sizes of a net's hidden layers.
    """

    epochs: int
    device: torch.device
    checkpoint: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def change(self, config: TrainConfig) -> TrainConfig:
        """Return a config with the epochs and the changes that the caller chose."""
        return replace(config, epochs=self.epochs, **{k: v for k, v in self.changes.items() if k != "hidden"})


@dataclass(frozen=True)
class Fitted:
    """A fitted net.

    Attributes:
        net: in evaluation mode.
        history: one record per epoch.
        criterion: what the history's losses are, for the axis of a plot.
        boundaries: weights (1, 2) and bias (1,) by iteration, where the recipe plots them.
        earlier_seconds: time spent by earlier runs, if the fit was resumed.
        steps: what a record of the history is: an epoch, an iteration or a round.
    """

    net: nn.Module
    history: list[Epoch]
    boundaries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    earlier_seconds: float = 0.0
    criterion: str = "loss"
    steps: str = "epoch"


class Trainer:
    """Fits a net to a training split as its config says.

    With a validation split, the weights of the epoch with the lowest validation loss are kept; otherwise the last ones.
    """

    def __init__(
        self,
        net: nn.Module,
        task: Task,
        config: TrainConfig,
        train: Split,
        validation: Split | None = None,
        loader: Batches | None = None,
    ) -> None:
        """Prepare a fit on the device of the training split.

        Args:
            net: returns logits, or values for regression.
            task: selects the loss, and what counts as correct.
            config: the hyperparameters.
            train: the training split, shuffled anew for each epoch unless one batch holds all of it.
            validation: on the same device.
            loader: yields the batches of `train`, if the trainer should not.
        """
        self.device = train.inputs.device
        self.net, self.task, self.config = net.to(self.device), task, config
        self.train, self.validation = train, validation
        self.generator = torch.Generator(self.device).manual_seed(torch.initial_seed())
        self.batches = IndexBatches(train, config.batch_size, self.generator) if loader is None else loader
        self.criterion = build_criterion(task, config)
        self.optimizer = build_optimizer(self.net, config)
        self.schedule = build_schedule(self.optimizer, config, config.epochs * len(self.batches))
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False) if config.ema_decay else self.net
        self._ema_pairs = list(zip(floating_values(self.ema), floating_values(self.net), strict=True))
        self.best: dict[str, Tensor] = {}
        self.history: list[Epoch] = []
        self.steps = 0
        self.earlier_seconds, self._started = 0.0, time.perf_counter()

    def fit(self, title: str, stop: Callable[[int], str] | None = None, checkpoint: Path | None = None) -> Fitted:
        """Train for the configured number of epochs.

        Args:
            title: of the progress bar.
            stop: called with the number of finished epochs; a reason ends the fit early, the empty string does not.
            checkpoint: the file to save the state to, and to resume from if it holds a state of this fit.

        Raises:
            CheckError: the loss is not finite.
        """
        identity = {} if checkpoint is None else self.identity()
        if checkpoint is not None and (saved := load_checkpoint(checkpoint, identity)) is not None:
            self.load_state_dict(saved)
        with Progress(title, self.config.epochs, len(self.batches), done=len(self.history)) as progress:
            saved_at = time.monotonic()
            while len(self.history) < self.config.epochs:
                self._record(epoch := self.run_epoch(progress))
                progress.epoch(epoch)
                is_last = len(self.history) == self.config.epochs
                if checkpoint is not None and (is_last or time.monotonic() - saved_at > CHECKPOINT_INTERVAL):
                    is_saved = save_checkpoint(checkpoint, identity, self.state_dict())
                    checkpoint, saved_at = checkpoint if is_saved else None, time.monotonic()
                if stop is not None and (reason := stop(len(self.history))):
                    progress.stop(reason)
                    break
        self.net.load_state_dict(self.best or self.ema.state_dict())
        criterion = CRITERIA[self.task] + (", summed" if self.config.reduction == "sum" else "")
        return Fitted(self.net.eval(), self.history, earlier_seconds=self.earlier_seconds, criterion=criterion)

    def run_epoch(self, progress: Progress) -> Epoch:
        """Take one step per batch, then measure the net on the validation split."""
        finetuning = self.config.is_finetuning(len(self.history))
        set_training(self.net, dropout=not finetuning)
        amounts = self.config.finetune_augmentation if finetuning else self.config.augmentation
        augment = None if amounts is None else Augmenter(amounts, self.generator)
        tally = Tally(self.task, self.config.reduction)
        for inputs, targets in self.batches:
            loss, logits = self.train_step(inputs if augment is None else augment(inputs), targets)
            tally.add(loss, logits, targets)
            progress.step()
        trained = tally.epoch()
        if self.validation is None:
            return trained
        validated = self.validate(self.validation)
        return Epoch(trained.loss, trained.accuracy, validated.loss, validated.accuracy)

    def train_step(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Update the parameters from one batch; return the loss and logits from before the update."""
        is_mixed = self.config.mixed_precision and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, is_mixed):
            logits = self.net(inputs)
            loss = self.criterion(logits, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.steps += 1
        if self.config.ema_decay:
            self._update_ema()
        return loss.detach(), logits.detach()

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, self.steps / (self.steps + 10))  # the first weights are forgotten fast
        for average, value in self._ema_pairs:
            average.lerp_(value, 1 - decay)

    def validate(self, split: Split) -> Epoch:
        """Return loss and accuracy on a split, of the averaged weights where there are any."""
        return measure_split(self.ema.eval(), split, self.task, self.config)

    def _record(self, epoch: Epoch) -> None:
        """Add an epoch to the history, and keep its weights if they are the best so far."""
        if not math.isfinite(epoch.loss):
            raise CheckError(f"the training loss became {epoch.loss} in epoch {len(self.history) + 1}")
        best = min((each.validation_loss or 0.0 for each in self.history), default=math.inf)
        if epoch.validation_loss is not None and epoch.validation_loss < best:
            self.best = {name: value.clone() for name, value in self.ema.state_dict().items()}
        self.history.append(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return everything the rest of the fit depends on."""
        return {
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
            "history": [asdict(epoch) for epoch in self.history],
            "steps": self.steps,
            "seconds": self.earlier_seconds + time.perf_counter() - self._started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        for name in ("net", "ema", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state_all(state["cuda"])
        self.best, self.steps, self.earlier_seconds = state["best"], state["steps"], state["seconds"]
        self.history = [Epoch(**epoch) for epoch in state["history"]]

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a checkpoint to belong to this fit."""
        return {
            "net": {name: list(value.shape) for name, value in self.net.state_dict().items()},
            "config": asdict(self.config),
            "seed": torch.initial_seed(),
            "data": [None if split is None else split.digest() for split in (self.train, self.validation)],
            "torch": str(torch.__version__),
            "device": [self.device.type, torch.cuda.device_count()],  # a state holds the generators of its devices
        }


@torch.no_grad()
def measure_split(net: nn.Module, split: Split, task: Task, config: TrainConfig) -> Epoch:
    """Return loss and accuracy of a net, in evaluation mode, on a split."""
    tally, criterion = Tally(task, config.reduction), build_criterion(task, config)
    parts = (torch.split(part, EVALUATION_BATCH) for part in (split.inputs, split.targets))
    for inputs, targets in zip(*parts, strict=True):
        logits = net(as_floats(inputs))
        tally.add(criterion(logits, targets), logits, targets)
    return tally.epoch()


def measure_outputs(outputs: Tensor, targets: Tensor, task: Task) -> Epoch:
    """Return the mean loss and the accuracy of logits or values (N, K)."""
    tally = Tally(task, "mean")
    tally.add(build_criterion(task, TrainConfig(epochs=1, batch_size=1, lr=0.0))(outputs, targets), outputs, targets)
    return tally.epoch()


def set_training(net: nn.Module, dropout: bool) -> None:
    """Put a net into training mode, with or without its dropout."""
    net.train()
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.train(dropout)


def floating_values(net: nn.Module) -> list[Tensor]:
    """Return a net's parameters and running statistics; an average is taken of both."""
    return [value for value in net.state_dict().values() if value.is_floating_point()]
