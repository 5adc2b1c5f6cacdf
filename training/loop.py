"""The training loop of every recipe that is not by hand. It knows no data set and no file."""

import copy
import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from service.model.manifest import Task
from training import distributed
from training.data import Split, as_floats
from training.errors import CheckError
from training.progress import Epoch, Progress

EVALUATION_BATCH = 1000


class Criterion(Protocol):
    """A torch loss module: logits and targets in, a scalar out, its `reduction` "mean" or "sum"."""

    reduction: str

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        ...


class Batches(Sized, Iterable[tuple[Tensor, Tensor]], Protocol):
    """Anything that gives (inputs, targets) pairs afresh at each pass, such as a `DataLoader`."""


@dataclass(frozen=True)
class Learner:
    """What learns and how: a net that returns logits, a criterion that sees logits, an optimizer of its parameters.

    `task` says what a hit is.
    """

    net: nn.Module
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    task: Task


@dataclass(frozen=True)
class Settings:
    """What a caller may choose about a fit. `checkpoint` is the file that a long fit keeps its state in, if any."""

    epochs: int
    device: torch.device
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Fitted:
    """What training gives: the net, one record an epoch, and snapshots of a linear boundary.

    `boundaries`: by iteration, weights (1, 2) and bias (1,), where the recipe draws them. `earlier_seconds`: what
    earlier runs spent on a fit that this one took up.
    """

    net: nn.Module
    history: list[Epoch]
    boundaries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    earlier_seconds: float = 0.0


def fit(
    learner: Learner,
    batches: Batches,
    epochs: int,
    progress: Progress,
    validation: Split | None = None,
    stop: Callable[[int], bool] | None = None,
) -> list[Epoch]:
    """Train a net in place.

    Args:
        learner: the net, its criterion and optimizer.
        batches: one pass over it is one epoch.
        epochs: at most this many.
        progress: is told of every step and epoch.
        validation: where given, the net ends as it was after the epoch with the lowest validation loss.
        stop: called with the number of finished epochs; True ends training.

    Returns:
        one record an epoch.

    Raises:
        CheckError: the loss is no longer a finite number.
    """
    history: list[Epoch] = []
    best_loss, best_state = float("inf"), None
    for number in range(1, epochs + 1):
        epoch = run_epoch(learner, batches, progress)
        if validation is not None:
            checked = measure(learner, validation)
            epoch = Epoch(epoch.loss, epoch.accuracy, checked.loss, checked.accuracy)
            if checked.loss < best_loss:
                best_loss, best_state = checked.loss, copy.deepcopy(learner.net.state_dict())
        history.append(epoch)
        progress.epoch(epoch)
        if not math.isfinite(epoch.loss):
            raise CheckError(f"the training loss became {epoch.loss} in epoch {number}")
        if stop is not None and stop(number):
            break
    if best_state is not None:
        learner.net.load_state_dict(best_state)
    return history


def run_epoch(learner: Learner, batches: Batches, progress: Progress) -> Epoch:
    """Take one step a batch over all batches."""
    learner.net.train()
    tally = Tally(learner)
    for inputs, targets in batches:
        learner.optimizer.zero_grad()
        logits = learner.net(inputs)
        loss = learner.criterion(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        distributed.average_gradients(learner.net, len(targets))
        learner.optimizer.step()
        tally.add(loss.detach(), logits.detach(), targets)
        progress.step()
    return distributed.average_epoch(tally.epoch(), tally.count)


@torch.no_grad()
def measure(learner: Learner, split: Split) -> Epoch:
    """Return loss and accuracy of a net, as it is, on a split."""
    learner.net.eval()
    tally = Tally(learner)
    pairs = zip(torch.split(split.inputs, EVALUATION_BATCH), torch.split(split.targets, EVALUATION_BATCH), strict=True)
    for inputs, targets in pairs:
        logits = learner.net(as_floats(inputs))
        tally.add(learner.criterion(logits, targets), logits, targets)
    return tally.epoch()


class Tally:
    """Adds up losses and hits over batches of any size; it asks the device for numbers once, at the end."""

    def __init__(self, learner: Learner) -> None:
        self._sums = learner.criterion.reduction == "sum"
        self._task = learner.task
        self._losses: list[Tensor] = []
        self._hits: list[Tensor] = []
        self._counts: list[int] = []

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count one batch; a mean loss weighs as many times as the batch has instances."""
        self._losses.append(loss)
        self._hits.append(find_hits(logits, targets, self._task).sum())
        self._counts.append(len(targets))

    @property
    def count(self) -> int:
        """The instances counted."""
        return sum(self._counts)

    def epoch(self) -> Epoch:
        """Return the loss (mean, or sum where the criterion sums) and the share of hits of all instances."""
        losses, count = torch.stack(self._losses).tolist(), self.count
        if self._sums:
            loss = sum(losses)
        else:
            loss = sum(each * weight for each, weight in zip(losses, self._counts, strict=True)) / count
        return Epoch(loss, None if self._task == "regression" else int(torch.stack(self._hits).sum()) / count)


def find_hits(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Return which rows are right: a logit >= 0 means class 1 (probability >= 0.5), or the largest logit wins."""
    if task == "binary":
        return (logits >= 0) == (targets == 1)
    if task == "multiclass":
        return logits.argmax(dim=1) == targets
    return torch.zeros(len(targets), dtype=torch.bool, device=targets.device)


def count_correct(logits: Tensor, targets: Tensor, task: Task) -> int:
    """Return how many rows are right."""
    return int(find_hits(logits, targets, task).sum())
