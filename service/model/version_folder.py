"""Read a version folder, `models/<name>/<version>`: its manifest, and its artifacts verified by digest."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.errors import ModelRefusedError, describe_invalid
from service.model.golden import golden_artifact, parse_golden
from service.model.manifest import AnyManifest, Artifact, Manifest, TensorManifest, digest

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 2**20
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_file(path: Path, most: int) -> bytes:
    """Read a regular file, or a link to one, of at most `most` bytes.

    Raises:
        ModelRefusedError: It is larger, or something else than a file, which might never end or never begin.
        OSError: It cannot be read.
    """
    _check_kind(path.stat(), path.name)  # opening a device may already do something
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _check_kind(os.fstat(file.fileno()), path.name)
        content = file.read(most + 1)
    if len(content) > most:
        raise ModelRefusedError(f"{path.name} is larger than {most} bytes")
    return content


def _check_kind(status: os.stat_result, name: str) -> None:
    for is_kind, kind in _KINDS:
        if is_kind(status.st_mode):
            raise ModelRefusedError(f"{name} is {kind}, not a file")


def load_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of a model with a task. See `load_any_manifest`.

    Raises:
        ModelRefusedError: The manifest cannot be used, or the model has no task.
    """
    manifest = load_any_manifest(folder)
    if not isinstance(manifest, Manifest):
        raise ModelRefusedError(
            f"{manifest.name} has no task, only tensors; it is served at /v2/models/{manifest.name}/infer"
        )
    return manifest


def load_any_manifest(folder: Path, sha256: str = "") -> AnyManifest:
    """Read and validate the manifest of a version folder, `<name>/<version>`, with its golden samples.

    Args:
        folder: The version folder.
        sha256: The digest that the file must have, if it has been signed.

    Raises:
        ModelRefusedError: The manifest is missing, too large, malformed, has a newer schema version, or was replaced,
            or its golden samples are not as it says.
    """
    path = folder / MANIFEST_FILE
    try:
        content = read_file(path, MAX_MANIFEST_BYTES)
        if sha256 and digest(content) != sha256:
            raise ModelRefusedError(f"{MANIFEST_FILE} was replaced after its signature was checked")
        fields: Any = json.loads(content)
    except OSError as error:
        raise ModelRefusedError(f"{MANIFEST_FILE} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelRefusedError(f"{MANIFEST_FILE} is not JSON: {error}") from error
    declared = fields.get("schema_version", SCHEMA_VERSION) if isinstance(fields, dict) else SCHEMA_VERSION
    if isinstance(declared, int) and declared > SCHEMA_VERSION:
        raise ModelRefusedError(
            f"{MANIFEST_FILE} has schema_version {declared}; this service reads up to {SCHEMA_VERSION}"
        )
    try:
        has_task = not (isinstance(fields, dict) and fields.get("task") == "tensors")
        manifest = (Manifest if has_task else TensorManifest).model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise ModelRefusedError(f"{MANIFEST_FILE}: {describe_invalid(error)}") from error
    if isinstance(manifest, Manifest) and manifest.golden is not None and manifest.golden.file is not None:
        content = load_artifact(folder, golden_artifact(manifest.golden))
        return manifest.with_golden_rows(manifest.golden, parse_golden(content, manifest))
    return manifest


def load_artifact(folder: Path, artifact: Artifact) -> bytes:
    """Read an artifact and verify its size and digest against the manifest.

    Raises:
        ModelRefusedError: It is no file, missing, outside the folder, or has the wrong size or digest.
    """
    path = folder / artifact.file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelRefusedError(f"{artifact.file} is a link that leads out of its folder")
    try:
        status = path.stat()
        _check_kind(status, artifact.file)
        if status.st_size != artifact.bytes:
            raise ModelRefusedError(f"{artifact.file} has {status.st_size} bytes, the manifest says {artifact.bytes}")
        content = read_file(path, artifact.bytes)
    except OSError as error:
        raise ModelRefusedError(f"{artifact.file} cannot be read: {error.strerror}") from error
    found = digest(content)
    if found != artifact.sha256:
        raise ModelRefusedError(f"{artifact.file} has sha256 {found[:12]}…, the manifest says {artifact.sha256[:12]}…")
    return content
