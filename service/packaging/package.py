"""Write a manifest for a model trained elsewhere, check that the model runs, and add it to the models folder."""

import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from service.errors import InvalidRequestError
from service.model.backends import is_installed
from service.model.golden import write_golden
from service.model.manifest import AnyManifest, BackendName, Manifest
from service.model.predictor import load_any_predictor
from service.model.version_folder import MANIFEST_FILE
from service.packaging.convert import check_file, convert, is_convertible
from service.packaging.description import describe, describe_tensors, read_flagged_samples
from service.packaging.graph import free_batch, normalize, strip_zipmap
from service.packaging.proof import add_golden, add_golden_rows, check_parity
from service.packaging.understand import Understood, understand

_BACKENDS: dict[str, BackendName] = {
    ".onnx": "onnx",
    ".pt": "torchscript",
    ".pth": "torchscript",
    ".pt2": "torch-export",
}
_KNOWN = ".onnx, .pt, .pt2, .pkl, .joblib, .json, .ubj or .txt"


def package_model(root: Path, options: dict[str, Any]) -> Path:
    """Verify a model, write its version folder, and return the folder's path.

    Args:
        root: The models folder, created if missing.
        options: The command's flags; see `python -m service package --help`.

    Raises:
        InvalidRequestError: A file or flag cannot be used.
        ModelRefusedError: The model does not run as described.
    """
    paths = [Path(path) for path in options["artifacts"]]
    options = options | {"labels": _read_labels(options["labels"]), "name": options["name"] or choose_name(paths[0])}
    converted = convert(paths[0], options) if len(paths) == 1 and is_convertible(paths[0]) else None
    contents: dict[BackendName, bytes] = {"onnx": converted.content} if converted else _read_artifacts(paths)
    if converted is not None:
        options |= {flag: value for flag, value in converted.flags.items() if options[flag] is None}
        options["column_types"] = converted.types
    batch = 0
    if "onnx" in contents:
        contents["onnx"], batch = free_batch(_adapt(contents["onnx"], options))
    found = understand(contents["onnx"], options) if "onnx" in contents else Understood(options)
    version = options["model_version"] or next_version(root / options["name"])
    manifest: AnyManifest
    if converted and not batch and found.columns is None and found.options["task"] not in ("outputs", "tensors"):
        contents |= converted.beside
    if found.options["task"] == "tensors":
        manifest = describe_tensors(contents, found.options, version)
    else:
        manifest = _describe_and_prove(contents, found, version, kind_given=options["output_kind"] is not None)
        if converted is not None:
            samples = read_flagged_samples(found.options) if found.columns is None else None
            check_parity(manifest, contents["onnx"], converted, samples.rows if samples else found.exact)
    if batch:
        found.lines.append(("batch", f"any size; the export had fixed it at {batch}", ""))
    print_lines(manifest.name, found.lines)
    target = root / manifest.name / str(manifest.version)
    if target.exists():
        raise InvalidRequestError(f"{target} exists; choose another --model-version")
    try:
        _write(target, manifest, contents)
    except OSError as error:
        raise InvalidRequestError(f"{target} cannot be written: {error.strerror}") from error
    return target


def _describe_and_prove(
    contents: dict[BackendName, bytes], found: Understood, version: int, kind_given: bool
) -> Manifest:
    samples = read_flagged_samples(found.options) if found.columns is None else None
    described = describe(contents, found, version, samples)
    if described.has_rows:
        return add_golden_rows(described, contents, found.rows)
    return add_golden(described, contents, samples, kind_given)


def _adapt(content: bytes, options: dict[str, Any]) -> bytes:
    """Return the graph as it is served: without ZipMap, and with normalisation by `--mean` and `--std`."""
    content = strip_zipmap(content)
    if options["mean"] is None and options["std"] is None:
        return content
    try:
        mean, std = (
            [float(part) for part in (options[flag] or default).split(",")]
            for flag, default in (("mean", "0"), ("std", "1"))
        )
    except ValueError as error:
        raise InvalidRequestError(f"--mean and --std are numbers separated by commas: {error}") from error
    return normalize(content, mean, std)


def _read_labels(given: str | None) -> list[str] | None:
    """Return the labels, which `@FILE` has one a line."""
    if given is None or not given.startswith("@"):
        return [part.strip() for part in given.split(",")] if given else None
    try:
        lines = Path(given[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"--labels {given} cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def choose_name(path: Path) -> str:
    """Return a model's name from the name of its file."""
    name = re.sub(r"[^a-z0-9_-]+", "-", path.stem.lower()).strip("-_")[:64]
    return name or "model"


def print_lines(name: str, lines: list[tuple[str, str, str]]) -> None:
    """Print what was understood, and how to correct it, as a table."""
    if not lines:
        return
    print(f"{name}, as understood from the graph (correct a line by the flag at its end):")
    widths = [max(len(line[index]) for line in lines) for index in (0, 1)]
    for what, understood, flag in lines:
        print(f"  {what.ljust(widths[0])}  {understood.ljust(widths[1])}  {flag}")


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
        check_file(path)
        name = _BACKENDS.get(path.suffix)
        if name is None:
            raise InvalidRequestError(f"{path} is not a model that can be packaged; its name must end in {_KNOWN}")
        if name in contents:
            raise InvalidRequestError(f"{path} is a second {name} artifact; give one file per backend")
        if not is_installed(name):
            raise InvalidRequestError(f"{path} cannot be checked here; install the torch extra: pip install '.[torch]'")
        if name == "torchscript" and not _is_torchscript(path):
            raise InvalidRequestError(
                f"{path} has weights or a pickled module, as torch.save writes them, and no graph; export the module"
                " with torch.onnx.export or torch.jit.script"
            )
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    return contents


def _is_torchscript(path: Path) -> bool:
    """Tell TorchScript, a ZIP archive with code, from what `torch.save` writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
