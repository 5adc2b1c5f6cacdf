"""Build the manifest of a version."""

import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from service.model.backends import Array
from service.model.manifest import (
    Artifact,
    BackendName,
    Feature,
    GoldenRows,
    Input,
    Manifest,
    TabularInput,
    Training,
    digest,
)
from training.data import Split, Splits, as_floats
from training.evaluate import as_rows
from training.export import ARTIFACT_FILES
from training.nets import ServingNet
from training.parity import run_net
from training.recipe import Recipe
from training.seeds import Candidate

GOLDEN_SAMPLES = 4
LIBRARIES = ("torch", "torchvision", "numpy", "scikit-learn", "skl2onnx", "onnx", "onnxscript", "onnxruntime")


def build_manifest(
    recipe: Recipe, number: int, splits: Splits, contents: dict[BackendName, bytes], serving: ServingNet
) -> Manifest:
    """Return the manifest of a version without metrics and training."""
    manifest = Manifest(
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
    )
    return manifest.with_golden_rows(None, choose_golden(splits.test, serving, manifest))


def add_ranges(described: Input, train: Split) -> Input:
    """Return a tabular input with each feature's range in the training data, rounded outward to integers."""
    if not isinstance(described, TabularInput):
        return described
    low, high = train.inputs.min(dim=0).values.floor(), train.inputs.max(dim=0).values.ceil()
    features = tuple(
        Feature(**feature.model_dump(exclude={"minimum", "maximum"}), minimum=low[i].item(), maximum=high[i].item())
        for i, feature in enumerate(described.features)
    )
    return described.model_copy(update={"features": features})


def choose_golden(split: Split, serving: ServingNet, manifest: Manifest) -> GoldenRows:
    """Return a few instances, spread evenly over a split, with the eager net's outputs."""
    chosen = torch.linspace(0, len(split) - 1, min(GOLDEN_SAMPLES, len(split))).long()
    inputs: Array = as_floats(split.inputs[chosen]).numpy()
    return GoldenRows(as_rows(inputs, manifest), run_net(serving, inputs))


def describe_training(
    recipe: Recipe, chosen: Candidate, splits: Splits, differences: dict[BackendName, float]
) -> Training:
    """Return the provenance of the artifacts."""
    return Training(
        recipe=recipe.name,
        seed=chosen.seed,
        epochs=len(chosen.fitted.history),
        data=splits.digests(),
        libraries=list_libraries(),
        git_commit=find_commit(),
        seconds=round(chosen.seconds, 1),
        parity_difference=differences,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def list_libraries() -> dict[str, str]:
    """Return the installed version of each library that affects the result."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def find_commit() -> str | None:
    """Return the git commit of this code; None outside a repository, or if a file differs from it."""
    root = Path(__file__).parents[1]
    changed = _git(root, "status", "--porcelain", "--", "training", "service")
    return _git(root, "rev-parse", "--verify", "--quiet", "HEAD") or None if changed == "" else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what a git command prints, or None if it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
