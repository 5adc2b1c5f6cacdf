"""The models folder on disk: which versions it holds, each model's settings, and whether anything has changed.

Two layouts are read: `<name>/<version>/manifest.json`, and KServe's `/mnt/models`, which holds the files of one version
directly. A version counts once it has a manifest, which publishing writes last. Nothing here opens a graph.
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

from service.errors import InvalidRequestError, ModelRefusedError, describe_invalid
from service.model.version_folder import MANIFEST_FILE, MAX_MANIFEST_BYTES, load_any_manifest, read_file
from service.settings import Placement

logger = logging.getLogger("service")

SETTINGS_FILE = "settings.json"
_GRAPH_SUFFIXES = (".onnx", ".pt", ".pth")
_DEPTH = 2  # folders between the models folder and a file of a version
FileStamp = tuple[str, int, int]  # path or name, size in bytes, time of change in ns
Fingerprint = tuple[FileStamp, ...]
Scan = frozenset[FileStamp]
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$", max_length=64)]  # never a number


class VersionFolder(NamedTuple):
    """The folder of one version. `serve_as` is the name that replaces its manifest's in KServe's layout."""

    name: str
    version: int
    path: Path
    fingerprint: Fingerprint
    serve_as: str | None = None


class ModelSettings(BaseModel):
    """`models/<name>/settings.json`: which versions are served, which is the latest, labels, and where they run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: tuple[int, ...] | None = Field(default=None, description="versions to serve; all when absent")
    latest: int | None = Field(default=None, description="version of paths without one; the newest when absent")
    labels: dict[Label, int] = Field(default_factory=dict, description='such as {"stable": 1, "canary": 2}')
    placement: Placement | None = Field(default=None, description="where it runs; as `--placement` says when absent")

    def includes(self, version: int) -> bool:
        """Tell whether a version is to be served."""
        return self.versions is None or version in self.versions


def scan(root: Path) -> Scan:
    """Return path, size and time of change of every file that decides what is served; two equal scans mean no change.

    Only directories are read, since this runs every second or so. Names that begin with a dot are skipped.

    Raises:
        OSError: the models folder cannot be read.
    """
    found: set[FileStamp] = set()
    _scan_folder(os.fspath(root), _DEPTH, found)
    return frozenset(found)


def hash_scan(found: Scan) -> str:
    """Return a digest that is the same for equal scans, in every process."""
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def _scan_folder(folder: str, depth: int, found: set[FileStamp]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            with contextlib.suppress(OSError):  # it is being removed
                if not entry.is_dir():
                    status = entry.stat()
                    found.add((entry.path, status.st_size, status.st_mtime_ns))
                elif depth:
                    _scan_folder(entry.path, depth - 1, found)


def list_versions(root: Path, model_name: str = "", served: tuple[str, int] | None = None) -> list[VersionFolder]:
    """Return every version folder that has a manifest, by name and then version.

    Args:
        root: the models folder.
        model_name: name to serve the model as where `root` holds one version directly; its manifest's when empty.
        served: name and version under which that version is served already, used while its manifest cannot be read.
    """
    if (root / MANIFEST_FILE).is_file():
        return [_read_single_version(root, model_name, served or (root.name, 1))]
    versions = []
    for folder in (path.parent for path in root.glob(f"*/*/{MANIFEST_FILE}")):
        name = folder.parent.name
        if name.startswith(".") or not _is_version(folder.name):
            continue
        if name.isprintable():
            versions.append(VersionFolder(name, int(folder.name), folder, _read_fingerprint(folder)))
        else:  # no URL could name it
            _warn_once(f"folder {name!a} is not served: a model's name is lower-case letters, digits, - and _")
    return sorted(versions, key=lambda version: (version.name, version.version))


@cache
def _warn_once(warning: str) -> None:
    logger.warning("%s", warning)


def _is_version(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name


def _read_single_version(root: Path, model_name: str, fallback: tuple[str, int]) -> VersionFolder:
    fingerprint = _read_fingerprint(root)
    try:
        manifest = load_any_manifest(root)
    except ModelRefusedError:
        name, version = fallback
    else:
        name, version = manifest.name, manifest.version
    name = model_name or name
    return VersionFolder(name, version, root, fingerprint, serve_as=name)


def _read_fingerprint(folder: Path) -> Fingerprint:
    """Return name, size and time of change of each file: it differs once a file is copied in or replaced."""
    found = []
    try:
        for entry in os.scandir(folder):
            is_broken = entry.is_symlink() and not os.path.exists(entry)
            status = entry.stat(follow_symlinks=not is_broken)
            found.append((entry.name, status.st_size, status.st_mtime_ns))
    except OSError:  # it is being removed
        return ()
    return tuple(sorted(found))


def find_misplaced(root: Path, found: Scan) -> tuple[str, ...]:
    """Return a sentence for each folder with a model that is not served because of its place, and how to correct it.

    Args:
        root: the models folder.
        found: its scan, so that no file is touched again.
    """
    files: dict[Path, set[str]] = {}
    for path in (Path(path) for path, _, _ in found):
        files.setdefault(path.parent, set()).add(path.name)
    if MANIFEST_FILE in files.get(root, ()):  # KServe's layout
        return ()
    versions = {folder for folder in files if folder.parent.parent == root and _is_version(folder.name)}
    models = {folder.parent for folder in versions}  # beside its versions, a model's folder may hold other files
    sentences = (_explain_misplaced(root, folder, files[folder]) for folder in sorted(files.keys() - models))
    return tuple(filter(None, sentences))


def _explain_misplaced(root: Path, folder: Path, names: set[str]) -> str:
    has_manifest, has_graph = MANIFEST_FILE in names, any(name.endswith(_GRAPH_SUFFIXES) for name in names)
    is_below_model = folder.parent.parent == root
    if is_below_model and not _is_version(folder.name):
        wrong = f"{folder} holds a manifest, but its name is no version; rename it to a number, such as"
        return f"{wrong} {folder.parent / '1'}" if has_manifest else ""
    if has_manifest:
        return "" if is_below_model else f"{folder} holds a manifest but no version folder; move it to {folder / '1'}"
    if has_graph:
        return f"{folder} holds a graph but no {MANIFEST_FILE}; `python -m service package` writes one"
    return ""


def load_settings(root: Path, name: str) -> ModelSettings:
    """Return a model's settings, or the defaults if it has no settings file.

    Raises:
        ModelRefusedError: the file is malformed or cannot be read.
    """
    path = root / name / SETTINGS_FILE
    try:
        return ModelSettings.model_validate_json(read_file(path, MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        return ModelSettings()
    except OSError as error:
        raise ModelRefusedError(f"{SETTINGS_FILE} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ModelRefusedError(f"{SETTINGS_FILE}: {describe_invalid(error, SETTINGS_FILE)}") from error


def save_settings(root: Path, name: str, changes: dict[str, Any]) -> None:
    """Change some of a model's settings; the file is replaced as a whole, so no reader sees half of it.

    Raises:
        InvalidRequestError: the file cannot be written.
        ModelRefusedError: the present file is malformed.
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
