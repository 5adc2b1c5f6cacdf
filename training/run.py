"""One training run, from a recipe to a published version.

    load → fit each seed → choose → serving graph → export → parity → evaluate → quantise → plots → card → manifest
    → prove as served → publish

Nothing is written before training is over but checkpoints, and nothing stays in the models folder when a step fails.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from service.errors import ModelRefusedError
from service.model.manifest import BackendName, Manifest
from service.model.predictor import Predictor, load_predictor
from training import distributed
from training.card import Report, write_card
from training.cost import measure_costs
from training.data import Splits
from training.describe import build_manifest, describe_training
from training.errors import CheckError, DeviceError
from training.evaluate import evaluate
from training.export import export
from training.nets import ServingNet
from training.parity import check_parity, open_predictors
from training.publish import choose_version, publish, staging, write_manifest
from training.quantize import quantize
from training.recipes import Recipe
from training.robustness import count_hits, measure_robustness
from training.seeds import Candidate, choose_candidate, fit_seed, mean_interval, measure_candidate
from training.trainer import Settings

CHECKPOINTS = ".checkpoints"  # in the data folder


@dataclass(frozen=True)
class Request:
    """What a caller asks of a run; None means the recipe's or the folder's own choice."""

    models_dir: Path = Path("models")
    data_dir: Path = Path("data")
    seeds: tuple[int, ...] = (0,)
    epochs: int | None = None
    device: str = "auto"
    version: int | None = None


@dataclass(frozen=True)
class Draft:
    """A version before it is published: all that will stand in its folder but the pictures."""

    manifest: Manifest
    contents: dict[BackendName, bytes]
    predictor: Predictor
    report: Report


def run(recipe: Recipe, request: Request) -> Path:
    """Train, export, prove and publish one model.

    Returns:
        the version folder.

    Raises:
        TrainingError: the run failed and published nothing; its text is one line that says why.
    """
    number = choose_version(request.models_dir, recipe.name, request.version)
    splits = load(recipe, request)
    draft = prove(recipe, number, splits, fit_seeds(recipe, splits, request))
    with staging(request.models_dir, recipe.name, number) as folder:
        for name, content in draft.contents.items():
            (folder / draft.manifest.artifacts[name].file).write_bytes(content)
        for file, draw in recipe.plots.items():
            draw(folder / file, draft.report.chosen.fitted, splits, draft.predictor)
        write_card(folder, draft.manifest, recipe, splits, draft.predictor, draft.report)
        write_manifest(folder, draft.manifest)
        check_as_served(folder, list(draft.contents))
        published = publish(folder, request.models_dir)
    for seed in request.seeds:
        find_checkpoint(recipe, seed, request).unlink(missing_ok=True)
    return published


def assist(recipe: Recipe, request: Request) -> None:
    """Take part in the fits of a run that the first rank makes; see `distributed`."""
    fit_seeds(recipe, load(recipe, request), request)


def load(recipe: Recipe, request: Request) -> Splits:
    """Return a recipe's data; of several processes, the first one downloads it."""
    return distributed.first_alone(lambda: recipe.load(request.data_dir))


def prove(recipe: Recipe, number: int, splits: Splits, candidates: Sequence[Candidate]) -> Draft:
    """Export the best candidate, prove its artifacts, and measure everything that manifest and card will say."""
    chosen = choose_candidate(candidates)
    serving = ServingNet(chosen.fitted.net, recipe.task).eval()
    contents = export(serving, recipe.input.shape)
    manifest = build_manifest(recipe, number, splits, contents, serving)
    predictors = open_predictors(manifest, contents)
    training = describe_training(recipe, chosen, splits, check_parity(serving, predictors, chosen.seed))
    by_seed = {each.seed: measure_candidate(each, splits, manifest) for each in candidates}
    metrics = evaluate(predictors, splits.test) | recipe.figures(chosen.fitted, splits) | summarize_seeds(by_seed)
    if chosen.temperature != 1:
        metrics["temperature"] = chosen.temperature
    is_image = recipe.input.kind == "image"
    if is_image and (rounded := quantize(contents["onnx"], predictors["onnx"], splits)) is not None:
        contents, manifest = contents | {"onnx-int8": rounded.content}, rounded.predictor.manifest
        metrics["int8_accuracy"] = count_hits(rounded.predictor, splits.test)
    report = Report(
        chosen=chosen,
        candidates=candidates,
        by_seed=by_seed,
        parameters=sum(each.numel() for each in chosen.fitted.net.parameters()),
        costs=measure_costs(manifest, contents),
        robustness=measure_robustness(predictors["onnx"], splits.test) if is_image else {},
    )
    fields = manifest.model_dump() | {"metrics": metrics, "training": training.model_dump()}
    return Draft(Manifest.model_validate(fields), contents, predictors["onnx"], report)


def fit_seeds(recipe: Recipe, splits: Splits, request: Request) -> list[Candidate]:
    """Fit a recipe from each seed, taking up where an earlier run of the same fit was cut short."""
    epochs = recipe.epochs if request.epochs is None else request.epochs
    device = choose_device(request.device, recipe)
    settings = [(seed, Settings(epochs, device, find_checkpoint(recipe, seed, request))) for seed in request.seeds]
    return [fit_seed(recipe, splits, seed, each) for seed, each in settings]


def find_checkpoint(recipe: Recipe, seed: int, request: Request) -> Path:
    """Return where a long fit keeps its state until it is published; a trial of fewer epochs has a place of its own."""
    epochs = recipe.epochs if request.epochs is None else request.epochs
    return request.data_dir / CHECKPOINTS / f"{recipe.name}-seed{seed}-epochs{epochs}.pt"


def summarize_seeds(by_seed: Mapping[int, dict[str, float]]) -> dict[str, float]:
    """Return mean and 95 % interval of the first test figure (accuracy, or mse) where there are several seeds."""
    if len(by_seed) == 1:
        return {}
    name = next(iter(next(iter(by_seed.values()))))
    interval = mean_interval([figures[name] for figures in by_seed.values()])
    return {f"{name}_mean": interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def choose_device(wanted: str, recipe: Recipe) -> torch.device:
    """Return the device to train on; "auto" is the GPU where there is one and the recipe gains from it.

    Raises:
        DeviceError: the device is not there.
    """
    if wanted == "auto":
        return torch.device("cuda" if recipe.gains_from_gpu and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(f"device {wanted!r} cannot be used here; give cpu, or auto for what there is") from error
    return device


def check_as_served(folder: Path, names: Sequence[BackendName]) -> None:
    """Load a staged version as the service will: manifest, digests, golden samples, each artifact.

    Raises:
        CheckError: the service would refuse it.
    """
    try:
        for name in names:
            load_predictor(folder, backend=name, device="cpu", threads=torch.get_num_threads())
    except ModelRefusedError as error:
        raise CheckError(f"the service would refuse the version: {error}") from error
