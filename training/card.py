"""The model card: `README.md` in a version's folder, after Mitchell et al. 2019 (Model cards for model reporting).

Every number in it is computed by the run that publishes the version; nothing is typed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.model import postprocess
from service.model.backends import Array
from service.model.manifest import BackendName, Manifest, Task
from service.model.predictor import Predictor
from training.about import ABOUT
from training.calibration import LEAST_FOR_CALIBRATION, measure_reliability
from training.cost import BATCHES, Cost
from training.data import Split, Splits
from training.evaluate import best_epoch, predict
from training.recipes import Recipe
from training.seeds import Candidate, mean_interval, wilson_interval

CARD_FILE = "README.md"
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_MEANT: dict[Task, str] = {
    "regression": "a number",
    "binary": "one of two classes",
    "multiclass": "one of several classes",
}
_SHARES = ("accuracy", "ece", "auc")


@dataclass(frozen=True)
class Report:
    """What a run found out about the version that it publishes. `by_seed`: the test figures of each candidate."""

    chosen: Candidate
    candidates: Sequence[Candidate]
    by_seed: Mapping[int, dict[str, float]]
    parameters: int
    costs: Mapping[BackendName, Cost]
    robustness: Mapping[str, float]


def write_card(
    folder: Path, manifest: Manifest, recipe: Recipe, splits: Splits, predictor: Predictor, report: Report
) -> None:
    """Write the card into a version's folder; the pictures that it shows stand there already."""
    about = ABOUT[recipe.name]
    results = predict(predictor, splits.test)
    parts = [
        f"# {manifest.title} (`{manifest.name}` version {manifest.version})",
        manifest.description,
        f"## What it is for\n{about.purpose}\n\nIt gives {_MEANT[manifest.task]}. {about.limits}",
        f"## Data\n{about.data}\n\n{_tell_sizes(splits)}",
        f"## Figures\n{_tell_figures(manifest, report, len(splits.test))}",
    ]
    if manifest.task != "regression":
        parts.append(f"## By class\n{_tell_classes(results, splits.test, manifest)}")
        parts.append(f"## Calibration\n{_tell_calibration(results, splits, report)}")
    if manifest.task == "binary":
        parts.append(f"## Threshold\n{_tell_thresholds(predictor, splits, manifest)}")
    if report.robustness:
        parts.append(f"## Robustness\n{_tell_robustness(report.robustness)}")
    parts.append(f"## Pictures\n{_show(recipe)}")
    parts.append(f"## Cost\n{_tell_cost(report)}")
    parts.append(f"## How it was made\n{_tell_making(manifest, report)}")
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def say(name: str, value: float) -> str:
    """Return a figure as a reader wants it: shares in percent, the rest with four digits."""
    return f"{value:.2%}".replace("%", " %") if name.startswith(_SHARES) else f"{value:.4g}"


def _tell_sizes(splits: Splits) -> str:
    named = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    return "Instances: " + ", ".join(f"{name} {len(split):,}" for name, split in named.items() if split) + "."


def _tell_figures(manifest: Manifest, report: Report, count: int) -> str:
    """Return the figures of each seed on the test split, their mean with its interval, and the published one's."""
    names = list(next(iter(report.by_seed.values())))
    rows = [
        [f"{seed}{', published' * (seed == report.chosen.seed)}", *(say(name, figures[name]) for name in names)]
        for seed, figures in report.by_seed.items()
    ]
    if len(rows) > 1:
        intervals = {name: mean_interval([each[name] for each in report.by_seed.values()]) for name in names}
        rows.append(["mean", *(say(name, each.mean) for name, each in intervals.items())])
        ends = [f"{say(name, each.low)} … {say(name, each.high)}" for name, each in intervals.items()]
        rows.append(["95 % interval of the mean", *ends])
    text = "On the test split, by seed:\n\n" + table(["seed", *names], rows)
    if len(report.by_seed) > 1:
        text += "\n\nThe interval is mean ± t·s/√n over the seeds: it holds the mean over all seeds in 95 of 100 cases."
    if manifest.task != "regression" and count >= LEAST_FOR_CALIBRATION:
        sure = wilson_interval(round(manifest.metrics["accuracy"] * count), count)
        text += (
            f"\n\nThe published version's accuracy of {say('accuracy', sure.mean)} is of {count:,} instances; over"
            f" all of their kind, 95 % (Wilson): {say('accuracy', sure.low)} … {say('accuracy', sure.high)}."
        )
    more = [
        f"`{name}` {value:.6g}"
        for name, value in manifest.metrics.items()
        if name not in names and not name.endswith(("_mean", "_low", "_high", "temperature"))
    ]
    return text + ("\n\n" + "; ".join(more) + "." if more else "")


def _tell_classes(results: Array, test: Split, manifest: Manifest) -> str:
    """Return, for each class, how many there are, how many of them are found, and how many of the found are right."""
    targets, decided = test.targets.numpy().reshape(-1), postprocess.decide(results, manifest)
    rows = []
    for index, label in enumerate(manifest.output.labels):
        is_class, is_said = targets == index, decided == index
        right = int((is_class & is_said).sum())
        shares = [right / max(1, int(each.sum())) for each in (is_class, is_said)]
        rows.append([label, str(int(is_class.sum())), *(say("accuracy", share) for share in shares)])
    return table(["class", "instances", "recall", "precision"], rows)


def _tell_calibration(results: Array, splits: Splits, report: Report) -> str:
    if len(splits.test) < LEAST_FOR_CALIBRATION:
        return f"{len(splits.test)} instances cannot tell whether probabilities are right. Do not rely on them."
    reliability = measure_reliability(results, splits.test.targets.numpy().reshape(-1))
    temperature = report.chosen.temperature
    folded = (
        f"The logits are divided by a temperature of {temperature:.4f}, chosen on the validation split and folded into"
        " the last layer of the served graph."
        if temperature != 1
        else "No temperature is applied: none lowered the error on the validation split."
    )
    return (
        f"Expected calibration error {say('ece', reliability.error)} on the test split: in 15 bins of equal width by"
        " the predicted label's probability, the mean difference between that probability and the share that is right"
        f" (Guo et al. 2017). {folded}\n\n![reliability diagram](reliability.png)"
    )


def _tell_thresholds(predictor: Predictor, splits: Splits, manifest: Manifest) -> str:
    """Return what each of some thresholds gives, on validation where there is one."""
    name, split = ("training", splits.train) if splits.validation is None else ("validation", splits.validation)
    probabilities, targets = predict(predictor, split), split.targets.numpy().reshape(-1)
    second, chosen = manifest.output.labels[1], postprocess.choose_threshold(manifest)
    shares = {threshold: _measure_threshold(probabilities, targets, manifest, threshold) for threshold in THRESHOLDS}
    rows = [[f"{threshold}", *(say("accuracy", each) for each in found)] for threshold, found in shares.items()]
    return (
        f"`{second}` is predicted from a probability of {chosen} on, as in the tutorial. Were the probabilities exact,"
        " no threshold would make fewer mistakes where both kinds are equally bad; where a wrong"
        f" `{second}` costs r times as much as a missed one, the best is r / (1 + r). A request can set its own"
        f' (`{{"parameters": {{"threshold": …}}}}`). On the {name} split:\n\n'
        + table(["threshold", "accuracy", f"precision of `{second}`", f"recall of `{second}`"], rows)
    )


def _measure_threshold(
    probabilities: Array, targets: NDArray[np.float32], manifest: Manifest, threshold: float
) -> tuple[float, float, float]:
    """Return accuracy, and precision and recall of the second label, at a threshold."""
    decided = postprocess.decide(probabilities, manifest, threshold)
    right = int(((decided == 1) & (targets == 1)).sum())
    accuracy = float(np.mean(decided == targets))
    return accuracy, right / max(1, int(decided.sum())), right / max(1, int(targets.sum()))


def _tell_robustness(found: Mapping[str, float]) -> str:
    rows = [[name, say("accuracy", share)] for name, share in found.items()]
    return "Accuracy on the test pictures, changed:\n\n" + table(["pictures", "accuracy"], rows)


def _show(recipe: Recipe) -> str:
    names = [file for file in recipe.plots if file != "reliability.png"]
    return "\n\n".join(f"![{Path(file).stem}]({file})" for file in names)


def _tell_cost(report: Report) -> str:
    heads = ["backend", "bytes", *(f"µs an instance, batch {size}" for size in BATCHES)]
    rows = [
        [name, f"{cost.bytes:,}", *(f"{each:.1f}" for each in cost.microseconds.values())]
        for name, cost in report.costs.items()
    ]
    note = "One thread of the CPU that published it, the backend alone."
    return f"{report.parameters:,} parameters. {note}\n\n" + table(heads, rows)


def _tell_making(manifest: Manifest, report: Report) -> str:
    training = manifest.training
    assert training is not None
    fitted, seeds = report.chosen.fitted, ",".join(str(each.seed) for each in report.candidates)
    kept = fitted.history.index(best_epoch(fitted)) + 1
    seconds = ", ".join(f"{each.seconds:.0f}" for each in report.candidates)
    is_best = len(report.candidates) > 1 and fitted.history[kept - 1].validation_accuracy is not None
    versions = ", ".join(f"{name} {number}" for name, number in training.libraries.items())
    return (
        f"`python -m training {manifest.name} --seeds {seeds}`: {len(fitted.history)} epochs, kept epoch {kept};"
        f" {seconds} s of training by seed. Seed {report.chosen.seed} is published"
        f"{', the best on validation' if is_best else ''}."
        f" {versions}. The manifest has the digests of data and artifacts."
    )
