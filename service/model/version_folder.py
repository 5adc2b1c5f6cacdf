"""Read a version folder, `models/<name>/<version>`: its manifest, and its artifacts verified by digest."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.errors import ModelRefusedError, describe_invalid
from service.model.manifest import AnyManifest, Artifact, Manifest, TensorManifest, digest

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 2**20


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
    """Read and validate the manifest of a version folder, `<name>/<version>`.

    Args:
        folder: The version folder.
        sha256: The digest that the file must have, if it has been signed.

    Raises:
        ModelRefusedError: The manifest is missing, too large, malformed, has a newer schema version, or was replaced.
    """
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ModelRefusedError(f"{MANIFEST_FILE} is larger than {MAX_MANIFEST_BYTES} bytes")
        content = path.read_bytes()
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
        return (Manifest if has_task else TensorManifest).model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise ModelRefusedError(f"{MANIFEST_FILE}: {describe_invalid(error)}") from error


def load_artifact(folder: Path, artifact: Artifact) -> bytes:
    """Read an artifact and verify its size and digest against the manifest.

    Raises:
        ModelRefusedError: The file is missing, outside the folder, or has the wrong size or digest.
    """
    path = folder / artifact.file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelRefusedError(f"{artifact.file} is a link that leads out of its folder")
    try:
        size = path.stat().st_size
        if size != artifact.bytes:
            raise ModelRefusedError(f"{artifact.file} has {size} bytes, the manifest says {artifact.bytes}")
        content = path.read_bytes()
    except OSError as error:
        raise ModelRefusedError(f"{artifact.file} cannot be read: {error.strerror}") from error
    found = digest(content)
    if found != artifact.sha256:
        raise ModelRefusedError(f"{artifact.file} has sha256 {found[:12]}…, the manifest says {artifact.sha256[:12]}…")
    return content
