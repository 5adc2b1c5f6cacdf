"""A version appears complete or not at all, however and whenever the process ends."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.model.manifest import Artifact, Feature, Manifest, Output, TabularInput, digest
from service.model.version_folder import MANIFEST_FILE, load_manifest
from training import publish as module
from training.errors import PublishError
from training.publish import choose_version, publish, staging, write_manifest

CONTENT = b"graph"


def build_manifest(version: int = 1) -> Manifest:
    """Return a small manifest of the model `line`."""
    return Manifest(
        name="line",
        version=version,
        task="regression",
        input=TabularInput(kind="tabular", shape=(1,), features=(Feature(name="x"),)),
        output=Output(kind="value"),
        artifacts={"onnx": Artifact(file="model.onnx", sha256=digest(CONTENT), bytes=len(CONTENT))},
    )


def publish_line(models_dir: Path, version: int = 1) -> Path:
    """Publish one version of `line`, in the steps that a run takes."""
    with staging(models_dir, "line", version) as folder:
        (folder / "model.onnx").write_bytes(CONTENT)
        write_manifest(folder, build_manifest(version))
        return publish(folder, models_dir)


def list_files(models_dir: Path, hidden: bool = False) -> list[str]:
    """Return the paths under `models_dir`, hidden staging folders only if asked for."""
    paths = [path.relative_to(models_dir) for path in models_dir.rglob("*")]
    return sorted(str(path) for path in paths if hidden or not path.parts[0].startswith("."))


def test_published_version_is_complete(tmp_path: Path) -> None:
    """The folder contains the artifact and an equal manifest, and no staging folder is left."""
    folder = publish_line(tmp_path / "models")
    assert folder == tmp_path / "models" / "line" / "1"
    assert load_manifest(folder) == build_manifest()
    assert list_files(tmp_path / "models", hidden=True) == [
        "line",
        "line/1",
        "line/1/manifest.json",
        "line/1/model.onnx",
    ]


def test_versions_count_up(tmp_path: Path) -> None:
    """The next version follows the highest there is, as a number; other names are ignored."""
    assert choose_version(tmp_path, "line", None) == 1
    for name in ("2", "10", "1x", ".staging-1"):
        (tmp_path / "line" / name).mkdir(parents=True)
    assert choose_version(tmp_path, "line", None) == 11
    assert choose_version(tmp_path, "line", 3) == 3


def test_existing_version_is_refused(tmp_path: Path) -> None:
    """A version is never overwritten: not when it exists at the start, and not when it appears meanwhile."""
    publish_line(tmp_path)
    with pytest.raises(PublishError, match="exists"):
        choose_version(tmp_path, "line", 1)
    before = list_files(tmp_path, hidden=True)
    with pytest.raises(PublishError, match="cannot create"):
        publish_line(tmp_path)
    assert list_files(tmp_path, hidden=True) == before


def test_no_manifest_no_version(tmp_path: Path) -> None:
    """A folder without a manifest is not published."""
    with pytest.raises(PublishError, match="no manifest"), staging(tmp_path, "line", 1) as folder:
        publish(folder, tmp_path)
    assert list_files(tmp_path, hidden=True) == []


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A models folder that is a file is refused with a clear error."""
    (tmp_path / "models").write_text("")
    with pytest.raises(PublishError, match="cannot write"):
        publish_line(tmp_path / "models")


def test_full_disk(tmp_path: Path) -> None:
    """A failed write raises a clear error and leaves nothing."""
    with pytest.raises(PublishError, match="No space left"), staging(tmp_path, "line", 1):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list_files(tmp_path, hidden=True) == []


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("step", range(5))
def test_ctrl_c_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, step: int) -> None:
    """KeyboardInterrupt at each flush leaves the models folder, hidden files included, as it was, or complete."""
    if version == 2:
        publish_line(tmp_path, 1)
    before = list_files(tmp_path, hidden=True)
    steps = iter(range(100))
    flush = module._flush

    def interrupt(path: Path) -> None:
        if next(steps) == step:
            raise KeyboardInterrupt
        flush(path)

    monkeypatch.setattr(module, "_flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish_line(tmp_path, version)
    after = list_files(tmp_path, hidden=True)
    if step < 4:  # two files, their folder, its folder; then comes the rename
        assert after == before
    else:
        assert load_manifest(tmp_path / "line" / str(version)) == build_manifest(version)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_publish import publish_line
flush, left = os.fsync, [int(sys.argv[2])]
def fsync(descriptor):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    flush(descriptor)
os.fsync = fsync
publish_line(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("step", range(6))
def test_kill_at_any_step(tmp_path: Path, step: int) -> None:
    """SIGKILL at each flush leaves nothing visible before the rename and a complete version after it."""
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(step)], cwd=root, env=os.environ, check=False, timeout=60
    )
    assert ended.returncode == -signal.SIGKILL
    if step < 4:
        assert list_files(tmp_path) == []
    else:
        assert load_manifest(tmp_path / "line" / "1") == build_manifest()


def test_what_a_killed_run_leaves_is_removed_later(tmp_path: Path) -> None:
    """A run removes staging folders older than an hour, and no younger ones."""
    old, young = tmp_path / ".staging-old", tmp_path / ".staging-young"
    (old / "line" / "1").mkdir(parents=True)
    young.mkdir()
    os.utime(old, times=(time.time() - 7200,) * 2)
    publish_line(tmp_path)
    assert not old.exists()
    assert young.exists()


def test_rows_of_numbers_stand_on_one_line(tmp_path: Path) -> None:
    """For readability a row of numbers is one line; text that looks like one is unchanged."""
    manifest = build_manifest().model_copy(update={"description": "[1,\n 2]"})
    write_manifest(tmp_path, manifest)
    text = (tmp_path / MANIFEST_FILE).read_text()
    assert '"shape": [ 1 ]' in text
    assert Manifest.model_validate_json(text) == manifest
