"""`python -m training tabular`: a model of the user's own table, from CSV or Parquet to a published version.

A linear model, a perceptron with embeddings and gradient-boosted trees are fitted; the one with the lowest loss on the
validation split is published. Each is a net on columns (`tabular_nets`), so that everything after the fit is as for any
recipe: export, parity, figures, card, publish.
"""

import math
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped] # as scikit-learn depends on it
from torch import nn

from service.model.manifest import ColumnsInput, Output, Task
from service.model.predictor import Predictor
from training import plots
from training.calibration import LEAST_FOR_FITTING
from training.card import show, show_range, table
from training.compare import measure_losses
from training.config import TrainConfig
from training.data import Split, Splits
from training.evaluate import best_epoch, predict
from training.nets import rescale_logits
from training.progress import Epoch
from training.recipe import Recipe
from training.seeds import bootstrap_interval
from training.table import TableOptions, UserTable
from training.tabular_nets import Encode, Mlp, build_boosted
from training.trainer import CRITERIA, Fitted, Settings, Trainer, measure_outputs

GENTLE = "boosted gently"
WAYS: dict[str, dict[str, Any]] = {  # of fitting, with what scikit-learn's boosting gets
    "linear": {},
    "mlp": {},
    "boosted": {},
    GENTLE: {"learning_rate": 0.05, "max_leaf_nodes": 15, "l2_regularization": 1.0},
}
OUTPUTS: dict[Task, Literal["value", "probability", "probabilities"]] = {
    "regression": "value",
    "binary": "probability",
    "multiclass": "probabilities",
}
SUSPICIOUS = 0.97  # share of the baseline's errors that one column alone removes
_STEPS = 3000  # of a net's fit, about,
_EPOCHS = (30, 120)  # within these bounds
_PATIENCE = 5  # a fit ends when the last fifth of its epochs brought nothing
_ROUNDS = {True: 100, False: 200}  # of boosting, by whether there are many classes
_MANY_CLASSES = 3
_SMALL = 500_000  # cells; a step of a larger table is worth several threads
_SAMPLE = 2000  # rows that importance and suspicion are measured on
_REPEATS = 3
_FOLDS, _LEAF = 5, 5
_FEW_ROWS, _FEW_PER_COLUMN, _RARE = 200, 10, 0.1


@dataclass
class Tabular:
    """The recipe of one table. `scores` and `importance` are filled in by its run."""

    options: TableOptions
    table: UserTable
    ways: tuple[str, ...] = tuple(WAYS)
    scores: dict[str, Epoch] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)

    def build_recipe(self, name: str, command: str) -> Recipe:
        """Return the recipe; `command` is what the card says made the model."""
        task, target, file = self.table.task, self.options.target, self.options.file.name
        drawn: dict[str, plots.Draw] = {"importance.png": self.draw_importance, "loss.png": plots.draw_loss}
        if task == "regression":
            drawn["predicted.png"] = plots.draw_predicted
        else:
            drawn |= {"confusion.png": plots.draw_confusion, "reliability.png": plots.draw_reliability}
        count = len(self.table.columns)
        return Recipe(
            name=name,
            title=f"{target} ({file})",
            description=f"Predicts {target} from {count} column{'s' * (count > 1)} of {file}.",
            task=task,
            input=ColumnsInput(kind="columns", columns=self.table.columns, feed="floats", tensor="inputs"),
            output=Output(
                kind=OUTPUTS[task],
                name=target,
                labels=self.table.labels,
                threshold=0.5 if task == "binary" else None,
                tensor="outputs",
            ),
            epochs=choose_epochs(len(self.table.splits.train)),
            load=lambda _: self.table.splits,
            fit=self.fit,
            figures=lambda _, splits: measure_baseline(splits, task, len(self.table.labels)),
            plots=drawn,
            purpose=f"Predicts `{target}` of rows like those of `{file}`.",
            limits="It only knows rows like those it was trained on, and a correlation in them need not be a cause.",
            source=f"`{file}`, {self._describe_split()}",
            calibrates=task != "regression",
            sections=self.write_sections,
            command=command,
        )

    def print_table(self) -> None:
        """Say what was understood of the table, and warn of what may be wrong with it."""
        read = self.table
        print(f"{self.options.target}: {read.task}{', ' + ', '.join(read.labels[:6]) if read.labels else ''}  (--task)")
        for column in read.columns:
            values = f": {', '.join(map(str, column.values[:4]))}{', …' * (len(column.values) > 4)}"  # noqa: PLR2004
            print(f"  {column.name}: {column.type}{' or missing' * column.nullable}{values * bool(column.values)}")
        for name, why in read.left_out.items():
            print(f"  {name}: not used, {why}")
        for warning in self.list_warnings():
            print(f"warning: {warning}", file=sys.stderr)

    def fit(self, splits: Splits, settings: Settings) -> Fitted:
        """Fit every way, and return the one with the lowest validation loss.

        A validation split that is too small to choose by is cross-validated together with the training split, and the
        chosen way is then fitted to both.
        """
        assert splits.validation is not None
        train, validation, whole = splits.train, splits.validation, join_splits(splits)
        is_small = len(validation) < LEAST_FOR_FITTING and self.options.group is None and self.options.time is None
        threads = 1 if whole.inputs.numel() < _SMALL else None  # waiting for another takes longer than the work
        with threadpool_limits(threads):
            if is_small:
                found = {way: self._cross_validate(way, whole, settings) for way in self.ways}
                self.scores = {way: epoch for way, (epoch, _) in found.items()}
            else:
                fitted = {way: self._fit_way(way, train, validation, settings) for way in self.ways}
                self.scores = {way: best_epoch(each) for way, each in fitted.items()}
            chosen = min(self.scores, key=lambda way: self.scores[way].validation_loss or 0.0)
            for way, epoch in self.scores.items():
                print(f"{way}: {epoch}{'  (chosen)' * (way == chosen)}", flush=True)
            return self._fit_way(chosen, whole, None, settings, found[chosen][1]) if is_small else fitted[chosen]

    def _cross_validate(self, way: str, whole: Split, settings: Settings) -> tuple[Epoch, int]:
        """Return the mean figures over folds, and the median number of epochs or rounds that were best."""
        targets = whole.targets.reshape(-1).numpy()
        folds = KFold if self.table.task == "regression" else StratifiedKFold
        best, counts = [], []
        for kept, held in folds(_FOLDS, shuffle=True, random_state=0).split(np.zeros(len(targets)), targets):
            train, validation = (Split(whole.inputs[chosen], whole.targets[chosen]) for chosen in (kept, held))
            with redirect_stdout(StringIO()):  # the figures of one fold say little
                fitted = self._fit_way(way, train, validation, settings)
            best.append(best_epoch(fitted))
            counts.append(fitted.history.index(best[-1]) + 1)
        means = [
            [value for value in each if value is not None]
            for each in zip(*(vars(b).values() for b in best), strict=True)
        ]
        return Epoch(*(float(np.mean(each)) if each else None for each in means)), int(np.median(counts))  # type: ignore[arg-type] # there is a loss

    def _fit_way(
        self, way: str, train: Split, validation: Split | None, settings: Settings, count: int | None = None
    ) -> Fitted:
        """Fit one way; without a validation split, for `count` epochs or rounds."""
        if way in ("linear", "mlp"):
            return self._fit_net(way, train, validation, settings, count)
        return self._fit_boosted(WAYS[way], train, validation, count or _ROUNDS[self.table.outputs > _MANY_CLASSES])

    def _fit_net(
        self,
        kind: str,
        train: Split,
        validation: Split | None,
        settings: Settings,
        count: int | None,
    ) -> Fitted:
        task = self.table.task
        encode = Encode(self.table.columns, train, kind)
        last = nn.Linear(encode.width, self.table.outputs)
        net = nn.Sequential(encode, last) if kind == "linear" else Mlp(encode, self.table.outputs)
        mean, deviation = 0.0, 1.0
        if task == "regression":
            mean, deviation = train.targets.mean().item(), max(train.targets.std().item(), 1e-9)

        def scale(split: Split) -> Split:
            targets = split.targets if task == "multiclass" else (split.targets - mean) / deviation
            return Split(split.inputs, targets).to(settings.device)

        config = TrainConfig(
            settings.epochs,
            batch_size=choose_batch_size(len(train)),
            lr=0.02 if kind == "linear" else 0.004,
            optimizer="adamw",
            weight_decay=0.01 if kind == "linear" else 0.05,
            warmup=0.1,
            anneal=0.7,
        )
        trainer = Trainer(net, task, config, scale(train), None if validation is None else scale(validation))
        fitted = trainer.fit(kind, lambda done: explain_stop(trainer.history, done, settings.epochs, count))
        rescale_logits(net.cpu(), deviation, mean)
        return replace(fitted, history=[_scale_epoch(each, deviation**2) for each in fitted.history])

    def _fit_boosted(self, changes: dict[str, Any], train: Split, validation: Split | None, rounds: int) -> Fitted:
        """Boost trees, and keep the round with the lowest validation loss."""
        encode, task = Encode(self.table.columns, train, "boosted").eval(), self.table.task
        build = HistGradientBoostingRegressor if task == "regression" else HistGradientBoostingClassifier
        fixed = {"early_stopping": False, "random_state": torch.initial_seed() % 2**31, **changes}
        inputs, targets = encode(train.inputs).detach().numpy(), train.targets.reshape(-1).numpy()
        model = build(max_iter=rounds, **fixed).fit(inputs, targets)
        fitted = Fitted(nn.Sequential(), measure_rounds(model, encode, train, validation, task))
        if validation is not None:
            rounds = fitted.history.index(best_epoch(fitted)) + 1
            model = build(max_iter=rounds, **fixed).fit(inputs, targets)
        return replace(fitted, net=build_boosted(encode, model).eval(), criterion=CRITERIA[task], steps="round")

    def _describe_split(self) -> str:
        options = self.options
        if options.time is not None:
            return f"split by `{options.time}`: the newest rows test, those before them validate."
        if options.group is not None:
            return f"split at random by `{options.group}`: all rows of a group are in one split."
        return "split at random" + (", each class in the same shares." if self.table.labels else ".")

    def list_warnings(self) -> list[str]:
        """Return what the user should look at before trusting the model."""
        columns, splits, options = self.table.columns, self.table.splits, self.options
        found = [
            f"leak suspected: `{name}` alone {shown}; is it known before `{options.target}` is?"
            for name, shown in find_leaks(self.table).items()
        ]
        count = len(splits.train)
        if count < max(_FEW_ROWS, _FEW_PER_COLUMN * len(columns)):
            found.append(f"too few rows: {count} to train on {len(columns)} columns; the figures are rough")
        shares = np.bincount(splits.train.targets.reshape(-1).long().numpy()) / count if self.table.labels else [1.0]
        if min(shares) < _RARE / max(1, len(shares) - 1):
            rare = self.table.labels[int(np.argmin(shares))]
            found.append(
                f"class imbalance: `{rare}` is {min(shares):.1%} of the rows; read its recall and precision rather than"
                " the accuracy"
            )
        dates = [column.name for column in columns if column.type == "datetime"]
        if dates and options.time is None:
            found.append(f"rows have dates: `--time {dates[0]}` would test on the newest, as in use")
        return found

    def write_sections(self, fitted: Fitted, splits: Splits, predictor: Predictor) -> Mapping[str, str]:
        """Return the parts of the card that only a table has."""
        del fitted
        self._measure_importance(splits, predictor)
        unit = "mean squared error" if self.table.task == "regression" else "log loss"
        types = {column.name: f"{column.type}{', may be missing' * column.nullable}" for column in self.table.columns}
        rows = [[f"`{name}`", types[name], f"{rise:+.4g}"] for name, rise in self.importance.items()]
        columns = (
            f"Importance is how much the {unit} on the validation split rises when the column is shuffled"
            " (permutation importance). Columns that say the same share it.\n\n"
            + table(["column", "type", "importance"], rows)
        )
        if self.table.left_out:
            out = "; ".join(f"`{name}` ({why})" for name, why in self.table.left_out.items())
            columns += f"\n\nNot used: {out}."
        warnings = "\n".join(f"- {each}" for each in self.list_warnings()) or "None."
        return {
            "Warnings": warnings,
            "Comparison": self._write_comparison(splits, predictor),
            "Columns": columns,
        }

    def _write_comparison(self, splits: Splits, predictor: Predictor) -> str:
        """Return how the kinds did on validation, and the chosen one beside the baseline on the test split."""
        is_regression = self.table.task == "regression"
        heads = ["model", "validation loss", *([] if is_regression else ["validation accuracy"])]
        rows = [
            [kind, f"{each.validation_loss:.4g}"]
            + ([] if is_regression else [show("accuracy", each.validation_accuracy or 0.0)])
            for kind, each in self.scores.items()
        ]
        return f"The model with the lowest validation loss was chosen.\n\n{table(heads, rows)}\n\n" + describe_baseline(
            splits, predictor
        )

    def _measure_importance(self, splits: Splits, predictor: Predictor) -> None:
        """Measure, once, how much the loss rises when each column is shuffled."""
        if self.importance or splits.validation is None:
            return
        split = Split(splits.validation.inputs[:_SAMPLE], splits.validation.targets[:_SAMPLE])
        random, task = torch.Generator().manual_seed(0), self.table.task
        plain = measure_losses(predict(predictor, split), split, task).mean()
        rises = {}
        for index, column in enumerate(self.table.columns):
            shuffled = []
            for _ in range(_REPEATS):
                inputs = split.inputs.clone()
                inputs[:, index] = inputs[torch.randperm(len(split), generator=random), index]
                changed = Split(inputs, split.targets)
                shuffled.append(measure_losses(predict(predictor, changed), changed, task).mean())
            rises[column.name] = float(np.mean(shuffled) - plain)
        self.importance = dict(sorted(rises.items(), key=lambda each: -each[1]))

    def draw_importance(self, path: Path, fitted: Fitted, splits: Splits, predictor: Predictor) -> None:
        """Draw the importance of the columns."""
        del fitted
        self._measure_importance(splits, predictor)
        unit = "mean squared error" if self.table.task == "regression" else "log loss"
        plots.draw_bars(path, "What the prediction rests on", self.importance, f"rise of the {unit} when shuffled")


def choose_batch_size(rows: int) -> int:
    """Return about a hundredth of the rows, from 16 to 1,024."""
    return min(1024, max(16, rows // 100))


def choose_epochs(rows: int) -> int:
    """Return as many epochs as make about 3,000 steps, from 30 to 200."""
    return int(np.clip(_STEPS * choose_batch_size(rows) // rows, *_EPOCHS))


def explain_stop(history: list[Epoch], done: int, epochs: int, count: int | None = None) -> str:
    """Return why a fit should end: `count` epochs are done, or a fifth of them brought no lower validation loss."""
    if count is not None:
        return "as long as cross-validation found best" if done >= count else ""
    losses = [epoch.validation_loss or math.inf for epoch in history]
    waited = done - 1 - losses.index(min(losses))
    return f"no lower validation loss for {waited} epochs" if waited > epochs // _PATIENCE else ""


def measure_rounds(
    model: Any,  # noqa: ANN401 - a HistGradientBoostingClassifier or -Regressor
    encode: Encode,
    train: Split,
    validation: Split | None,
    task: Task,
) -> list[Epoch]:
    """Return loss and accuracy after each round of boosting."""
    stages = getattr(model, "staged_decision_function", None) or model.staged_predict
    measured = []
    for split in (train, *([] if validation is None else [validation])):
        inputs = encode(split.inputs).detach().numpy()
        columns = (torch.from_numpy(scores.astype(np.float32)).reshape(len(split), -1) for scores in stages(inputs))
        measured.append([measure_outputs(each, split.targets, task) for each in columns])
    return [
        replace(
            each[0], **({"validation_loss": each[1].loss, "validation_accuracy": each[1].accuracy} if each[1:] else {})
        )
        for each in zip(*measured, strict=True)
    ]


def join_splits(splits: Splits) -> Split:
    """Return the rows of the training and the validation split."""
    assert splits.validation is not None
    parts = (splits.train, splits.validation)
    return Split(*(torch.cat(each) for each in zip(*((part.inputs, part.targets) for part in parts), strict=True)))


def measure_baseline(splits: Splits, task: Task, labels: int) -> dict[str, float]:
    """Return the test figures of always answering the training rows' mean, or their shares and commonest class."""
    train, test = splits.train.targets.reshape(-1), splits.test.targets.reshape(-1)
    if task == "regression":
        mse = ((test.double() - train.double().mean()) ** 2).mean().item()
        return {"baseline_mse": mse}
    shares = torch.bincount(train.long(), minlength=labels).double() / len(train)
    return {
        "baseline_accuracy": (test.long() == shares.argmax()).double().mean().item(),
        "baseline_loss": -shares[test.long()].log().mean().item(),
    }


def describe_baseline(splits: Splits, predictor: Predictor) -> str:
    """Return the test loss with its interval, beside that of an answer that is always the same."""
    task = predictor.manifest.task
    baseline = measure_baseline(splits, task, len(predictor.manifest.output.labels))
    interval = bootstrap_interval(measure_losses(predict(predictor, splits.test), splits.test, task))
    is_regression = task == "regression"
    unit, known = ("squared error", "mse") if is_regression else ("log loss", "loss")
    text = (
        f"On the test split the mean {unit} is {interval.mean:.4g}, 95 % interval (bootstrap)"
        f" {show_range(known, interval)}. Always answering"
        f" {'the mean' if is_regression else 'the shares of the classes'} in training has"
        f" {baseline[f'baseline_{known}']:.4g}."
    )
    if not is_regression:
        text += f" Always saying the commonest class is right in {show('accuracy', baseline['baseline_accuracy'])}."
    return text


def find_leaks(read: UserTable) -> dict[str, str]:
    """Return the columns that predict the target almost perfectly on their own, by what they achieve.

    A small decision tree on one column, cross-validated on the rows that do not test.
    """
    whole = join_splits(read.splits)
    chosen = np.random.default_rng(0).permutation(len(whole))[:_SAMPLE]
    inputs, targets = whole.inputs[chosen].numpy(), whole.targets[chosen].reshape(-1).numpy()
    is_regression = read.task == "regression"
    tree = DecisionTreeRegressor if is_regression else DecisionTreeClassifier
    found = {}
    for index, column in enumerate(read.columns):
        model = tree(min_samples_leaf=_LEAF, random_state=0)
        guessed = cross_val_predict(model, inputs[:, index : index + 1], targets, cv=_FOLDS)
        if is_regression:
            share = 1 - np.mean((guessed - targets) ** 2) / np.var(targets)
            shown = f"explains {share:.1%} of the variance"
        else:
            baseline, accuracy = np.bincount(targets.astype(int)).max() / len(targets), np.mean(guessed == targets)
            share = (accuracy - baseline) / (1 - baseline)
            shown = f"gives the right class in {accuracy:.1%}"
        if share > SUSPICIOUS:
            found[column.name] = shown
    return found


def _scale_epoch(epoch: Epoch, factor: float) -> Epoch:
    """Return an epoch with its losses in the target's own unit."""
    checked = None if epoch.validation_loss is None else epoch.validation_loss * factor
    return replace(epoch, loss=epoch.loss * factor, validation_loss=checked)
