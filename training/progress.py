"""Progress of a fit: a bar with loss and accuracy on a terminal, about ten plain lines otherwise."""

import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tqdm import tqdm

PLAIN_LINES = 10


@dataclass(frozen=True)
class Epoch:
    """Figures of one pass over the training split. Accuracies are in [0, 1], None for regression.

    `loss` is the mean over instances (or the sum, if the criterion sums), each measured before the step on its batch.
    Validation figures are measured after the epoch.
    """

    loss: float
    accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None

    def __str__(self) -> str:
        """Return the figures that are set, such as `loss 0.1234  accuracy 0.9876`."""
        figures = {name.replace("_", " "): value for name, value in vars(self).items() if value is not None}
        return "  ".join(f"{name} {value:.4f}" for name, value in figures.items())


class Progress:
    """A context manager that shows the steps and epochs reported to it."""

    def __init__(self, title: str, epochs: int, steps_per_epoch: int, done: int = 0) -> None:
        self._title = title
        self._unit = "epoch" if steps_per_epoch > 1 else "iteration"
        self._epochs = epochs
        self._done = done  # epochs of the run that is resumed
        self._every = max(1, epochs // PLAIN_LINES)
        self._plain = not sys.stderr.isatty()
        self._bar = tqdm(
            total=epochs * steps_per_epoch,
            initial=done * steps_per_epoch,
            desc=title,
            unit="step",
            disable=self._plain,
            dynamic_ncols=True,
            leave=True,
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar."""
        self._bar.close()

    def step(self) -> None:
        """Count one update of the parameters."""
        self._bar.update()

    def stop(self, reason: str) -> None:
        """Show that the fit ends early, and why; the bar is then full."""
        self._bar.total = self._bar.n
        self._bar.refresh()
        tqdm.write(f"{self._title}: stopped after {self._unit} {self._done}: {reason}")

    def epoch(self, epoch: Epoch) -> None:
        """Show the figures of a finished epoch."""
        self._done += 1
        self._bar.set_postfix_str(f"{self._unit} {self._done}/{self._epochs}  {epoch}", refresh=False)
        if self._plain and (self._done % self._every == 0 or self._done == self._epochs):
            print(f"{self._title}: {self._unit} {self._done}/{self._epochs}  {epoch}", flush=True)
