"""Write a manifest for a model trained elsewhere, check that the model runs, and add it to the models folder."""

import os
import tempfile
from pathlib import Path
from typing import Any

from service.errors import InvalidRequestError
from service.model.backends import is_installed
from service.model.golden import write_golden
from service.model.manifest import AnyManifest, BackendName, Manifest
from service.model.predictor import load_any_predictor
from service.model.version_folder import MANIFEST_FILE
from service.packaging.description import describe, describe_tensors, read_flagged_samples
from service.packaging.proof import add_golden

_BACKENDS: dict[str, BackendName] = {".onnx": "onnx", ".pt": "torchscript", ".pth": "torchscript"}


def package_model(root: Path, options: dict[str, Any]) -> Path:
    """Verify a model, write its version folder, and return the folder's path.

    Args:
        root: The models folder, created if missing.
        options: The command's flags; see `python -m service package --help`.

    Raises:
        InvalidRequestError: A file or flag cannot be used.
        ModelRefusedError: The model does not run as described.
    """
    contents = _read_artifacts([Path(path) for path in options["artifacts"]])
    version = options["model_version"] or next_version(root / options["name"])
    manifest: AnyManifest
    if options["task"] == "tensors":
        manifest = describe_tensors(contents, options, version)
    else:
        samples = read_flagged_samples(options)
        described = describe(contents, options, version, samples)
        manifest = add_golden(described, contents, samples, kind_given=options["output_kind"] is not None)
    target = root / manifest.name / str(manifest.version)
    if target.exists():
        raise InvalidRequestError(f"{target} exists; choose another --model-version")
    try:
        _write(target, manifest, contents)
    except OSError as error:
        raise InvalidRequestError(f"{target} cannot be written: {error.strerror}") from error
    return target


def _write(target: Path, manifest: AnyManifest, contents: dict[BackendName, bytes]) -> None:
    """Write a version to a staging folder, load it as the service would, and rename it into place."""
    root = target.parent.parent
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=root) as staging:
        folder = Path(staging) / manifest.name / str(manifest.version)
        folder.mkdir(parents=True)
        for name, artifact in manifest.artifacts.items():
            (folder / artifact.file).write_bytes(contents[name])
        if isinstance(manifest, Manifest) and manifest.golden_rows is not None:
            manifest = write_golden(folder, manifest, manifest.golden_rows)
        (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n")
        load_any_predictor(folder)
        target.parent.mkdir(exist_ok=True)
        os.rename(folder, target)


def next_version(folder: Path) -> int:
    """Return the largest version in a model's folder plus one, or 1 if it has none."""
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
