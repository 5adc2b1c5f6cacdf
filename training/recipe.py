"""A recipe: what makes one training run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from service.model.manifest import ImageInput, Input, Output, Task
from service.model.predictor import Predictor
from training import plots
from training.data import Splits
from training.errors import RecipeError
from training.trainer import Fitted, Settings

MIN_LABELS = 2


@dataclass(frozen=True)
class Recipe:
    """One model: what it is, and how it is loaded, fitted, measured and plotted.

    `purpose`, `limits` and `source` (of the data, with its licence) are sentences of the model card. `figures` returns
    metrics that only this recipe has. `plots` maps file names to the functions that draw them.
    `calibrates`: whether the probabilities are corrected on the validation split; a taught model keeps its weights as
    they were trained. `quantizes` adds an 8-bit ONNX artifact. `sections` returns further parts of the card,
    Markdown by heading.
    `options` are the hyperparameters that the command line may change for a trial.
    `benefits_from_gpu` is False if a step is too small to be worth a kernel launch. `command` made the model, for the
    card; by default, the one with its name.
    """

    name: str
    title: str
    description: str
    task: Task
    input: Input
    output: Output
    epochs: int
    load: Callable[[Path], Splits]
    fit: Callable[[Splits, Settings], Fitted]
    figures: Callable[[Fitted, Splits], dict[str, float]]
    plots: Mapping[str, plots.Draw]
    purpose: str
    limits: str
    source: str
    calibrates: bool = False
    quantizes: bool = False
    sections: Callable[[Fitted, Splits, Predictor], Mapping[str, str]] = lambda *_: {}
    options: tuple[str, ...] = ()
    benefits_from_gpu: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        """Check what would otherwise fail only after all the fitting.

        Raises:
            RecipeError: a part is missing, or two do not fit together.
        """
        empty = [name for name in ("name", "title", "purpose", "limits", "source") if not getattr(self, name)]
        if empty:
            raise RecipeError(f"recipe {self.name!r} has no {empty[0]}")
        if self.task != "regression" and len(self.output.labels) < MIN_LABELS:
            raise RecipeError(f"recipe {self.name!r} is a classifier and needs at least {MIN_LABELS} labels")
        if self.quantizes and not isinstance(self.input, ImageInput):
            raise RecipeError(f"recipe {self.name!r} cannot be quantized: only models of images are")
