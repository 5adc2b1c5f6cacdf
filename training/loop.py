"""The training loop of every recipe that is not by hand. It knows no data set and no file."""

import copy
import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from service.manifest import Task
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
class Fitted:
    """What training gives: the net, one record an epoch, and snapshots of a linear boundary.

    `boundaries`: by iteration, weights (1, 2) and bias (1,), where the recipe draws them.
    """

    net: nn.Module
    history: list[Epoch]
    boundaries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


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
        learner.optimizer.step()
        tally.add(loss.detach(), logits.detach(), targets)
        progress.step()
    return tally.epoch()


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
    """Adds up losses and hits over batches of any size."""

    def __init__(self, learner: Learner) -> None:
        self._sums = learner.criterion.reduction == "sum"
        self._task = learner.task
        self._loss, self._correct, self._count = 0.0, 0, 0

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count one batch; a mean loss weighs as many times as the batch has instances."""
        self._loss += loss.item() * (1 if self._sums else len(targets))
        self._correct += count_correct(logits, targets, self._task)
        self._count += len(targets)

    def epoch(self) -> Epoch:
        """Return the loss (mean, or sum where the criterion sums) and the share of hits of all instances."""
        loss = self._loss if self._sums else self._loss / self._count
        return Epoch(loss, None if self._task == "regression" else self._correct / self._count)


def count_correct(logits: Tensor, targets: Tensor, task: Task) -> int:
    """Return how many rows are right: a logit >= 0 means class 1 (probability >= 0.5), or the largest logit wins."""
    if task == "binary":
        return int(((logits >= 0) == (targets == 1)).sum().item())
    if task == "multiclass":
        return int((logits.argmax(dim=1) == targets).sum().item())
    return 0
