"""The recipes: data set, net, hyperparameters and plots of each model. Those of the digits are fitted in `mnist.py`.

Each is a tutorial's model: it keeps what the tutorial teaches, and corrects its code. The docstring of each `fit_`
function says what was decided and why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from service.model.manifest import Feature, ImageInput, ImageSpec, Input, Output, TabularInput, Task
from training import by_hand, data, evaluate, mnist, plots
from training.config import TrainConfig
from training.data import Splits
from training.nets import LinearNet, linear_net
from training.progress import Progress
from training.tally import count_correct
from training.trainer import Fitted, Settings, Trainer

CLOUDS_CHECK_EVERY = 20  # iterations


@dataclass(frozen=True)
class Recipe:
    """One model: what it is, and how it is loaded, fitted, measured and plotted.

    `figures` returns metrics that only this recipe has. `plots` maps file names to the functions that draw them.
    `benefits_from_gpu` is False if a step is too small to be worth a kernel launch.
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
    benefits_from_gpu: bool = False


def fit_logistic_by_hand(splits: Splits, settings: Settings) -> Fitted:
    """Fit a logistic regression with tensors and autograd alone, one instance per step (lr 0.001).

    Decided:
        The loss is written on the logit: as the tutorial writes it, it becomes NaN once ŷ rounds to exactly 1.
        Each epoch shows its mean loss; the tutorial prints the last instance's, which says little.
        Metrics are of 10,000 fresh points; the tutorial holds none out.
    """
    train = splits.train.to(settings.device)
    with Progress("logistic-by-hand", settings.epochs, len(train)) as progress:
        w, b, history = by_hand.fit_logistic(train.inputs, train.targets, settings.epochs, progress)
    return Fitted(linear_net(w, b), history)


def fit_logistic_hours(splits: Splits, settings: Settings) -> Fitted:
    """Fit pass or fail to three students with `BCEWithLogitsLoss`, summed over them, and SGD (lr 0.01).

    Decided:
        `reduction="sum"`, today's name of the tutorial's `size_average=False`. Their mean would make every step a
        third as long: with seed 0, 1,000 epochs would end at P(pass | 4 h) = 0.61 instead of 0.85.
        Sigmoid and loss are one function of the logit, which cannot overflow; the values are the tutorial's.
    """
    config = TrainConfig(settings.epochs, batch_size=len(splits.train), lr=0.01, reduction="sum")
    return Trainer(LinearNet(1), "binary", config, splits.train.to(settings.device)).fit("logistic-hours")


def fit_logistic_clusters(splits: Splits, settings: Settings) -> Fitted:
    """Fit the boundary between two clouds (SGD lr 0.01, momentum 0.9) until more than 99 % of 200 points are right.

    Decided:
        The 99 % are counted in whole points, 199 of 200: where the tutorial's own code stops, too.
        The net is measured after every 20th iteration, and that same boundary is drawn; the tutorial measures before
        a step and draws after it.
        Metrics are of 10,000 fresh points; the training points' own share is `training_accuracy`.
    """
    train, net = splits.train.to(settings.device), LinearNet(2)
    boundaries: dict[int, tuple[Tensor, Tensor]] = {}

    def is_done(iteration: int) -> bool:
        if iteration % CLOUDS_CHECK_EVERY:
            return False
        boundaries[iteration] = (net.weight.detach().cpu().clone(), net.bias.detach().cpu().clone())
        hits = count_correct(net(train.inputs), train.targets, "binary")
        return 100 * hits > 99 * len(train)

    config = TrainConfig(settings.epochs, batch_size=len(train), lr=0.01, momentum=0.9)
    fitted = Trainer(net, "binary", config, train).fit("logistic-clusters", is_done)
    return replace(fitted, boundaries=boundaries)


def fit_linear_by_hand(splits: Splits, settings: Settings) -> Fitted:
    """Fit a line with tensors and autograd alone, in shuffled batches of 16 (lr 0.01), in float64.

    Decided:
        Batches follow the shuffled order; the tutorial computes one and does not use it.
        All 100 points train: the last batch has 4 and its gradient is divided by 4; the tutorial drops it, and
        always divides by 16.
        The loss shown is of its own epoch; the tutorial never resets it to zero.
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
        The loss shown is of its own epoch, each batch weighted by its number of points.
    """
    train, config = splits.train.to(settings.device), TrainConfig(settings.epochs, batch_size=16, lr=0.01)
    loader = DataLoader(TensorDataset(train.inputs, train.targets), config.batch_size, shuffle=True)
    return Trainer(LinearNet(1), "regression", config, train, loader=loader).fit("linear")


def _tabular(*features: Feature) -> TabularInput:
    return TabularInput(kind="tabular", shape=(len(features),), features=features, tensor="inputs")


def _binary(*labels: str) -> Output:
    return Output(kind="probability", name="probability", labels=labels, threshold=0.5, tensor="outputs")


def _line(name: str, title: str, description: str, fit: Callable[[Splits, Settings], Fitted]) -> Recipe:
    return Recipe(
        name=name,
        title=title,
        description=description,
        task="regression",
        input=_tabular(Feature(name="x")),
        output=Output(kind="value", name="y", tensor="outputs"),
        epochs=100,
        load=lambda _: data.load_line(),
        fit=fit,
        figures=evaluate.measure_line,
        plots={"line.png": plots.draw_line, "loss.png": plots.draw_loss},
    )


def _digits(name: str, title: str, description: str, epochs: int, fit: Callable[[Splits, Settings], Fitted]) -> Recipe:
    image = ImageSpec(width=28, height=28, channels=1, polarity="light-on-dark", fitting="mnist")
    labels = tuple(str(digit) for digit in range(10))
    return Recipe(
        name=name,
        title=title,
        description=f"{description} Pixels in [0, 1], bright ink on dark; the graph normalises them itself.",
        task="multiclass",
        input=ImageInput(kind="image", shape=(784,), image=image, tensor="inputs"),
        output=Output(kind="probabilities", name="digit", labels=labels, tensor="outputs"),
        epochs=epochs,
        load=data.load_digits,
        fit=fit,
        figures=evaluate.measure_validation,
        plots={
            "digits.png": plots.draw_digits,
            "loss.png": plots.draw_loss,
            "confusion.png": plots.draw_confusion,
            "misclassified.png": plots.draw_misclassified,
            "reliability.png": plots.draw_reliability,
        },
        benefits_from_gpu=True,
    )


_CLASSIFIER_PLOTS: dict[str, plots.Draw] = {"loss.png": plots.draw_loss, "reliability.png": plots.draw_reliability}
_PLANE = _tabular(Feature(name="x0"), Feature(name="x1"))

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
            plots={"boundary.png": plots.draw_half_plane, **_CLASSIFIER_PLOTS},
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
            plots={"boundary.png": plots.draw_clouds, **_CLASSIFIER_PLOTS},
        ),
        _line(
            "linear-by-hand",
            "Linear regression by hand",
            "A line through 100 noisy points; trained with tensors and autograd alone, in shuffled batches.",
            fit_linear_by_hand,
        ),
        _line(
            "linear",
            "Linear regression",
            "A line through 100 noisy points; trained with nn.Linear, DataLoader, MSELoss and optim.SGD.",
            fit_linear,
        ),
        _digits(
            "mnist",
            "Handwritten digits",
            "The tutorial's perceptron (784-512-128-10, sigmoid) on MNIST.",
            mnist.MNIST.epochs,
            mnist.fit_mnist,
        ),
        _digits(
            "mnist-mlp-best",
            "Handwritten digits, the same net at its best",
            "The tutorial's perceptron (784-512-128-10, sigmoid), trained on distorted MNIST digits for long.",
            mnist.MLP_BEST.epochs,
            mnist.fit_mlp_best,
        ),
        _digits(
            "mnist-cnn",
            "Handwritten digits, convolutional",
            "A small convolutional net, trained on distorted MNIST digits.",
            mnist.CNN.epochs,
            mnist.fit_cnn,
        ),
    )
}
