"""Tests of service.packaging, through `python -m service package`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from service.__main__ import main
from service.model.manifest import ImageInput, TabularInput
from service.model.predictor import load_predictor
from service.model.version_folder import load_manifest
from tests import fakes

Iris = tuple[Any, bytes, Any]


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """A folder with graphs as a user would have them."""
    folder = tmp_path / "own"
    folder.mkdir()
    for build in fakes.GOOD:
        fake = build()
        for name, content in fake.contents.items():
            (folder / f"{fake.name}{Path(fakes.FILES[name]).suffix}").write_bytes(content)
    return folder


def package(models_dir: Path, *arguments: str) -> int:
    """Run the command."""
    return main(["package", "--models-dir", str(models_dir), *arguments])


def test_both_artifacts_become_one_proven_version(artifacts: Path, tmp_path: Path) -> None:
    """An ONNX and a TorchScript file of one model become a version with digests and golden samples of both."""
    root = tmp_path / "models"
    files = [str(artifacts / "coin.onnx"), str(artifacts / "coin.pt")]
    flags = ["--name", "toss", "--task", "binary", "--features", "a, b", "--labels", "tails,heads"]
    assert package(root, *files, *flags, "--threshold", "0.7", "--title", "A coin") == 0
    manifest = load_manifest(root / "toss" / "1")
    assert set(manifest.artifacts) == {"onnx", "torchscript"}
    assert [feature.name for feature in manifest.input.features] == ["a", "b"]  # type: ignore[union-attr]
    assert (manifest.output.threshold, manifest.title) == (0.7, "A coin")
    assert manifest.golden is not None
    for backend in ("onnx", "torchscript"):
        load_predictor(root / "toss" / "1", backend, "cpu")
    assert os.listdir(root) == ["toss"]  # nothing of the staging is left


def test_versions_count_on_and_are_never_overwritten(artifacts: Path, tmp_path: Path) -> None:
    """The next free version is taken; one that exists is refused."""
    root = tmp_path / "models"
    call = [str(artifacts / "doubler.onnx"), "--name", "mine", "--task", "regression", "--features", "x"]
    assert [package(root, *call), package(root, *call), package(root, *call, "--model-version", "7")] == [0, 0, 0]
    assert sorted(os.listdir(root / "mine")) == ["1", "2", "7"]
    assert package(root, *call) == 0
    assert sorted(os.listdir(root / "mine")) == ["1", "2", "7", "8"]
    (root / "mine" / "²").mkdir()
    assert package(root, *call) == 0
    assert (root / "mine" / "9").is_dir()
    assert package(root, *call, "--model-version", "7") == 1


def test_picture_model(artifacts: Path, tmp_path: Path) -> None:
    """An image model is described by its size, and by its tensor's shape where that is not C,H,W."""
    root = tmp_path / "models"
    labels = ",".join("0123456789")
    call = [str(artifacts / "canvas.pt"), "--name", "drawn", "--task", "multiclass", "--labels", labels]
    assert package(root, *call, "--image", "28x28", "--input-shape", "784") == 0
    manifest = load_manifest(root / "drawn" / "1")
    assert manifest.input.shape == (784,)
    assert set(manifest.artifacts) == {"torchscript"}


@pytest.mark.parametrize(
    ("flags", "polarity", "fitting"),
    [
        ("", "as-is", "stretch"),
        ("--polarity dark-on-light", "dark-on-light", "stretch"),
        ("--fitting mnist", "light-on-dark", "mnist"),
    ],
)
def test_pictures_are_ink_only_where_that_is_said(
    flags: str, polarity: str, fitting: str, artifacts: Path, tmp_path: Path
) -> None:
    """What an image model's pictures are is said by flags; without them nothing is turned."""
    call = [str(artifacts / "canvas.pt"), "--name", "drawn", "--task", "multiclass", "--labels", ",".join("0123456789")]
    assert package(tmp_path, *call, "--image", "28x28", "--input-shape", "784", *flags.split()) == 0
    spec = load_manifest(tmp_path / "drawn" / "1").input
    assert isinstance(spec, ImageInput)
    assert (spec.image.polarity, spec.image.fitting) == (polarity, fitting)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("nosuch.onnx --name m --task regression --features x", "nosuch.onnx does not exist; give the path"),
        (
            "model.pkl --name m --task regression --features x",
            "can run whatever code is in it",
        ),
        ("doubler.onnx doubler.onnx --name m --task regression --features x", "is a second onnx artifact"),
        ("doubler.onnx --name Bad --task regression --features x", "the manifest would not be valid: name: "),
        ("doubler.onnx --name ../m --task regression --features x", "the manifest would not be valid: name: "),
        ("doubler.pt --name m --task regression", "give --features or --samples with a header for a tab"),
        ("doubler.pt --name m --features x", "give --task, and --features or --image; a PyTorch"),
        ("doubler.onnx --name m --task regression --features x --image 1x1", "give --features for a tabular model or"),
        ("doubler.onnx --name m --task regression --image 28", "--image 28 is not WIDTHxHEIGHT"),
        ("doubler.onnx --name m --task regression --image 2x2x1x1", "--image 2x2x1x1 is not WIDTHxHEIGHT"),
        ("doubler.onnx --name m --task regression --image axb", "--image axb is not whole numbers"),
        ("doubler.onnx --image axb", "--image axb is not whole numbers"),
        ("doubler.onnx --image 0x8", "--image 0x8 is not whole numbers"),
        ("doubler.onnx --image 8", "--image 8 is not WIDTHxHEIGHT"),
        ("doubler.onnx --name m --task regression --features x,y", "the graph takes [1] per instance"),
        ("doubler.pt --name m --task regression --features x,y", "does not run on inputs [3, 2]"),
        ("doubler.onnx --name m --task binary --features x", "a binary model has two labels, not 0"),
        ("compass.onnx --name m --task regression --features x,y --values a,b", "gives [3, 4] where task and labels"),
        ("compass.onnx --name m --task multiclass --features x,y --labels a,b,c,d", "are its outputs --output-kind lo"),
        ("switch.onnx --name m --task binary --features x --labels a,b", "not a probability; are its outputs --outp"),
        ("compass.onnx --name m --task multiclass --features x,y --labels a,b,c", "gives [3, 4] where task and labels"),
        (
            "pair.onnx --name m --task binary --features x,y --labels a,b",
            "are its outputs --task multiclass --output-",
        ),
        (
            "pair.onnx --name m --task binary --features x,y --labels a,b --output-kind logits",
            "gives [3, 2] where task and labels say [3, 1]; two logits are --task multiclass",
        ),
        (
            "pair.onnx --name m --task binary --features x,y --labels a,b --output-kind probability",
            "gives [3, 2] where task and labels say [3, 1]; two columns are --output-kind probabilities",
        ),
        ("ramp.onnx --name m --task binary --features x --labels a,b", "not a probability; are its outputs --output-k"),
        ("pair.onnx --name m --task tensors --features a,b --labels a", "leave out --features, --labels"),
        ("doubler.onnx --name m --task regression --features x --polarity as-is", "--polarity describes an image mo"),
        ("garbage.onnx --name m --task regression --features x", "onnxruntime cannot load the graph"),
        ("doubler.onnx coin.pt --name m --task regression --features x", "does not run on inputs [3, 1]"),
        ("half.onnx --name m --task multiclass --features a,b --labels a,b", "probabilities that sum to "),
        ("log.onnx --name m --task regression --features x", "not finite on inputs from 0.511 to"),
        ("doubler.onnx tripler.pt --name m --task regression --features x", "give different outputs; they are not one"),
    ],
)
def test_refusal_is_one_line_and_leaves_nothing(
    flags: str, message: str, artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be packaged is refused with one line and exit code 1, and the models folder stays as it was."""
    minus = helper.make_node("Sub", ["inputs", "one"], ["below"])
    nodes = [minus, helper.make_node("Log", ["below"], ["outputs"])]
    one = {"one": np.ones(1, np.float32)}
    (artifacts / "log.onnx").write_bytes(fakes.build_onnx(*nodes, weights=one, wide=1, out=1))
    half = helper.make_node("Sigmoid", ["inputs"], ["outputs"])
    (artifacts / "half.onnx").write_bytes(fakes.build_onnx(half, wide=2, out=2))
    pair = helper.make_node("Identity", ["inputs"], ["outputs"])
    (artifacts / "pair.onnx").write_bytes(fakes.build_onnx(pair, wide=2, out=2))
    (artifacts / "ramp.onnx").write_bytes(fakes.build_onnx(pair, wide=1, out=1))
    (artifacts / "tripler.pt").write_bytes(fakes.doubler(factor=3).contents["torchscript"])
    (artifacts / "garbage.onnx").write_bytes(b"garbage")
    (artifacts / "model.pkl").write_bytes(b"no pickles here")
    root = tmp_path / "models"
    words = [str(artifacts / word) if word.endswith((".onnx", ".pt", ".pkl")) else word for word in flags.split()]
    assert package(root, *words) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not root.exists() or os.listdir(root) == []


def test_folder_that_cannot_be_written_is_one_line(
    artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A models folder that is a file, for one, is refused with one line."""
    (tmp_path / "models").write_text("a file")
    call = [str(artifacts / "doubler.onnx"), "--name", "mine", "--task", "regression", "--features", "x"]
    assert package(tmp_path / "models", *call) == 1
    assert "cannot be written: " in capsys.readouterr().err


def test_manifest_says_no_more_than_is_known(artifacts: Path, tmp_path: Path) -> None:
    """A packaged model's manifest has no field that nobody gave."""
    root = tmp_path / "models"
    package(root, str(artifacts / "doubler.onnx"), "--name", "mine", "--task", "regression", "--features", "x")
    fields = json.loads((root / "mine" / "1" / "manifest.json").read_text())
    assert "training" not in fields
    assert fields["input"] == {"kind": "tabular", "shape": [1], "dtype": "float32", "features": [{"name": "x"}]}


def test_two_columns_of_a_binary_model_are_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A classifier of scikit-learn gives a column for each label; nobody need say so."""
    node = helper.make_node("Softmax", ["inputs"], ["outputs"])
    (tmp_path / "pair.onnx").write_bytes(fakes.build_onnx(node, wide=2, out=2))
    call = [
        str(tmp_path / "pair.onnx"),
        "--name",
        "pair",
        "--task",
        "binary",
        "--features",
        "a,b",
        "--labels",
        "no,yes",
    ]
    assert package(tmp_path / "models", *call) == 0
    assert load_manifest(tmp_path / "models" / "pair" / "1").output.kind == "probabilities"
    assert "these logits" not in capsys.readouterr().err
    assert package(tmp_path / "models", *call, "--output-kind", "logits") == 1


@pytest.mark.parametrize(("name", "kind"), [("coin", "probability"), ("soft", "probabilities"), ("switch", "")])
def test_logits_that_look_like_probabilities_are_warned_of(
    name: str, kind: str, artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A softmax of probabilities is served without a word, so that a word is said here; real logits get none."""
    node = helper.make_node("Softmax", ["inputs"], ["outputs"])
    (artifacts / "soft.onnx").write_bytes(fakes.build_onnx(node, wide=2, out=2))
    task = "multiclass" if name == "soft" else "binary"
    flags = ["--task", task, "--features", "a" if name == "switch" else "a,b", "--labels", "no,yes"]
    assert package(tmp_path, str(artifacts / f"{name}.onnx"), "--name", "m", *flags, "--output-kind", "logits") == 0
    said = capsys.readouterr().err
    assert (f"look like probabilities; if they are, say --output-kind {kind}\n" in said) == bool(kind)


def test_answer_that_depends_on_the_batch_is_not_packaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A graph that takes the batch's mean away answers a lone caller otherwise than one among others."""
    mean = helper.make_node("ReduceMean", ["inputs"], ["mean"], axes=[0])
    content = fakes.build_onnx(mean, helper.make_node("Sub", ["inputs", "mean"], ["outputs"]), wide=1, out=1)
    (tmp_path / "mean.onnx").write_bytes(content)
    call = [str(tmp_path / "mean.onnx"), "--name", "mean", "--task", "regression", "--features", "x"]
    assert package(tmp_path / "models", *call) == 1
    assert "another answer beside others than alone; export the net in evaluation mode" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("table", "flags", "names", "first"),
    [
        ("a, b\n1,-2.5\n3,4\n", "", ["a", "b"], (1, -2.5)),
        ("\ufeff1,-2.5\n3,4\n", "--features c,d", ["c", "d"], (1, -2.5)),
        ("b,kind,a\n-2.5,x,1\n4,y,3\n", "--features a,b", ["a", "b"], (1, -2.5)),
        ("npy", "--features a,b", ["a", "b"], (1, -2.5)),
    ],
)
def test_samples_give_names_ranges_and_golden_inputs(
    table: str, flags: str, names: list[str], first: tuple[float, ...], artifacts: Path, tmp_path: Path
) -> None:
    """What a file of real inputs says stands in the manifest."""
    file = tmp_path / ("rows.npy" if table == "npy" else "rows.csv")
    if table == "npy":
        np.save(file, np.array([[1, -2.5], [3, 4]]))
    else:
        file.write_text(table, encoding="utf-8")
    call = [str(artifacts / "coin.onnx"), str(artifacts / "coin.pt"), "--name", "toss", "--task", "binary"]
    assert package(tmp_path, *call, "--labels", "tails,heads", "--samples", str(file), *flags.split()) == 0
    manifest = load_manifest(tmp_path / "toss" / "1")
    assert isinstance(manifest.input, TabularInput)
    assert [feature.name for feature in manifest.input.features] == names
    assert [(feature.minimum, feature.maximum) for feature in manifest.input.features] == [(1, 3), (-2.5, 4)]
    assert manifest.golden_rows is not None
    assert manifest.golden_rows.inputs.tolist() == [list(first), [3, 4]]


def test_samples_of_pictures_are_golden_inputs(artifacts: Path, tmp_path: Path) -> None:
    """An image model's samples are an array of numbers in [0, 1]."""
    pictures = np.random.default_rng(3).random((5, 28, 28))
    np.save(tmp_path / "pictures.npy", pictures)
    call = [
        str(artifacts / "canvas.onnx"),
        "--name",
        "drawn",
        "--task",
        "multiclass",
        "--labels",
        ",".join("0123456789"),
    ]
    size = ["--image", "28x28", "--input-shape", "784", "--samples", str(tmp_path / "pictures.npy")]
    assert package(tmp_path, *call, *size) == 0
    golden = load_manifest(tmp_path / "drawn" / "1").golden_rows
    assert golden is not None
    assert np.array_equal(golden.inputs, pictures[:3].reshape(3, 784).astype(np.float32))
    np.save(tmp_path / "pictures.npy", pictures * 255)
    assert package(tmp_path, *call, *size) == 1


@pytest.mark.parametrize(
    ("table", "flags", "message"),
    [
        ("", "--features a,b", "has no rows"),
        ("a,b\n", "", "has no rows"),
        ("1,2\n", "", "give --features or --samples with a header"),
        ("a,b\n1,x\n", "", "row 1 is '1,x'; --features chooses columns by the names in a header"),
        ("a,b\n1,2\n3\n", "", "row 2 is '3'"),
        ("a,b\n1,nan\n", "", "gives no number for rows that lack a value; leave such rows out of --samples"),
        ("1,2,3\n", "--features a,b", "has 3 columns for 2 features"),
        ("a,b,c\n1,2,3\n", "", "the graph takes [2] per instance"),
        (None, "--features a,b", "rows.csv cannot be read: No such file"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(
    table: str | None, flags: str, message: str, artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong with a file of samples is one line."""
    file = tmp_path / "rows.csv"
    if table is not None:
        file.write_text(table)
    call = [str(artifacts / "coin.onnx"), "--name", "toss", "--task", "binary", "--labels", "tails,heads"]
    assert package(tmp_path / "models", *call, "--samples", str(file), *flags.split()) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
