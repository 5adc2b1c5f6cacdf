"""Publish: a version appears in `models/` complete, or not at all.

Everything is written into a hidden folder, `models/.staging-…/<name>/<version>/`, the manifest last; each file is
flushed to disk; then one rename moves it into place. A run interrupted at any moment leaves `models/` unchanged, at
worst with a hidden folder that a later run removes.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.model.golden import write_golden
from service.model.manifest import Manifest, drop_empty
from service.model.version_folder import MANIFEST_FILE
from training.errors import PublishError

_STAGING = ".staging-"
_ABANDONED_AFTER = 3600  # seconds; a staging folder is normally used for a few


def choose_version(models_dir: Path, name: str, wanted: int | None) -> int:
    """Return the version to publish: `wanted`, or the one after the highest.

    Raises:
        PublishError: the wanted version exists.
    """
    if wanted is None:
        newest = find_newest(models_dir, name)
        return 1 if newest is None else int(newest.name) + 1
    if (models_dir / name / str(wanted)).exists():
        raise PublishError(f"{models_dir / name / str(wanted)} exists; versions are never overwritten, choose another")
    return wanted


def find_newest(models_dir: Path, name: str) -> Path | None:
    """Return the folder of a model's highest version, if it has one."""
    folders = [folder for folder in (models_dir / name).glob("[1-9]*") if folder.name.isdecimal()]
    return max(folders, key=lambda folder: int(folder.name), default=None)


@contextmanager
def staging(models_dir: Path, name: str, version: int) -> Iterator[Path]:
    """Yield an empty hidden folder `…/<name>/<version>` to write a version into, and remove it on exit.

    Raises:
        PublishError: the folder cannot be created or written.
    """
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(models_dir)
        root = Path(tempfile.mkdtemp(prefix=_STAGING, dir=models_dir))
    except OSError as error:
        raise PublishError(f"cannot write {models_dir}: {error.strerror}") from error
    try:
        folder = root / name / str(version)
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise PublishError(f"cannot write {models_dir}: {error.strerror}") from error
    finally:
        shutil.rmtree(root, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, and its golden samples if it has any, into a version folder; a row of numbers on one line."""
    if manifest.golden_rows is not None:
        manifest = write_golden(folder, manifest, manifest.golden_rows)
    fields = drop_empty(manifest.model_dump(mode="json"))
    text = re.sub(r"\[[-+.,\deE\s]+\]", lambda row: " ".join(row[0].split()), json.dumps(fields, indent=2))
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def publish(folder: Path, models_dir: Path) -> Path:
    """Move a complete version from its staging folder into place and return its path.

    Raises:
        PublishError: it has no manifest, or the version has appeared meanwhile.
    """
    if not (folder / MANIFEST_FILE).is_file():
        raise PublishError(f"{folder.parent.name}/{folder.name} has no manifest")
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)
        _flush(path)
    _flush(folder)
    _flush(folder.parent)
    model = models_dir / folder.parent.name
    target = model / folder.name
    try:
        # A new model is moved with its folder: two steps could be interrupted in between.
        if model.exists():
            folder.rename(target)
        else:
            folder.parent.rename(model)
    except OSError as error:
        raise PublishError(f"cannot create {target}: {error.strerror}") from error
    _flush(model)
    _flush(models_dir)
    return target


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(models_dir: Path) -> None:
    for folder in models_dir.glob(f"{_STAGING}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(folder, ignore_errors=True)
