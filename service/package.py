"""Write a manifest for a model that this project did not train, prove that it runs, and put it into `models/`."""

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from service.backends import Array, Backend, is_installed, open_backend
from service.errors import InvalidRequestError, ServiceError
from service.manifest import AnyManifest, Artifact, BackendName, Golden, Manifest, SignatureManifest, digest, sentence
from service.predictor import load_any_predictor, worst_excess
from service.version_folder import MANIFEST_FILE

_BACKENDS: dict[str, BackendName] = {".onnx": "onnx", ".pt": "torchscript", ".pth": "torchscript"}
_KINDS = {"regression": "value", "binary": "probability", "multiclass": "probabilities"}
_GOLDEN_ROWS = 3
_SUM_TOLERANCE = 1e-3


def package_model(root: Path, options: dict[str, Any]) -> Path:
    """Return the new version folder, in place and verified.

    Args:
        root: the models folder; made when it does not exist.
        options: the command's flags, see `python -m service package --help`.

    Raises:
        InvalidRequestError: a file or a flag cannot be used.
        ModelRefusedError: the model does not run as described.
    """
    contents = _read_artifacts([Path(path) for path in options["artifacts"]])
    version = options["model_version"] or next_version(root / options["name"])
    manifest: AnyManifest
    if options["task"] == "tensors":
        manifest = _describe_signature(contents, options, version)
    else:
        manifest = _with_golden(_describe(contents, options, version), contents)
    target = root / manifest.name / str(manifest.version)
    if target.exists():
        raise InvalidRequestError(f"{target} exists; choose another --model-version")
    try:
        _write(target, manifest, contents)
    except OSError as error:
        raise InvalidRequestError(f"{target} cannot be written: {error.strerror}") from error
    return target


def _write(target: Path, manifest: AnyManifest, contents: dict[BackendName, bytes]) -> None:
    """Write a version beside its place, load it as the service would, and move it there in one step."""
    root = target.parent.parent
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=root) as staging:
        folder = Path(staging) / manifest.name / str(manifest.version)
        folder.mkdir(parents=True)
        for name, artifact in manifest.artifacts.items():
            (folder / artifact.file).write_bytes(contents[name])
        (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n")
        load_any_predictor(folder)
        target.parent.mkdir(exist_ok=True)
        os.rename(folder, target)


def next_version(folder: Path) -> int:
    """Return one more than the largest version in a model's folder, or 1."""
    numbers = [int(path.name) for path in folder.glob("*") if path.name.isascii() and path.name.isdecimal()]
    return max(numbers, default=0) + 1


def _read_artifacts(paths: list[Path]) -> dict[BackendName, bytes]:
    contents: dict[BackendName, bytes] = {}
    for path in paths:
        name = _BACKENDS.get(path.suffix)
        if name is None:
            raise InvalidRequestError(f"{path} ends in neither .onnx nor .pt")
        if name in contents:
            raise InvalidRequestError(f"{path} is a second {name} artifact; give one file per backend")
        if not is_installed(name):
            raise InvalidRequestError(f"{path} cannot be checked here; install the torch extra: pip install '.[torch]'")
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    return contents


def _describe_signature(contents: dict[BackendName, bytes], options: dict[str, Any], version: int) -> SignatureManifest:
    """Return the manifest of a model without a task: the tensors are what the graph says of itself."""
    from service.backends.onnx_runtime import open_session  # noqa: PLC0415 - each backend is optional
    from service.signature import read_signature  # noqa: PLC0415

    if list(contents) != ["onnx"]:
        raise InvalidRequestError(
            "a model without a task is one ONNX file; a TorchScript file does not name its tensors"
        )
    inputs, outputs = read_signature(open_session(contents["onnx"], "cpu", 1))
    artifact = Artifact(file="model.onnx", sha256=digest(contents["onnx"]), bytes=len(contents["onnx"]))
    try:
        return SignatureManifest(
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
        raise InvalidRequestError(f"the manifest would not be valid: {sentence(error)}") from error


def _describe(contents: dict[BackendName, bytes], options: dict[str, Any], version: int) -> Manifest:
    files: dict[BackendName, str] = {"onnx": "model.onnx", "torchscript": "model.pt"}
    fields = {
        "name": options["name"],
        "version": version,
        "title": options["title"],
        "description": options["description"],
        "task": options["task"],
        "input": _describe_input(options),
        "output": {
            "kind": options["output_kind"] or _KINDS[options["task"]],
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
        raise InvalidRequestError(f"the manifest would not be valid: {sentence(error)}") from error


def _describe_input(options: dict[str, Any]) -> dict[str, Any]:
    if bool(options["features"]) == bool(options["image"]):
        raise InvalidRequestError("give --features for a tabular model or --image for an image model, one of the two")
    if options["features"]:
        names = _split(options["features"])
        features = [{"name": name} for name in names]
        return {"kind": "tabular", "shape": [len(names)], "features": features, "tensor": options["input_tensor"]}
    size = _read_numbers(options["image"], "x", "--image")
    if len(size) not in (2, 3):
        raise InvalidRequestError(f"--image {options['image']} is not WIDTHxHEIGHT or WIDTHxHEIGHTxCHANNELS")
    width, height, channels = [*size, 1][:3]
    shape = [channels, height, width]
    if options["input_shape"]:
        shape = _read_numbers(options["input_shape"], ",", "--input-shape")
    fitting = options["fitting"] or "stretch"
    polarity = options["polarity"] or ("light-on-dark" if fitting == "mnist" else "as-is")
    image = {"width": width, "height": height, "channels": channels, "polarity": polarity, "fitting": fitting}
    return {"kind": "image", "shape": shape, "image": image, "tensor": options["input_tensor"]}


def _read_numbers(text: str, separator: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.lower().split(separator)]
    except ValueError as error:
        raise InvalidRequestError(f"{flag} {text} is not whole numbers separated by {separator}") from error


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def _with_golden(manifest: Manifest, contents: dict[BackendName, bytes]) -> Manifest:
    """Add golden samples: what the first backend gives on random inputs, and the others must agree with."""
    backends = [open_backend(name, content, manifest, "cpu", 1) for name, content in contents.items()]
    shape = (_GOLDEN_ROWS, *manifest.input.shape)
    inputs = np.random.default_rng(0).random(shape, dtype=np.float32)
    outputs = [_run(backend, inputs, manifest.output_width) for backend in backends]
    for backend, other in zip(backends[1:], outputs[1:], strict=True):
        if worst_excess(other, outputs[0]) > 0:
            raise InvalidRequestError(
                f"{backend.name} and {backends[0].name} give different outputs; they are not one model"
            )
    _check_meaning(outputs[0], manifest.output.kind)
    golden = Golden(
        inputs=tuple(tuple(map(float, row)) for row in inputs.reshape(_GOLDEN_ROWS, math.prod(manifest.input.shape))),
        outputs=tuple(tuple(map(float, row)) for row in outputs[0]),
    )
    return manifest.model_copy(update={"golden": golden})


def _run(backend: Backend, inputs: Array, width: int) -> Array:
    try:
        outputs = backend.run(inputs)
    except ServiceError as error:
        raise InvalidRequestError(
            f"the {backend.name} graph does not run on inputs {list(inputs.shape)}: {error}"
        ) from error
    if outputs.shape != (len(inputs), width):
        shown = list(outputs.shape)
        raise InvalidRequestError(
            f"the {backend.name} graph gives {shown} where task and labels say {[len(inputs), width]}"
        )
    if not np.isfinite(outputs).all():
        raise InvalidRequestError(f"the {backend.name} graph gives numbers that are not finite on inputs in [0, 1]")
    return outputs


def _check_meaning(outputs: Array, kind: str) -> None:
    """Refuse outputs that cannot be what `--output-kind` says."""
    if kind in ("probability", "probabilities") and not ((outputs >= 0) & (outputs <= 1)).all():
        worst = outputs[(outputs < 0) | (outputs > 1)][0]
        raise InvalidRequestError(
            f"the graph gives {worst:g}, not a probability; are its outputs --output-kind logits?"
        )
    if kind == "probabilities" and np.abs(outputs.sum(axis=1) - 1).max() > _SUM_TOLERANCE:
        raise InvalidRequestError(f"the graph gives probabilities that sum to {outputs.sum(axis=1)[0]:g}, not to 1")
