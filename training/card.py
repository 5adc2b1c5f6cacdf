"""The model card: `README.md` in a version's folder, after Mitchell et al. 2019 (Model cards for model reporting).

Every number in it is computed by the run that publishes the version.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from service.model import postprocess
from service.model.backends import Array, Backend, open_backend
from service.model.manifest import BackendName, ColumnsInput, Manifest, Task
from service.model.predictor import Predictor
from training.calibration import LEAST_FOR_MEASURING, Calibration, measure_reliability, measure_spread
from training.data import Split, Splits
from training.evaluate import as_rows, best_epoch, predict
from training.parity import build_columns
from training.recipe import Recipe
from training.seeds import Candidate, Interval, mean_interval, wilson_interval

CARD_FILE = "README.md"
BATCHES = (1, 64)
_SECONDS = 0.2  # spent measuring each batch size
_LEAST_CALLS = 5
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_ANSWERS: dict[Task, str] = {
    "regression": "a number",
    "binary": "one of two classes",
    "multiclass": "one of several classes",
}
_PERCENTAGES = ("accuracy", "ece", "auc")


@dataclass(frozen=True)
class Cost:
    """The bytes of an artifact, and its microseconds per instance by batch size, on one CPU thread."""

    bytes: int
    microseconds: dict[int, float]


@dataclass(frozen=True)
class Report:
    """What a run measured of the version it publishes. `by_seed`: the test figures of each candidate."""

    chosen: Candidate
    candidates: Sequence[Candidate]
    by_seed: Mapping[int, dict[str, float]]
    parameters: int
    costs: Mapping[BackendName, Cost]


def write_card(
    folder: Path, manifest: Manifest, recipe: Recipe, splits: Splits, predictor: Predictor, report: Report
) -> None:
    """Write the card into a version's folder, beside the plots it shows."""
    results = predict(predictor, splits.test)
    parts = [
        f"# {manifest.title} (`{manifest.name}` version {manifest.version})",
        manifest.description,
        f"## What it is for\n{recipe.purpose}\n\nIt gives {_ANSWERS[manifest.task]}. {recipe.limits}",
        f"## Data\n{recipe.source}\n\n{_write_sizes(splits)}",
        f"## Figures\n{_write_figures(manifest, report, splits)}",
    ]
    if manifest.task != "regression":
        parts.append(f"## By class\n{_write_classes(results, splits.test, manifest)}")
        parts.append(f"## Calibration\n{_write_calibration(results, splits, report)}")
    if manifest.task == "binary":
        parts.append(f"## Threshold\n{_write_thresholds(predictor, splits, manifest)}")
    sections = recipe.sections(report.chosen.fitted, splits, predictor)
    parts += [f"## {heading}\n{text}" for heading, text in sections.items()]
    parts.append(f"## Plots\n{_write_plots(recipe)}")
    parts.append(f"## Cost\n{_write_cost(report)}")
    parts.append(f"## How it was made\n{_write_provenance(manifest, report, recipe)}")
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(name: str, value: float) -> str:
    """Return shares in percent, and other figures with four digits."""
    return f"{value:.2%}".replace("%", " %") if name.startswith(_PERCENTAGES) else f"{value:.4g}"


def show_range(name: str, interval: Interval) -> str:
    """Return the ends of an interval."""
    return f"{show(name, interval.low)} … {show(name, interval.high)}"


def _write_sizes(splits: Splits) -> str:
    named = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    return "Instances: " + ", ".join(f"{name} {len(split):,}" for name, split in named.items() if split) + "."


def _write_figures(manifest: Manifest, report: Report, splits: Splits) -> str:
    """Return the test figures of each seed, their mean with its interval, and further figures of the published one."""
    count, is_own = len(splits.test), splits.test is splits.train  # with nothing held out
    names = list(next(iter(report.by_seed.values())))
    rows = [
        [f"{seed}{', published' * (seed == report.chosen.seed)}", *(show(name, figures[name]) for name in names)]
        for seed, figures in report.by_seed.items()
    ]
    if len(rows) > 1:
        intervals = {name: mean_interval([each[name] for each in report.by_seed.values()]) for name in names}
        rows.append(["mean", *(show(name, each.mean) for name, each in intervals.items())])
        rows.append(["95 % interval of the mean", *(show_range(name, each) for name, each in intervals.items())])
    text = f"On the {'training' if is_own else 'test'} split, by seed:\n\n" + table(["seed", *names], rows)
    if len(report.by_seed) > 1:
        text += (
            "\n\nThe interval is mean ± t·s/√n: it contains the mean over all possible seeds in 95 % of cases. It"
            " leaves out that another test split, or other training data, would give other figures."
        )
    if manifest.task != "regression" and count >= LEAST_FOR_MEASURING:
        interval = wilson_interval(round(manifest.metrics["accuracy"] * count), count)
        text += (
            f"\n\nThe published version's accuracy of {show('accuracy', interval.mean)} is of {count:,} instances;"
            f" its 95 % interval (Wilson) is {show_range('accuracy', interval)}."
        )
    more = [
        f"`{name}` {value:.6g}"
        for name, value in manifest.metrics.items()
        if name not in names and not name.endswith(("_mean", "_low", "_high", "temperature", "_shift"))
    ]
    return text + ("\n\n" + "; ".join(more) + "." if more else "")


def _write_classes(results: Array, test: Split, manifest: Manifest) -> str:
    """Return the number of instances, recall and precision of each class."""
    targets, decided = test.targets.numpy().reshape(-1), postprocess.decide(results, manifest)
    rows = []
    for index, label in enumerate(manifest.output.labels):
        is_class, is_predicted = targets == index, decided == index
        hits = int((is_class & is_predicted).sum())
        shares = [hits / max(1, int(each.sum())) for each in (is_class, is_predicted)]
        rows.append([label, str(int(is_class.sum())), *(show("accuracy", share) for share in shares)])
    return table(["class", "instances", "recall", "precision"], rows)


def _write_calibration(results: Array, splits: Splits, report: Report) -> str:
    if len(splits.test) < LEAST_FOR_MEASURING:
        return f"{len(splits.test)} instances are too few to judge the probabilities. Do not rely on them."
    targets = splits.test.targets.numpy().reshape(-1)
    reliability, spread = measure_reliability(results, targets), measure_spread(results, targets)
    is_binary = results.shape[1] == 2  # noqa: PLR2004
    what = (
        "probability of class 1 and its frequency" if is_binary else "probability of the predicted label and accuracy"
    )
    calibration = report.chosen.calibration
    scaling = "The logits are as trained."
    if calibration != Calibration():
        scaling = (
            f"The logits are multiplied by {calibration.scale:.4f} and shifted by {calibration.shift:.4f}, chosen on"
            " the validation split and folded into the last layer of the served graph."
        )
    return (
        f"Expected calibration error {show('ece', reliability.error)} on the test split: the difference between"
        f" {what}, averaged over 15 bins of equal width. Its 95 % interval (bootstrap) is"
        f" {show('ece', spread.low)} … {show('ece', spread.high)}; exact probabilities would score"
        f" {show('ece', spread.by_chance)} by chance. {scaling}\n\n![reliability diagram](reliability.png)"
    )


def _write_thresholds(predictor: Predictor, splits: Splits, manifest: Manifest) -> str:
    """Return accuracy, precision and recall at several thresholds, on the validation split if there is one."""
    name, split = ("training", splits.train) if splits.validation is None else ("validation", splits.validation)
    probabilities, targets = predict(predictor, split), split.targets.numpy().reshape(-1)
    second, chosen = manifest.output.labels[1], postprocess.choose_threshold(manifest)
    measured = {each: _measure_threshold(probabilities, targets, manifest, each) for each in THRESHOLDS}
    rows = [[f"{each}", *(show("accuracy", share) for share in shares)] for each, shares in measured.items()]
    return (
        f"`{second}` is predicted if its probability is at least {chosen}. With exact"
        f" probabilities, 0.5 makes the fewest errors; if a wrong `{second}` costs r times as much as a missed one, the"
        ' best threshold is r / (1 + r). A request can set its own (`{"parameters": {"threshold": …}}`). On the'
        f" {name} split:\n\n"
        + table(["threshold", "accuracy", f"precision of `{second}`", f"recall of `{second}`"], rows)
    )


def _measure_threshold(
    probabilities: Array, targets: NDArray[np.float32], manifest: Manifest, threshold: float
) -> tuple[float, float, float]:
    """Return accuracy, and precision and recall of the second label, at a threshold."""
    decided = postprocess.decide(probabilities, manifest, threshold)
    hits = int(((decided == 1) & (targets == 1)).sum())
    accuracy = float(np.mean(decided == targets))
    return accuracy, hits / max(1, int(decided.sum())), hits / max(1, int(targets.sum()))


def _write_plots(recipe: Recipe) -> str:
    names = [file for file in recipe.plots if file != "reliability.png"]
    return "\n\n".join(f"![{Path(file).stem}]({file})" for file in names)


def _write_cost(report: Report) -> str:
    heads = ["backend", "bytes", *(f"µs per instance, batch {size}" for size in BATCHES)]
    rows = [
        [name, f"{cost.bytes:,}", *(f"{each:.1f}" for each in cost.microseconds.values())]
        for name, cost in report.costs.items()
    ]
    note = "Measured on one CPU thread of the machine that published it, the backend alone."
    return f"{report.parameters:,} parameters. {note}\n\n" + table(heads, rows)


def _write_provenance(manifest: Manifest, report: Report, recipe: Recipe) -> str:
    training = manifest.training
    assert training is not None
    fitted, seeds = report.chosen.fitted, ",".join(str(each.seed) for each in report.candidates)
    kept = fitted.history.index(best_epoch(fitted)) + 1
    seconds = ", ".join(f"{each.seconds:.0f}" for each in report.candidates)
    is_best = len(report.candidates) > 1 and report.chosen.validation is not None
    versions = ", ".join(f"{name} {number}" for name, number in training.libraries.items())
    return (
        f"`{recipe.command or f'python -m training {manifest.name}'} --seeds {seeds}`: {len(fitted.history)}"
        f" {fitted.steps}s, kept {fitted.steps} {kept};"
        f" {seconds} s of training by seed. Seed {report.chosen.seed} is published"
        f"{', the best on validation' if is_best else ''}."
        f" {versions}. The manifest has the digests of data and artifacts."
    )


def measure_costs(manifest: Manifest, contents: dict[BackendName, bytes]) -> dict[BackendName, Cost]:
    """Return the cost of each artifact."""
    threads = torch.get_num_threads()
    try:
        return {name: _measure(name, content, manifest) for name, content in contents.items()}
    finally:
        torch.set_num_threads(threads)  # the TorchScript backend sets it for the whole process


def _measure(name: BackendName, content: bytes, manifest: Manifest) -> Cost:
    backend = open_backend(name, content, manifest, "cpu", threads=1)
    generator = np.random.default_rng(0)
    rows = {size: generator.random((size, *manifest.input.shape), np.float32) for size in BATCHES}
    if isinstance(manifest.input, ColumnsInput):
        rows = {size: as_rows(build_columns(manifest.input, size, 0), manifest) for size in BATCHES}
    return Cost(len(content), {size: time_calls(backend, inputs) / size * 1e6 for size, inputs in rows.items()})


def time_calls(backend: Backend, inputs: Array) -> float:
    """Return the 10th percentile of the seconds of a call: it is hardly disturbed by other load."""
    for _ in range(2):
        backend.run(inputs)
    seconds: list[float] = []
    while len(seconds) < _LEAST_CALLS or sum(seconds) < _SECONDS:
        started = time.perf_counter()
        backend.run(inputs)
        seconds.append(time.perf_counter() - started)
    return statistics.quantiles(seconds, n=10)[0]
