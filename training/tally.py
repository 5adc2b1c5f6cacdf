"""Loss and accuracy, added up batch by batch."""

from typing import Literal

import torch
from torch import Tensor

from service.model.manifest import Task
from training.progress import Epoch


class Tally:
    """Sums losses and hits over batches of any size; it reads numbers from the device once, at the end."""

    def __init__(self, task: Task, reduction: Literal["mean", "sum"]) -> None:
        self._task, self._reduction = task, reduction
        self._losses: list[Tensor] = []
        self._hits: list[Tensor] = []
        self._counts: list[int] = []

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add one batch."""
        self._losses.append(loss)
        self._hits.append(find_hits(logits, targets, self._task).sum())
        self._counts.append(len(targets))

    @property
    def count(self) -> int:
        """The number of instances."""
        return sum(self._counts)

    def epoch(self) -> Epoch:
        """Return the loss over all instances (their mean, or sum if the criterion sums) and the accuracy."""
        losses, count = torch.stack(self._losses).tolist(), self.count
        if self._reduction == "sum":
            loss = sum(losses)
        else:
            loss = sum(each * weight for each, weight in zip(losses, self._counts, strict=True)) / count
        return Epoch(loss, None if self._task == "regression" else int(torch.stack(self._hits).sum()) / count)


def find_hits(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Return which rows are correct: a logit >= 0 (probability >= 0.5) means class 1; of several the largest wins."""
    if task == "binary":
        return (logits >= 0) == (targets == 1)
    if task == "multiclass":
        return logits.argmax(dim=1) == targets
    return torch.zeros(len(targets), dtype=torch.bool, device=targets.device)


def count_correct(logits: Tensor, targets: Tensor, task: Task) -> int:
    """Return how many rows are correct."""
    return int(find_hits(logits, targets, task).sum())
