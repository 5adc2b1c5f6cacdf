"""The models folder on disk: which versions stand in it, and when one has changed. It opens no graph.

Two layouts: `<name>/<version>/manifest.json`, and KServe's `/mnt/models`, which holds one version's files directly. A
folder counts once it has a manifest, which is written last.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from service.errors import InvalidRequestError, ModelRefusedError
from service.model.manifest import sentence
from service.model.version_folder import MANIFEST_FILE, load_any_manifest

logger = logging.getLogger("service")

SETTINGS_FILE = "settings.json"
_GRAPHS = (".onnx", ".pt", ".pth")
_DEPTH = 2  # folders between the models folder and a file of a version
Fingerprint = tuple[tuple[str, int, int], ...]
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$", max_length=64)]  # never a number


class Slot(NamedTuple):
    """One version folder: the model and version it is served as, where it stands, and how its files look."""

    name: str
    version: int
    folder: Path
    fingerprint: Fingerprint


class ModelSettings(BaseModel):
    """`models/<name>/settings.json`: which versions are served, which one is the latest, and names for versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: tuple[int, ...] | None = Field(default=None, description="versions to serve; all when absent")
    latest: int | None = Field(default=None, description="version of paths without one; the newest when absent")
    labels: dict[Label, int] = Field(default_factory=dict, description='such as {"stable": 1, "canary": 2}')


def look(root: Path) -> frozenset[tuple[str, int, int]]:
    """Return path, size and time of change (ns) of every file that decides what is served: two looks compare.

    It reads directories only, for it is done all the time. Names that begin with a dot are nothing yet.

    Raises:
        OSError: the models folder is not there.
    """
    found: set[tuple[str, int, int]] = set()
    _look_into(os.fspath(root), _DEPTH, found)
    return frozenset(found)


def digest(seen: frozenset[tuple[str, int, int]]) -> str:
    """Return a short text that is equal for equal looks, in every process."""
    return hashlib.sha256(repr(sorted(seen)).encode()).hexdigest()


def _look_into(folder: str, depth: int, found: set[tuple[str, int, int]]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            with contextlib.suppress(OSError):  # it is being removed
                if not entry.is_dir():
                    status = entry.stat()
                    found.add((entry.path, status.st_size, status.st_mtime_ns))
                elif depth:
                    _look_into(entry.path, depth - 1, found)


def list_slots(root: Path, model_name: str = "", served: tuple[str, int] | None = None) -> list[Slot]:
    """Return every version folder that has a manifest, by name and then version.

    Args:
        root: the models folder.
        model_name: where the folder holds one version directly, the name it is served as; else its manifest's.
        served: name and version to give that version while its manifest cannot be read, which is what it was before.
    """
    if (root / MANIFEST_FILE).is_file():
        return [_read_single(root, model_name, served or (root.name, 1))]
    slots = []
    for folder in (path.parent for path in root.glob(f"*/*/{MANIFEST_FILE}")):
        name, version = folder.parent.name, folder.name
        if not name.startswith(".") and version.isascii() and version.isdigit() and str(int(version)) == version:
            if name.isprintable():
                slots.append(Slot(name, int(version), folder, _fingerprint(folder)))
            else:  # such as bytes that are no text, which no answer could name
                _warn_once(f"folder {name!a} is not served: a model's name is lower-case letters, digits, - and _")
    return sorted(slots, key=lambda slot: (slot.name, slot.version))


@cache
def _warn_once(sentence: str) -> None:
    logger.warning("%s", sentence)


def _read_single(root: Path, model_name: str, otherwise: tuple[str, int]) -> Slot:
    fingerprint = _fingerprint(root)
    try:
        manifest = load_any_manifest(root)
    except ModelRefusedError:
        name, version = otherwise
    else:
        name, version = manifest.name, manifest.version
    return Slot(model_name or name, version, root, fingerprint)


def _fingerprint(folder: Path) -> Fingerprint:
    """Return name, size and time of change (ns) of each file: what changes when a file is copied in or replaced."""
    found = []
    try:
        for entry in os.scandir(folder):
            status = entry.stat()
            found.append((entry.name, status.st_size, status.st_mtime_ns))
    except OSError:  # it is being removed
        return ()
    return tuple(sorted(found))


def find_strays(root: Path, seen: frozenset[tuple[str, int, int]]) -> list[str]:
    """Return a sentence for each folder that holds a model where none is looked for: what is wrong, and what to do.

    Args:
        root: the models folder.
        seen: what `look` returned of it, so that no file is touched again.
    """
    files: dict[Path, set[str]] = {}
    for path in (Path(path) for path, _, _ in seen):
        files.setdefault(path.parent, set()).add(path.name)
    if MANIFEST_FILE in files.get(root, ()):  # it holds one version directly
        return []
    versions = {folder for folder in files if folder.parent.parent == root and _is_version(folder.name)}
    others = files.keys() - {
        folder.parent for folder in versions
    }  # beside its versions, a model's folder may hold more
    return [found for folder in sorted(others) if (found := _explain_stray(root, folder, files[folder]))]


def _explain_stray(root: Path, folder: Path, names: set[str]) -> str:
    has_manifest, has_graph = MANIFEST_FILE in names, any(name.endswith(_GRAPHS) for name in names)
    if folder.parent.parent == root and not _is_version(folder.name):
        wrong = f"{folder} holds a manifest, but its name is no version; rename it to a number, such as"
        return f"{wrong} {folder.parent / '1'}" if has_manifest else ""
    if has_manifest:
        is_version = folder.parent.parent == root
        return "" if is_version else f"{folder} holds a manifest but no version folder; move it to {folder / '1'}"
    if has_graph:
        return f"{folder} holds a graph but no {MANIFEST_FILE}; `python -m service package` writes one"
    return ""


def _is_version(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name


def load_settings(root: Path, name: str) -> ModelSettings:
    """Return a model's settings; those of a file that is not there are the defaults.

    Raises:
        ModelRefusedError: the file is malformed.
    """
    path = root / name / SETTINGS_FILE
    try:
        return ModelSettings.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return ModelSettings()
    except OSError as error:
        raise ModelRefusedError(f"{SETTINGS_FILE} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ModelRefusedError(f"{SETTINGS_FILE}: {sentence(error, SETTINGS_FILE)}") from error


def save_settings(root: Path, name: str, changes: dict[str, Any]) -> None:
    """Change a model's settings in one step, so that no reader sees half of a file.

    Raises:
        InvalidRequestError: the folder cannot be written.
    """
    settings = load_settings(root, name).model_copy(update=changes)
    target = root / name / SETTINGS_FILE
    try:
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=".settings-", delete=False) as file:
            file.write(settings.model_dump_json(indent=2, exclude_none=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
    except OSError as error:
        raise InvalidRequestError(f"{target} cannot be written: {error.strerror}") from error
