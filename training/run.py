"""One training run, from a recipe to a published version.

    load → fit → serving graph → export → parity → evaluate → plots → manifest → prove as served → publish

Nothing is written before training is over, and nothing stays when a step fails.
"""

import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from service.backends import Array
from service.errors import ModelRefusedError
from service.manifest import (
    Artifact,
    BackendName,
    Feature,
    Golden,
    Input,
    Manifest,
    TabularInput,
    Training,
    digest,
)
from service.predictor import load_predictor
from training.data import Split, Splits, as_floats
from training.errors import CheckError, DeviceError
from training.evaluate import evaluate
from training.export import ARTIFACT_FILES, export
from training.nets import ServingNet
from training.parity import check_parity, open_predictors, run_net
from training.publish import choose_version, publish, staging, write_manifest
from training.recipes import Recipe, Settings

GOLDEN_SAMPLES = 4
LIBRARIES = ("torch", "torchvision", "numpy", "scikit-learn", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Request:
    """What a caller asks of a run; None means the recipe's or the folder's own choice."""

    models_dir: Path = Path("models")
    data_dir: Path = Path("data")
    seed: int = 0
    epochs: int | None = None
    device: str = "auto"
    version: int | None = None


def run(recipe: Recipe, request: Request) -> Path:
    """Train, export, prove and publish one model.

    Returns:
        the version folder.

    Raises:
        TrainingError: the run failed and published nothing; its text is one line that says why.
    """
    number = choose_version(request.models_dir, recipe.name, request.version)
    settings = Settings(
        epochs=recipe.epochs if request.epochs is None else request.epochs,
        device=choose_device(request.device, recipe),
    )
    started = time.perf_counter()
    splits = recipe.load(request.data_dir)
    torch.manual_seed(request.seed)
    fitted = recipe.fit(splits, settings)
    fitted.net.cpu().eval()
    seconds = time.perf_counter() - started

    serving = ServingNet(fitted.net, recipe.task).eval()
    contents = export(serving, recipe.input.shape)
    draft = build_manifest(recipe, number, splits, contents, serving)
    predictors = open_predictors(draft, contents)
    differences = check_parity(serving, predictors, request.seed)
    metrics = evaluate(predictors, splits.test) | recipe.figures(fitted, splits)
    training = Training(
        recipe=recipe.name,
        seed=request.seed,
        epochs=len(fitted.history),
        data=splits.digests(),
        libraries=list_libraries(),
        git_commit=find_commit(),
        seconds=round(seconds, 1),
        parity_difference=differences,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    manifest = Manifest.model_validate(draft.model_dump() | {"metrics": metrics, "training": training.model_dump()})
    with staging(request.models_dir, recipe.name, number) as folder:
        for name, content in contents.items():
            (folder / ARTIFACT_FILES[name]).write_bytes(content)
        for file, draw in recipe.plots.items():
            draw(folder / file, fitted, splits, predictors["onnx"])
        write_manifest(folder, manifest)
        check_as_served(folder)
        return publish(folder, request.models_dir)


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
        raise DeviceError(f"device {wanted!r} cannot be used here") from error
    return device


def build_manifest(
    recipe: Recipe, number: int, splits: Splits, contents: dict[BackendName, bytes], serving: ServingNet
) -> Manifest:
    """Return the manifest of a version as far as it is known before its figures."""
    return Manifest(
        name=recipe.name,
        version=number,
        title=recipe.title,
        description=recipe.description,
        task=recipe.task,
        input=add_ranges(recipe.input, splits.train),
        output=recipe.output,
        artifacts={
            name: Artifact(file=ARTIFACT_FILES[name], sha256=digest(content), bytes=len(content))
            for name, content in contents.items()
        },
        golden=choose_golden(splits.test, serving),
    )


def add_ranges(described: Input, train: Split) -> Input:
    """Return a tabular input whose features have the range of the training data, rounded outward to whole numbers."""
    if not isinstance(described, TabularInput):
        return described
    low, high = train.inputs.min(dim=0).values.floor(), train.inputs.max(dim=0).values.ceil()
    features = tuple(
        Feature(**feature.model_dump(exclude={"minimum", "maximum"}), minimum=low[i].item(), maximum=high[i].item())
        for i, feature in enumerate(described.features)
    )
    return described.model_copy(update={"features": features})


def choose_golden(split: Split, serving: ServingNet) -> Golden:
    """Return a few instances, evenly spread over a split, with the eager net's outputs."""
    chosen = torch.linspace(0, len(split) - 1, min(GOLDEN_SAMPLES, len(split))).long()
    inputs: Array = as_floats(split.inputs[chosen]).numpy()
    return Golden(inputs=_rows(inputs), outputs=_rows(run_net(serving, inputs)))


def _rows(array: Array) -> tuple[tuple[float, ...], ...]:
    """Return rows as Python numbers with no more digits than float32 has; read back as float32 they are the same."""
    return tuple(tuple(float(np.format_float_scientific(number)) for number in row) for row in array)


def check_as_served(folder: Path) -> None:
    """Load a staged version as the service will: manifest, digests, golden samples, on both backends.

    Raises:
        CheckError: the service would refuse it.
    """
    try:
        for name in ARTIFACT_FILES:
            load_predictor(folder, backend=name, device="cpu", threads=torch.get_num_threads())
    except ModelRefusedError as error:
        raise CheckError(f"the service would refuse the version: {error}") from error


def list_libraries() -> dict[str, str]:
    """Return the installed version of each library that shapes the result."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def find_commit() -> str | None:
    """Return the git commit that holds this code as it runs; None outside a repository, or where a file differs."""
    root = Path(__file__).parents[1]
    changed = _git(root, "status", "--porcelain", "--", "training", "service")
    return _git(root, "rev-parse", "--verify", "--quiet", "HEAD") or None if changed == "" else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what a git command prints, or None where it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
