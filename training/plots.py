"""Plots of a fitted model, written as PNG or GIF beside its artifacts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from service.model import postprocess
from service.model.predictor import Predictor
from training.calibration import BINS, measure_reliability
from training.data import HALF_PLANE_DIRECTION, LINE_INTERCEPT, Split, Splits, as_floats, true_slope
from training.evaluate import parameters, predict
from training.tally import count_correct
from training.trainer import Fitted

Draw = Callable[[Path, Fitted, Splits, Predictor], None]

# Plots are transparent, and their colors can be read on a light and on a dark page.
BLUE, ORANGE, GREEN, GREY, INK = "#3b82d0", "#e07b24", "#2a9d5c", "#8a8f98", "#6e7681"
_DPI = 160
_STYLE: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
_FRAME, _LAST_FRAME = 180, 3000  # milliseconds
_LARGE_DISPARITY = 30
_COLUMNS = 10
_MOST_BARS, _LONGEST = 20, 28
_SHORT, _NARROW = 14, 4  # letters of a label
_FLAT = 2  # dimensions of digits, which are rows of pixels


@contextmanager
def _canvas(path: Path | BytesIO, title: str, width: float = 6.4, height: float = 4.4) -> Iterator[Axes]:
    """Yield empty axes, and write them to `path` on exit."""
    with rc_context(_STYLE), _figure(path, width, height) as figure:
        axes = figure.add_subplot()
        axes.set_title(title, color=INK, fontsize=12, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        yield axes


@contextmanager
def _figure(path: Path | BytesIO, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure outside matplotlib's global state, and write it to `path` as PNG on exit."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(path, format="png", transparent=True, metadata={"Software": None})


def draw_loss(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw the loss of each epoch, and the validation loss and the kept epoch if there is one."""
    del splits
    losses = [epoch.loss for epoch in fitted.history]
    checked = [epoch.validation_loss for epoch in fitted.history if epoch.validation_loss is not None]
    numbers = np.arange(1, len(losses) + 1)
    few: dict[str, Any] = {"marker": "o", "markersize": 4} if len(losses) <= _LARGE_DISPARITY else {}
    with _canvas(path, f"{predictor.manifest.title}: loss") as axes:
        axes.plot(numbers, losses, color=BLUE, label="training", **few)
        if checked:
            best = int(np.argmin(checked))
            axes.plot(numbers, checked, color=ORANGE, label="validation", **few)
            axes.plot(
                numbers[best],
                checked[best],
                "o",
                ms=11,
                mfc="none",
                mec=INK,
                label=f"kept: {fitted.steps} {numbers[best]}",
            )
            axes.legend(frameon=False)
        if max(losses) > _LARGE_DISPARITY * min(losses) > 0 or max(losses) > 10 * losses[-1]:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(fitted.steps)
        axes.set_ylabel(fitted.criterion)


def draw_line(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw the training points, the fitted line and the true line, each with its own bias."""
    slope, intercept = (float(parameter) for parameter in parameters(fitted))
    x, y = splits.train.inputs[:, 0].numpy(), splits.train.targets[:, 0].numpy()
    ends = np.array([x.min() - 0.2, x.max() + 0.2])
    with _canvas(path, predictor.manifest.title) as axes:
        axes.scatter(x, y, s=22, color=BLUE, alpha=0.65, linewidths=0, label="100 training points")
        axes.plot(
            ends,
            true_slope() * ends + LINE_INTERCEPT,
            color=INK,
            linestyle="--",
            label=f"true: y = {true_slope():.2f}·x + {LINE_INTERCEPT:.2f}",
        )
        axes.plot(ends, slope * ends + intercept, color=ORANGE, label=f"fitted: y = {slope:.2f}·x + {intercept:.2f}")
        axes.set_xlabel("x")
        axes.set_ylabel("y")
        axes.legend(frameon=False)


def draw_hours(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw the probability of passing against hours of study, the three students, and where it is 0.5."""
    weight, bias = (float(parameter) for parameter in parameters(fitted))
    hours = np.linspace(0, 5, 200)
    students = splits.train
    with _canvas(path, predictor.manifest.title) as axes:
        axes.plot(hours, 1 / (1 + np.exp(-(weight * hours + bias))), color=BLUE, label="P(pass)")
        axes.scatter(students.inputs[:, 0], students.targets[:, 0], s=55, color=ORANGE, zorder=3, label="students")
        even = -bias / weight
        axes.axvline(even, color=GREY, linestyle="--", linewidth=1, label=f"even odds at {even:.2f} h")
        axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        axes.set_xlabel("hours of study")
        axes.set_ylabel("probability of passing")
        axes.set_ylim(-0.05, 1.05)
        axes.legend(frameon=False, loc="upper left")


def draw_half_plane(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw the training points of both classes, the fitted boundary and the true one."""
    weights, bias = parameters(fitted)
    with _canvas(path, predictor.manifest.title, width=6.4, height=4.3) as axes:
        _draw_classes(axes, splits.train, predictor)
        truth = torch.tensor([HALF_PLANE_DIRECTION])
        _draw_boundary(axes, truth, torch.zeros(1), color=GREEN, linewidth=2, linestyle="--", label="true boundary")
        _draw_boundary(axes, weights, bias, color=INK, label="fitted boundary")
        _place_legend(axes)


def draw_clouds(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw both clouds, the boundary at each check (thinner is earlier), and the last one."""
    weights, bias = parameters(fitted)
    with _canvas(path, predictor.manifest.title, width=6.2, height=5.2) as axes:
        _draw_classes(axes, splits.train, predictor)
        earlier = list(fitted.boundaries.items())[:-1]
        for i, (_, (w, b)) in enumerate(earlier):
            label = "every 20 iterations" if i == len(earlier) - 1 else None
            _draw_boundary(axes, w, b, color=GREY, linewidth=0.6 + i / len(earlier), label=label)
        label = f"after {len(fitted.history)} iterations"
        _draw_boundary(axes, weights, bias, color=GREEN, linewidth=2.5, label=label)
        _place_legend(axes)


def animate_clouds(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw a GIF of the boundary at each check, with iteration, loss, parameters and accuracy."""
    frames = []
    inputs, targets = splits.train.inputs, splits.train.targets
    boundaries = fitted.boundaries or {len(fitted.history): parameters(fitted)}
    for iteration, (w, b) in boundaries.items():
        logits = inputs @ w.T + b
        loss = fitted.history[iteration - 1].loss  # before the step
        accuracy = count_correct(logits, targets, "binary") / len(targets)
        values = f"w0 {w[0, 0]:+.2f}   w1 {w[0, 1]:+.2f}   b {b.item():+.2f}"
        title = f"iteration {iteration:3}   loss {loss:.3f}   accuracy {accuracy:.1%}\n{values}"
        with _canvas(picture := BytesIO(), title, width=6.2, height=5.2) as axes:
            _draw_classes(axes, splits.train, predictor)
            _draw_boundary(axes, w, b, color=GREEN, linewidth=2)
        frame = Image.open(picture).convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame).convert("RGB")
        frames.append(flat.resize((560, 470)).quantize(32))
    durations = [_FRAME] * (len(frames) - 1) + [_LAST_FRAME]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _draw_classes(axes: Axes, split: Split, predictor: Predictor) -> None:
    points, classes = split.inputs.numpy(), split.targets[:, 0].numpy()
    size = 32 if len(split) <= 200 else 11  # noqa: PLR2004 - smaller where they would overlap
    for value, color in ((0, BLUE), (1, ORANGE)):
        of_class = points[classes == value]
        label = predictor.manifest.output.labels[value]
        axes.scatter(of_class[:, 0], of_class[:, 1], s=size, color=color, alpha=0.7, linewidths=0, label=label)
    axes.set_xlabel("x0")
    axes.set_ylabel("x1")
    low, high = points.min(axis=0) - 0.3, points.max(axis=0) + 0.3
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_aspect("equal")


def _draw_boundary(axes: Axes, weights: torch.Tensor, bias: torch.Tensor, **style: Any) -> None:  # noqa: ANN401 - as matplotlib
    """Draw the line w₀·x + w₁·y + b = 0."""
    (w0, w1), b = weights.reshape(2).tolist(), bias.item()
    x = np.array(axes.get_xlim())
    axes.plot(x, -(w0 * x + b) / w1, **style)


def _place_legend(axes: Axes, title: str | None = None) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), title=title)


def draw_digits(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw the first 20 training images with their labels."""
    del fitted
    shown = splits.train
    count, labels = min(20, len(shown)), predictor.manifest.output.labels
    chosen = torch.linspace(0, len(shown) - 1, count).long().tolist() if shown.inputs.ndim > _FLAT else [*range(count)]
    titles = [labels[int(shown.targets[index])][:_SHORT] for index in chosen]
    _draw_grid(path, "Training images and their labels", shown, chosen, titles, predictor)


def draw_misclassified(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw the 20 errors on test images with the highest confidence."""
    del fitted
    probabilities = predict(predictor, splits.test)
    decided = postprocess.decide(probabilities, predictor.manifest)
    confidence = probabilities.max(axis=1)
    targets, labels = splits.test.targets.reshape(-1).long().numpy(), predictor.manifest.output.labels
    wrong = np.flatnonzero(decided != targets)
    chosen = wrong[np.argsort(-confidence[wrong])][:20].tolist()
    titles = [f"{labels[targets[i]][:_SHORT]}, not {labels[decided[i]][:_SHORT]}\n{confidence[i]:.1%}" for i in chosen]
    title = f"The surest of {len(wrong)} errors on {len(splits.test)} test images: label, not prediction, and how sure"
    _draw_grid(path, title, splits.test, chosen, titles, predictor)


def _draw_grid(
    path: Path, title: str, split: Split, chosen: list[int], titles: list[str], predictor: Predictor
) -> None:
    image = predictor.manifest.input
    assert image.kind == "image"
    size = (image.image.channels, image.image.height, image.image.width)
    with _figure(path, 9.6, 3.0) as figure:
        figure.suptitle(title, color=INK, fontsize=12, x=0.01, ha="left")
        for position, (index, label) in enumerate(zip(chosen, titles, strict=True)):
            axes = figure.add_subplot(2, _COLUMNS, position + 1)
            picture = as_floats(split.inputs[index]).reshape(size).movedim(0, 2).numpy()
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set_title(label, fontsize=9 if len(label) > 1 else 12, color=INK)
            axes.set_axis_off()


def draw_confusion(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw the confusion matrix of the test images; only errors are shaded."""
    del fitted
    decided = postprocess.decide(predict(predictor, splits.test), predictor.manifest)
    counts = count_confusions(
        splits.test.targets.reshape(-1).long().numpy(), decided, len(predictor.manifest.output.labels)
    )
    errors = counts - np.diag(np.diag(counts))
    with _canvas(path, "Test instances by label and prediction", width=5.6, height=5.2) as axes:
        axes.grid(visible=False)
        axes.imshow(errors, cmap="Oranges", vmax=max(1, 2 * errors.max()))
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                style: dict[str, Any] = {"weight": "bold" if row == column else "normal", "color": INK, "fontsize": 8}
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", **style)
        ticks = range(len(counts))
        names = [label[:_SHORT] for label in predictor.manifest.output.labels]
        axes.set_xticks(ticks, names, rotation=45 if max(map(len, names)) > _NARROW else 0)
        axes.set_yticks(ticks, names)
        axes.set_xlabel("prediction")
        axes.set_ylabel("label")


def count_confusions(labels: NDArray[np.int64], decided: NDArray[np.intp], classes: int) -> NDArray[np.int64]:
    """Return counts (classes, classes): row label, column prediction; they sum to the number of instances."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, decided), 1)
    return counts


def draw_reliability(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw what came true, and of how many test instances, in each bin of the stated probability."""
    del fitted
    is_binary = predictor.manifest.task == "binary"
    found = measure_reliability(predict(predictor, splits.test), splits.test.targets.numpy().reshape(-1))
    filled, width = found.counts > 0, 1 / BINS
    middles = (np.arange(BINS) + 0.5) * width
    with _canvas(path, f"{predictor.manifest.title}: stated and observed", width=7.2, height=4.6) as axes:
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="exact")
        axes.bar(middles[filled], found.observed[filled], width=0.9 * width, color=BLUE, alpha=0.75, label="observed")
        axes.plot(found.stated[filled], found.observed[filled], "o", color=INK, markersize=4, label="stated, mean")
        for middle, count, height in zip(middles[filled], found.counts[filled], found.observed[filled], strict=True):
            axes.text(middle, height + 0.02, str(count), ha="center", fontsize=7, color=INK)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.1)
        axes.set_xlabel("stated probability of " + ("class 1" if is_binary else "the predicted label"))
        axes.set_ylabel("share that came true (and of how many)")
        _place_legend(axes, f"calibration error {found.error:.2%}")


def draw_predicted(path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
    """Draw the predictions of the test instances against their targets."""
    del fitted
    targets, values = splits.test.targets[:, 0].numpy(), predict(predictor, splits.test)[:, 0]
    ends = [min(targets.min(), values.min()), max(targets.max(), values.max())]
    with _canvas(path, f"{predictor.manifest.title}: test instances", width=5.6, height=5.2) as axes:
        axes.plot(ends, ends, color=INK, linestyle="--", linewidth=1, label="exact")
        axes.scatter(targets, values, s=16, color=BLUE, alpha=0.5, linewidths=0)
        axes.set_xlabel(f"true {predictor.manifest.output.name}")
        axes.set_ylabel("predicted")
        axes.legend(frameon=False, loc="upper left")


def draw_bars(path: Path, title: str, heights: Mapping[str, float], unit: str) -> None:
    """Draw the first 20 numbers as bars with their names, the first at the top."""
    names = list(heights)[:_MOST_BARS]
    with _canvas(path, title, height=1.2 + 0.28 * len(names)) as axes:
        axes.barh(range(len(names)), [heights[name] for name in names], color=BLUE)
        axes.set_yticks(range(len(names)), [name if len(name) <= _LONGEST else name[:_LONGEST] + "…" for name in names])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
