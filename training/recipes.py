"""The recipes: what makes one training run.

Each is a tutorial's model, faithful to what it teaches and correct where its code is not; the docstring of each `fit_`
function says what was decided and why.

A recipe knows its data set, net and figures. It does not know files, artifacts or the service.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from service.manifest import Feature, ImageInput, ImageSpec, Input, Output, TabularInput, Task
from training import by_hand, data, evaluate, plots
from training.data import IndexBatches, Splits
from training.loop import Fitted, Learner, count_correct, fit
from training.nets import DigitsNet, LinearNet, linear_net
from training.progress import Progress

MNIST_MEAN_PIXEL = 0.1307  # of the training images in [0, 1]; rounded as everybody rounds it
CLOUDS_CHECK_EVERY = 20  # iterations


@dataclass(frozen=True)
class Settings:
    """What a caller may choose about a run."""

    epochs: int
    device: torch.device


@dataclass(frozen=True)
class Recipe:
    """One model: what it is, how it is loaded, fitted, measured and drawn.

    `figures` gives what only this recipe can say, on top of the test metrics. `plots` maps file names to the functions
    that draw them. `gains_from_gpu` is False where a step is too small to be worth a kernel launch.
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
    gains_from_gpu: bool = False


def fit_logistic_by_hand(splits: Splits, settings: Settings) -> Fitted:
    """Fit a logistic regression with tensors and autograd alone, one instance a step (lr 0.001).

    Decided:
        The loss is written on the logit: as the tutorial writes it, it becomes NaN once ŷ rounds to exactly 1.
        Each epoch shows its mean loss; the tutorial prints the last instance's, which says little.
        Metrics are of 1,000 fresh points; the tutorial holds none out.
    """
    train = splits.train.to(settings.device)
    with Progress("logistic-by-hand", settings.epochs, len(train)) as progress:
        w, b, history = by_hand.fit_logistic(train.inputs, train.targets, settings.epochs, progress)
    return Fitted(linear_net(w, b), history)


def fit_logistic_hours(splits: Splits, settings: Settings) -> Fitted:
    """Fit pass or fail to three students, with the loss summed over them (lr 0.01).

    Decided:
        `reduction="sum"`, today's name of the tutorial's `size_average=False`. Their mean would make every step a
        third as long: with seed 0, 1,000 epochs would end at P(pass | 4 h) = 0.61 instead of 0.85.
        Sigmoid and loss are one function of the logit, which cannot overflow; the values are the tutorial's.
    """
    train = splits.train.to(settings.device)
    net = LinearNet(1).to(settings.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    learner = Learner(net, nn.BCEWithLogitsLoss(reduction="sum"), optimizer, "binary")
    loader = DataLoader(TensorDataset(train.inputs, train.targets), batch_size=len(train))
    with Progress("logistic-hours", settings.epochs, len(loader)) as progress:
        history = fit(learner, loader, settings.epochs, progress)
    return Fitted(net, history)


def fit_logistic_clusters(splits: Splits, settings: Settings) -> Fitted:
    """Fit the boundary between two clouds (SGD lr 0.01, momentum 0.9) until more than 99 % of 200 points are right.

    Decided:
        The 99 % are counted in whole points: 199 of 200. Compared as float32, 198/200 counts as more than 0.99,
        because `float32(0.99).item()` is 0.9900000095, and training would stop about 100 iterations early.
        Every 20 iterations the net is measured as it then is, and the very same boundary is drawn; the tutorial
        measures before a step and draws after it.
        Metrics are of 10,000 fresh points; the training points' own share is `training_accuracy`.
    """
    train = splits.train.to(settings.device)
    net = LinearNet(2).to(settings.device)
    boundaries: dict[int, tuple[Tensor, Tensor]] = {}

    def is_done(iteration: int) -> bool:
        if iteration % CLOUDS_CHECK_EVERY:
            return False
        boundaries[iteration] = (net.weight.detach().cpu().clone(), net.bias.detach().cpu().clone())
        hits = count_correct(net(train.inputs), train.targets, "binary")
        return 100 * hits > 99 * len(train)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    learner = Learner(net, nn.BCEWithLogitsLoss(), optimizer, "binary")
    loader = DataLoader(TensorDataset(train.inputs, train.targets), batch_size=len(train))
    with Progress("logistic-clusters", settings.epochs, len(loader)) as progress:
        history = fit(learner, loader, settings.epochs, progress, stop=is_done)
    return Fitted(net, history, boundaries)


def fit_linear_by_hand(splits: Splits, settings: Settings) -> Fitted:
    """Fit a line with tensors and autograd alone, in shuffled batches of 16 (lr 0.01), in float64.

    Decided:
        Batches follow the shuffled order; the tutorial computes one and does not use it.
        All 100 points train: the last batch has 4 and its gradient is divided by 4; the tutorial drops it, and
        divides by 16 always.
        The loss shown is of its own epoch; the tutorial's is never set back to zero.
        The true line is drawn with its own bias, 14.5.
    """
    train = splits.train.to(settings.device)
    inputs, targets = train.inputs.double(), train.targets.double()
    with Progress("linear-by-hand", settings.epochs, -(-len(train) // 16)) as progress:
        w, b, history = by_hand.fit_linear(inputs, targets, settings.epochs, progress)
    return Fitted(linear_net(w, b), history)


def fit_linear(splits: Splits, settings: Settings) -> Fitted:
    """Fit the same line with `nn.Linear`, `DataLoader`, `MSELoss` and `optim.SGD` (batch 16, lr 0.01).

    Decided:
        Targets are a column: (16, 1) − (16,) broadcasts to 16 × 16 differences, and training ends at a flat line.
        The loss shown is of its own epoch, each batch weighing as many times as it has points.
    """
    train = splits.train.to(settings.device)
    net = LinearNet(1).to(settings.device)
    learner = Learner(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.01), "regression")
    loader = DataLoader(TensorDataset(train.inputs, train.targets), batch_size=16, shuffle=True)
    with Progress("linear", settings.epochs, len(loader)) as progress:
        history = fit(learner, loader, settings.epochs, progress)
    return Fitted(net, history)


def fit_mnist(splits: Splits, settings: Settings) -> Fitted:
    """Fit the tutorial's 784-512-128-10 sigmoid perceptron (cross-entropy, Adam lr 0.001, batch 64).

    Decided:
        Pixels come in as [0, 1], what a client has; the graph centres them on the mean pixel, once. The tutorial
        normalises in the data set and again in its loop, so its pixels run from −3 to 1, at a cost of 2 % accuracy.
        5,000 training images choose the epoch; a run reads the test images once, at its end.
        The whole set is one uint8 tensor and batches are drawn by index: see `IndexBatches`.
    """
    train = splits.train.to(settings.device)
    net = DigitsNet(mean=MNIST_MEAN_PIXEL, deviation=1.0).to(settings.device)
    order = torch.Generator().manual_seed(torch.initial_seed())
    batches = IndexBatches(train, batch_size=64, generator=order)
    learner = Learner(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), lr=0.001), "multiclass")
    validation = None if splits.validation is None else splits.validation.to(settings.device)
    with Progress("mnist", settings.epochs, len(batches)) as progress:
        history = fit(learner, batches, settings.epochs, progress, validation)
    return Fitted(net, history)


def _tabular(*features: Feature) -> TabularInput:
    return TabularInput(kind="tabular", shape=(len(features),), features=features, tensor="inputs")


def _binary(*labels: str) -> Output:
    return Output(kind="probability", name="probability", labels=labels, threshold=0.5, tensor="outputs")


_PLANE = _tabular(Feature(name="x0"), Feature(name="x1"))
_LINE = _tabular(Feature(name="x"))
_VALUE = Output(kind="value", name="y", tensor="outputs")

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="logistic-by-hand",
            title="Logistic regression by hand",
            description="On which side of the line 0.5·x0 − 1.5·x1 = 0 a point lies (below: 0.5·x0 > 1.5·x1)."
            " Trained with tensors and autograd alone, one point a step.",
            task="binary",
            input=_PLANE,
            output=_binary("above", "below"),
            epochs=100,
            load=lambda _: data.load_half_plane(),
            fit=fit_logistic_by_hand,
            figures=evaluate.measure_direction,
            plots={"boundary.png": plots.draw_half_plane, "loss.png": plots.draw_loss},
        ),
        Recipe(
            name="logistic-hours",
            title="Pass or fail from hours of study",
            description="Three students decide it: 1 h fail, 2 h fail, 3 h pass. They can be separated, so the"
            " likelihood has no finite maximum: more epochs make the model ever surer. Metrics are of the same three.",
            task="binary",
            input=_tabular(Feature(name="hours", unit="h", description="hours of study")),
            output=_binary("fail", "pass"),
            epochs=1000,
            load=lambda _: data.load_hours(),
            fit=fit_logistic_hours,
            figures=evaluate.measure_hours,
            plots={"probability.png": plots.draw_hours, "loss.png": plots.draw_loss},
        ),
        Recipe(
            name="logistic-clusters",
            title="Two Gaussian clouds",
            description="Which of two overlapping clouds a point belongs to: class 0 around (2.7, 2.7), class 1 around"
            " (-0.7, -0.7). No rule does better than 99.19 % on fresh points.",
            task="binary",
            input=_PLANE,
            output=_binary("upper right", "lower left"),
            epochs=1000,
            load=lambda _: data.load_clouds(),
            fit=fit_logistic_clusters,
            figures=evaluate.measure_training_hits,
            plots={"boundary.png": plots.draw_clouds, "loss.png": plots.draw_loss},
        ),
        Recipe(
            name="linear-by-hand",
            title="Linear regression by hand",
            description="A line through 100 noisy points; trained with tensors and autograd alone, in shuffled"
            " batches.",
            task="regression",
            input=_LINE,
            output=_VALUE,
            epochs=100,
            load=lambda _: data.load_line(),
            fit=fit_linear_by_hand,
            figures=evaluate.measure_line,
            plots={"line.png": plots.draw_line, "loss.png": plots.draw_loss},
        ),
        Recipe(
            name="linear",
            title="Linear regression",
            description="A line through 100 noisy points; trained with nn.Linear, DataLoader, MSELoss and optim.SGD.",
            task="regression",
            input=_LINE,
            output=_VALUE,
            epochs=100,
            load=lambda _: data.load_line(),
            fit=fit_linear,
            figures=evaluate.measure_line,
            plots={"line.png": plots.draw_line, "loss.png": plots.draw_loss},
        ),
        Recipe(
            name="mnist",
            title="Handwritten digits",
            description="The tutorial's perceptron (784-512-128-10, sigmoid) on MNIST. Pixels in [0, 1], bright ink on"
            " dark; the graph normalises them itself.",
            task="multiclass",
            input=ImageInput(
                kind="image",
                shape=(784,),
                image=ImageSpec(width=28, height=28, channels=1, polarity="light-on-dark", fitting="mnist"),
                tensor="inputs",
            ),
            output=Output(
                kind="probabilities", name="digit", labels=tuple(str(digit) for digit in range(10)), tensor="outputs"
            ),
            epochs=10,
            load=data.load_digits,
            fit=fit_mnist,
            figures=lambda fitted, _: {"validation_accuracy": evaluate.best_epoch(fitted).validation_accuracy or 0.0},
            plots={
                "digits.png": plots.draw_digits,
                "loss.png": plots.draw_loss,
                "confusion.png": plots.draw_confusion,
                "misclassified.png": plots.draw_misclassified,
            },
            gains_from_gpu=True,
        ),
    )
}
