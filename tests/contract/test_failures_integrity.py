"""Files that are not what their manifest says: refused by name and reason, and the other models serve."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.model.version_folder import MAX_MANIFEST_BYTES
from tests import fakes
from tests.servers import Server


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of a manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(folder: Path) -> None:
    """Flip one bit in the middle."""
    path = folder / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    """Cut the last byte off."""
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def swap(folder: Path) -> None:
    """Put another good graph of the same size in the file's place."""
    path = folder / "model.onnx"
    other = fakes.doubler(factor=2.5).contents["onnx"]
    assert len(other) == path.stat().st_size
    path.write_bytes(other)


def link_out(folder: Path) -> None:
    """Let the file be a link to a good one outside."""
    outside = folder.parent.parent.parent / "outside.onnx"
    os.replace(folder / "model.onnx", outside)
    (folder / "model.onnx").symlink_to(outside)


def swell(folder: Path) -> None:
    """Make the file larger than the manifest says, without taking the disk for it."""
    with (folder / "model.onnx").open("r+b") as file:
        file.truncate(2**33)


def bloat(folder: Path) -> None:
    """Make the manifest larger than any is."""
    path = folder / "manifest.json"
    path.write_text(path.read_text() + " " * MAX_MANIFEST_BYTES)


def replace_by_folder(folder: Path) -> None:
    """Put a folder where the file should be."""
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()


def swap_labels(folder: Path) -> None:
    """Keep the files and change what the golden sample must be."""
    edit(folder, golden={"inputs": [[1.0]], "outputs": [[3.0]]})


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "model.onnx has sha256 "),
    "truncated": (cut, "bytes, the manifest says "),
    "swapped": (swap, "model.onnx has sha256 "),
    "missing": (lambda folder: (folder / "model.onnx").unlink(), "model.onnx cannot be read: No such file"),
    "a-folder": (replace_by_folder, "model.onnx"),
    "linked-out": (link_out, "model.onnx is a link that leads out of its folder"),
    "oversized": (swell, "model.onnx has 8589934592 bytes, the manifest says "),
    "newer-schema": (lambda folder: edit(folder, schema_version=99), "has schema_version 99; this service reads up to"),
    "large-manifest": (bloat, f"manifest.json is larger than {MAX_MANIFEST_BYTES} bytes"),
    "half-a-manifest": (lambda folder: (folder / "manifest.json").write_text('{"name": '), "manifest.json is not JSON"),
    "unknown-field": (lambda folder: edit(folder, colour="red"), "colour"),
    "anothers-manifest": (
        lambda folder: edit(folder, name="other"),
        "the manifest is of other/1, not of anothers-manifest/1",
    ),
    "wrong-answers": (swap_labels, "misses a golden output by "),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a model for each way to be spoilt, and a good one."""
    root = tmp_path_factory.mktemp("spoilt") / "models"
    for name, (spoil, _) in CASES.items():
        spoil(fakes.write_version(root, replace(fakes.doubler().only("onnx"), name=name)))
    fakes.write_version(root, fakes.coin().only("onnx"))
    with Server(root, "--workers", "1", "--backend", "onnx") as server:
        yield server


@pytest.mark.parametrize("name", CASES)
def test_version_that_is_not_what_it_says_is_refused(name: str, spoilt: Server) -> None:
    """The log, readiness and the model's own page say which version and why; the other models serve."""
    reason = CASES[name][1]
    ready = spoilt.get("/health/ready")
    assert ready.status_code == 503
    assert f"{name}: " in ready.json()["error"]
    assert reason in ready.json()["error"]
    assert reason in spoilt.get(f"/v1/models/{name}").json()["refused"]["1"]
    assert f"model {name} version 1 is not served: " in spoilt.log()
    refused = spoilt.predict(name, [[2]])
    assert refused.status_code == 503
    assert reason in refused.json()["error"]
    assert spoilt.predict("coin", [[1, 2]]).status_code == 200


def test_older_version_serves_when_the_newest_is_damaged(empty_dir: Path) -> None:
    """A damaged newest version does not take the model down: the one before serves, and the list says why not two."""
    fakes.write_version(empty_dir, fakes.doubler().only("onnx"))
    flip(fakes.write_version(empty_dir, fakes.doubler(version=2, factor=2.5).only("onnx")))
    with Server(empty_dir, "--workers", "1") as server:
        assert server.predict("doubler", [[2]]).json()["version"] == 1
        assert server.get("/health/ready").status_code == 200
        assert list(server.get("/v1/models/doubler").json()["refused"]) == ["2"]
