"""Build a manifest from the flags of `python -m service package`."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.errors import InvalidRequestError, describe_invalid
from service.model.manifest import Artifact, BackendName, ColumnsInput, Manifest, TensorManifest, digest
from service.packaging.samples import Samples, read_samples
from service.packaging.understand import Understood, read_picture

_KINDS = {
    "regression": "value", "binary": "probability", "multiclass": "probabilities", "multilabel": "probabilities",
}  # fmt: skip
_FOR_IMAGES = ("input_shape", "polarity", "fitting")
_FOR_TASKS = (
    "features", "samples", "image", *_FOR_IMAGES, "labels", "threshold", "output_kind", "input_tensor", "output_tensor",
    "values", "mean", "std",
)  # fmt: skip


def describe_tensors(contents: dict[BackendName, bytes], options: dict[str, Any], version: int) -> TensorManifest:
    """Build the manifest of a model without a task, reading its tensors from the graph."""
    from service.model.backends.onnx_runtime import open_session  # noqa: PLC0415 - each backend is optional
    from service.model.tensor_model import read_tensor_specs  # noqa: PLC0415

    if given := _name_flags(options, _FOR_TASKS):
        raise InvalidRequestError(f"a model without a task is described by its graph alone; leave out {given}")
    if list(contents) != ["onnx"]:
        raise InvalidRequestError(
            "a model without a task is one ONNX file; a TorchScript file does not name its tensors"
        )
    inputs, outputs = read_tensor_specs(open_session(contents["onnx"], "cpu", 1))
    artifact = Artifact(file="model.onnx", sha256=digest(contents["onnx"]), bytes=len(contents["onnx"]))
    try:
        return TensorManifest(
            name=options["name"],
            version=version,
            title=options["title"],
            description=options["description"],
            task="tensors",
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            artifacts={"onnx": artifact},
        )
    except ValidationError as error:
        raise InvalidRequestError(f"the manifest would not be valid: {describe_invalid(error)}") from error


def read_flagged_samples(options: dict[str, Any]) -> Samples | None:
    """Read the file given by `--samples`, if any, with columns in the order of `--features`."""
    return read_samples(Path(options["samples"]), _split(options["features"])) if options["samples"] else None


def describe(contents: dict[BackendName, bytes], found: Understood, version: int, samples: Samples | None) -> Manifest:
    """Build the manifest of a model with a task, without golden samples."""
    options = found.options
    if options["task"] is None:
        raise InvalidRequestError(
            "give --task, and --features or --image; a PyTorch file does not say what it takes and predicts"
        )
    files: dict[BackendName, str] = {"onnx": "model.onnx", "torchscript": "model.pt", "torch-export": "model.pt2"}
    fields = {
        "name": options["name"],
        "version": version,
        "title": options["title"],
        "description": options["description"],
        "task": options["task"],
        "input": _describe_input(found, samples),
        "output": found.output
        or {
            "kind": options["output_kind"] or _KINDS.get(options["task"], "value"),
            "labels": _split(options["labels"]),
            "threshold": options["threshold"],
            "tensor": options["output_tensor"],
        },
        "artifacts": {
            name: Artifact(file=files[name], sha256=digest(content), bytes=len(content))
            for name, content in contents.items()
        },
    }
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequestError(f"the manifest would not be valid: {describe_invalid(error)}") from error


def _describe_input(found: Understood, samples: Samples | None) -> dict[str, Any] | ColumnsInput:
    if found.columns is not None:
        return found.columns
    return _describe_image(found.options) if found.options["image"] else _describe_columns(found.options, samples)


def _describe_columns(options: dict[str, Any], samples: Samples | None) -> dict[str, Any]:
    names = samples.names if samples else tuple(_split(options["features"]))
    if not names:
        raise InvalidRequestError(
            "give --features or --samples with a header for a tabular model, or --image for an image model"
        )
    if given := _name_flags(options, _FOR_IMAGES):
        raise InvalidRequestError(f"{given} describes an image model, which has --image and no features")
    features: list[dict[str, Any]] = [{"name": name} for name in names]
    if samples is not None:
        for feature, low, high in zip(features, samples.rows.min(axis=0), samples.rows.max(axis=0), strict=True):
            if low < high:
                feature |= {"minimum": float(low), "maximum": float(high)}
    return {"kind": "tabular", "shape": [len(names)], "features": features, "tensor": options["input_tensor"]}


def _describe_image(options: dict[str, Any]) -> dict[str, Any]:
    (width, height, channels), shape = read_picture(options)
    fitting = options["fitting"] or "stretch"
    polarity = options["polarity"] or ("light-on-dark" if fitting == "mnist" else "as-is")
    image = {"width": width, "height": height, "channels": channels, "polarity": polarity, "fitting": fitting}
    return {"kind": "image", "shape": shape, "image": image, "tensor": options["input_tensor"]}


def _split(given: str | list[str] | None) -> list[str]:
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given or [])


def _name_flags(options: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the given flags among `names`, comma-separated."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if options[name] is not None)
