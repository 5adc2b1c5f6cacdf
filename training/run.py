"""One training run, from a recipe to a published version.

    load → fit each seed → choose → serving graph → export → parity → evaluate → quantize → compare with the
    last version → plots → card → manifest → check as served → publish

Until training is over only checkpoints are written, and a failed step leaves nothing in the models folder.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from service.errors import ModelRefusedError
from service.model.manifest import BackendName, Manifest
from service.model.predictor import Predictor, load_predictor
from service.model.version_folder import load_manifest
from training.calibration import Calibration
from training.card import Report, measure_costs, write_card
from training.compare import check_not_worse
from training.data import Splits
from training.describe import build_manifest, describe_training
from training.errors import CheckError, DeviceError, RecipeError
from training.evaluate import evaluate, measure_split
from training.export import export
from training.nets import ServingNet
from training.parity import check_parity, open_predictors
from training.publish import choose_version, publish, staging, write_manifest
from training.quantize import quantize
from training.recipe import Recipe
from training.seeds import Candidate, choose_candidate, fit_seed, mean_interval, measure_candidate
from training.trainer import Settings

CHECKPOINTS = ".checkpoints"  # in the data folder


@dataclass(frozen=True)
class Request:
    """Options of a run.

    `epochs` None: the recipe's. `version` None: the next free one. `force`: publish even what is worse
    than the last version. `changes`: other values of hyperparameters, for a trial.
    """

    models_dir: Path = Path("models")
    data_dir: Path = Path("data")
    seeds: tuple[int, ...] = (0,)
    epochs: int | None = None
    device: str = "auto"
    version: int | None = None
    force: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Draft:
    """A version before it is published: everything but its plots."""

    manifest: Manifest
    contents: dict[BackendName, bytes]
    predictor: Predictor
    report: Report


def run(recipe: Recipe, request: Request) -> Path:
    """Train, export, check and publish one model.

    Returns:
        the version folder.

    Raises:
        TrainingError: the run failed and published nothing; the message is one line.
    """
    with staged(recipe, request) as folder:
        published = publish(folder, request.models_dir)
    for seed in request.seeds:
        find_checkpoint(recipe, seed, request).unlink(missing_ok=True)
    return published


def rehearse(recipe: Recipe, request: Request) -> Manifest:
    """Train, export and check one model, and publish nothing. The state of a long fit is kept.

    Raises:
        TrainingError: a check failed.
    """
    with staged(recipe, replace(request, force=True)) as folder:
        return load_manifest(folder)


@contextmanager
def staged(recipe: Recipe, request: Request) -> Iterator[Path]:
    """Train a version, and yield its folder, complete and checked; it is removed on exit unless it was published."""
    number = choose_version(request.models_dir, recipe.name, request.version)
    splits = recipe.load(request.data_dir)
    draft = build_draft(recipe, number, splits, fit_seeds(recipe, splits, request))
    if not request.force:
        check_not_worse(request.models_dir, draft.predictor, splits)
    with staging(request.models_dir, recipe.name, number) as folder:
        for name, content in draft.contents.items():
            (folder / draft.manifest.artifacts[name].file).write_bytes(content)
        for file, draw in recipe.plots.items():
            draw(folder / file, draft.report.chosen.fitted, splits, draft.predictor)
        write_card(folder, draft.manifest, recipe, splits, draft.predictor, draft.report)
        write_manifest(folder, draft.manifest)
        check_as_served(folder, list(draft.contents))
        yield folder


def build_draft(recipe: Recipe, number: int, splits: Splits, candidates: Sequence[Candidate]) -> Draft:
    """Export the best candidate, check its artifacts, and measure what manifest and card contain."""
    chosen = choose_candidate(candidates)
    serving = ServingNet(chosen.fitted.net, recipe.task).eval()
    contents = export(serving, recipe.input.shape, torchscript=recipe.input.kind != "columns")
    manifest = build_manifest(recipe, number, splits, contents, serving)
    predictors = open_predictors(manifest, contents)
    training = describe_training(recipe, chosen, splits, check_parity(serving, predictors, chosen.seed))
    by_seed = {each.seed: measure_candidate(each, splits, manifest) for each in candidates}
    metrics = evaluate(predictors, splits.test) | recipe.figures(chosen.fitted, splits) | summarize_seeds(by_seed)
    if chosen.calibration != Calibration():
        metrics["temperature"] = 1 / chosen.calibration.scale
        if chosen.calibration.shift:
            metrics["calibration_shift"] = chosen.calibration.shift
    if recipe.quantizes and (quantized := quantize(contents["onnx"], predictors["onnx"], splits)) is not None:
        contents, manifest = contents | {"onnx-int8": quantized.content}, quantized.predictor.manifest
        metrics |= {f"int8_{name}": value for name, value in measure_split(quantized.predictor, splits.test).items()}
    report = Report(
        chosen=chosen,
        candidates=candidates,
        by_seed=by_seed,
        parameters=sum(each.numel() for each in chosen.fitted.net.parameters()),
        costs=measure_costs(manifest, contents),
    )
    described = manifest.model_copy(update={"metrics": metrics, "training": training})
    return Draft(described, contents, predictors["onnx"], report)


def fit_seeds(recipe: Recipe, splits: Splits, request: Request) -> list[Candidate]:
    """Fit a recipe from each seed, resuming interrupted fits.

    Raises:
        RecipeError: a hyperparameter is to be changed that the recipe does not have.
    """
    if unknown := [name for name in request.changes if name not in recipe.options]:
        has = ", ".join("--" + name.replace("_", "-") for name in recipe.options) or "none of them"
        raise RecipeError(f"{recipe.name} has no --{unknown[0].replace('_', '-')}; it has {has}")
    epochs = recipe.epochs if request.epochs is None else request.epochs
    device = choose_device(request.device, recipe)
    settings = [
        (seed, Settings(epochs, device, find_checkpoint(recipe, seed, request), request.changes))
        for seed in request.seeds
    ]
    return [fit_seed(recipe, splits, seed, each) for seed, each in settings]


def find_checkpoint(recipe: Recipe, seed: int, request: Request) -> Path:
    """Return the checkpoint file of a fit; a trial with fewer epochs has its own."""
    epochs = recipe.epochs if request.epochs is None else request.epochs
    return request.data_dir / CHECKPOINTS / f"{recipe.name}-seed{seed}-epochs{epochs}.pt"


def summarize_seeds(by_seed: Mapping[int, dict[str, float]]) -> dict[str, float]:
    """Return mean and 95 % interval of the first test metric (accuracy, or mse) if there are several seeds."""
    if len(by_seed) == 1:
        return {}
    name = next(iter(next(iter(by_seed.values()))))
    interval = mean_interval([figures[name] for figures in by_seed.values()])
    return {f"{name}_mean": interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def choose_device(wanted: str, recipe: Recipe) -> torch.device:
    """Return the device to train on; "auto" is the GPU if there is one and the recipe benefits from it.

    Raises:
        DeviceError: the device cannot be used.
    """
    if wanted == "auto":
        return torch.device("cuda" if recipe.benefits_from_gpu and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(f"device {wanted!r} cannot be used here; use cpu or auto") from error
    return device


def check_as_served(folder: Path, names: Sequence[BackendName]) -> None:
    """Load a staged version as the service will, with each of its artifacts.

    Raises:
        CheckError: the service would refuse it.
    """
    try:
        for name in names:
            load_predictor(folder, backend=name, device="cpu", threads=torch.get_num_threads())
    except ModelRefusedError as error:
        raise CheckError(f"the service would refuse the version: {error}") from error
