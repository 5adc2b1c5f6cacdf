"""Tests of service.model.manifest."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.errors import ModelRefusedError, describe_invalid
from service.model.manifest import Feature, Manifest, digest
from service.model.version_folder import load_artifact, load_manifest
from tests import fakes


@pytest.mark.parametrize("build", fakes.GOOD)
def test_manifest_round_trips(build: Any) -> None:
    """What is written is what is read."""
    manifest = build().manifest()
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert Manifest.model_validate_json(manifest.model_dump_json(exclude_none=True)) == manifest


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_feature_range_round_trips_or_is_refused(minimum: float, maximum: float) -> None:
    """A range is kept exactly when its minimum is below its maximum, and refused otherwise."""
    if minimum < maximum:
        feature = Feature(name="x", minimum=minimum, maximum=maximum)
        assert Feature.model_validate_json(feature.model_dump_json()) == feature
    else:
        with pytest.raises(ValidationError, match="not below maximum"):
            Feature(name="x", minimum=minimum, maximum=maximum)


def _change(fields: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    parts = path.split(".")
    inner = fields
    for part in parts[:-1]:
        inner = inner[part]
    if value is ...:
        del inner[parts[-1]]
    else:
        inner[parts[-1]] = value
    return fields


LABELS = ["a", "b"]


@pytest.mark.parametrize(
    ("build", "path", "value", "message"),
    [
        (fakes.doubler, "name", "Doubler", "name: "),
        (fakes.doubler, "name", "../evil", "name: "),
        (fakes.doubler, "name", "", "name: "),
        (fakes.doubler, "version", 0, "version: "),
        (fakes.doubler, "surprise", 1, "surprise is not a field of a manifest"),
        (fakes.doubler, "task", ..., "task: Field required"),
        (
            fakes.doubler,
            "task",
            "ranking",
            "task is none of 'regression', 'binary', 'multiclass', 'multilabel', 'embedding'",
        ),
        (fakes.doubler, "input.shape", [2], "1 features for a shape of [2]"),
        (fakes.doubler, "input.shape", [0], "input.tabular.shape.0: "),
        (fakes.doubler, "input.kind", "audio", "input: "),
        (fakes.doubler, "input.dtype", "float64", "input.tabular.dtype: "),
        (fakes.doubler, "output.kind", "probability", "a regression model has output kind value"),
        (fakes.doubler, "output.labels", LABELS, "neither labels nor a threshold"),
        (fakes.doubler, "output.threshold", 0.5, "neither labels nor a threshold"),
        (fakes.doubler, "artifacts", {}, "artifacts: "),
        (fakes.doubler, "artifacts.onnx.file", "../model.onnx", "artifacts.onnx.file: "),
        (fakes.doubler, "artifacts.onnx.sha256", "ab", "artifacts.onnx.sha256: "),
        (fakes.doubler, "golden.outputs", [[0.0]], "2 golden inputs, 1 golden outputs"),
        (fakes.doubler, "golden.inputs", [[0.0], [1.0, 2.0]], "golden.inputs[1] has 2 values, expected 1"),
        (fakes.doubler, "golden.outputs", [[0.0, 1.0], [1.0]], "golden.outputs[0] has 2 values, expected 1"),
        (fakes.doubler, "metrics", {"mse": float("nan")}, "metrics.mse: "),
        (fakes.coin, "input.features", [{"name": "a"}, {"name": "a"}], "feature names repeat"),
        (fakes.coin, "output.labels", ["a"], "a binary model has two labels, not 1"),
        (fakes.coin, "output.labels", ["a", "a"], "labels repeat"),
        (fakes.coin, "output.threshold", 1.5, "output.threshold: "),
        (fakes.compass, "output.labels", ["a"], "at least two labels"),
        (fakes.compass, "output.threshold", 0.5, "no threshold"),
        (fakes.canvas, "input.shape", [28, 27], "does not hold 784 pixels"),
        (fakes.canvas, "input.image.polarity", "as-is", 'fitting "mnist" looks for ink; give polarity "light-on-dark"'),
        (fakes.canvas, "input.image.channels", 2, "input.image.image.channels: "),
    ],
)
def test_contradiction_is_refused(build: Any, path: str, value: Any, message: str, tmp_path: Path) -> None:
    """A manifest that is incomplete, out of range or contradicts itself is refused with a sentence that says where."""
    fields = _change(build().fields(), path, value)
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(ModelRefusedError) as caught:
        load_manifest(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "manifest.json: "),
        (b"null", "manifest.json: "),
        (b'{"schema_version": 3, "anything": 1}', "has schema_version 3; this service reads up to 2"),
        (b" " * (4 * 2**20 + 1), "is larger than"),
    ],
)
def test_unreadable_manifest_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    """Anything but a manifest of a schema known here is refused, whatever its bytes."""
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ModelRefusedError, match=message):
        load_manifest(tmp_path)


def test_missing_manifest_is_refused(tmp_path: Path) -> None:
    """A folder without a manifest is no version."""
    with pytest.raises(ModelRefusedError, match=r"manifest\.json cannot be read: No such file"):
        load_manifest(tmp_path)


def test_sentence_names_the_first_problem() -> None:
    """A pydantic error becomes one line with the field's path."""
    with pytest.raises(ValidationError) as caught:
        Manifest.model_validate({})
    assert describe_invalid(caught.value) == "name: Field required"


def test_any_flipped_byte_is_refused(tmp_path: Path) -> None:
    """An artifact with any one byte changed is not returned, wherever that byte stands."""
    fake = fakes.doubler().only("onnx")
    folder = fakes.write_version(tmp_path, fake)
    artifact = fake.manifest().artifacts["onnx"]
    content = fake.contents["onnx"]
    assert load_artifact(folder, artifact) == content
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (folder / artifact.file).write_bytes(changed)
        with pytest.raises(ModelRefusedError, match="has sha256"):
            load_artifact(folder, artifact)


def test_artifact_of_another_size_is_refused_unread(tmp_path: Path) -> None:
    """A size that is not the manifest's is refused before the bytes are read."""
    fake = fakes.doubler().only("onnx")
    folder = fakes.write_version(tmp_path, fake)
    artifact = fake.manifest().artifacts["onnx"]
    (folder / artifact.file).write_bytes(fake.contents["onnx"] + b"x")
    with pytest.raises(ModelRefusedError, match=rf"has {artifact.bytes + 1} bytes, the manifest says {artifact.bytes}"):
        load_artifact(folder, artifact)
    (folder / artifact.file).unlink()
    with pytest.raises(ModelRefusedError, match="cannot be read: No such file"):
        load_artifact(folder, artifact)


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """An artifact that is a link to elsewhere is refused, even with the right bytes."""
    fake = fakes.doubler().only("onnx")
    folder = fakes.write_version(tmp_path / "models", fake)
    artifact = fake.manifest().artifacts["onnx"]
    (folder / artifact.file).rename(tmp_path / "elsewhere.onnx")
    (folder / artifact.file).symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ModelRefusedError, match="is a link that leads out of its folder"):
        load_artifact(folder, artifact)


def test_digest_is_sha256() -> None:
    """The digest of nothing is FIPS 180-4's."""
    assert digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
