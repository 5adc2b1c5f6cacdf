"""What `package` understands by itself, converts and refuses."""

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from onnx import helper
from skl2onnx import to_onnx
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from service.__main__ import main
from service.model.columns import split_rows
from service.model.manifest import ColumnsInput, ImageInput, Manifest, TabularInput, TensorManifest
from service.model.predictor import load_predictor
from service.model.version_folder import load_any_manifest, load_manifest
from service.packaging import convert
from service.packaging.converted import Converted
from tests import fakes


def package(models_dir: Path, *arguments: str | Path) -> int:
    """Run the command."""
    return main(["package", "--models-dir", str(models_dir), *map(str, arguments)])


def write(path: Path, node: str, wide: int | list[int], out: int) -> Path:
    """Write a graph of one node."""
    path.write_bytes(fakes.build_onnx(helper.make_node(node, ["inputs"], ["outputs"]), wide=wide, out=out))
    return path


def fit_iris(zipmap: bool) -> Any:  # an onnx.ModelProto
    """Return a classifier with names of classes, from skl2onnx."""
    rows = np.random.default_rng(0).random((60, 2), np.float32)
    model = LogisticRegression().fit(rows, np.where(rows[:, 0] > 0.5, "yes", "no"))
    return to_onnx(model, rows[:1], options={"zipmap": zipmap})


def test_file_alone_is_enough_for_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Name, columns, task, output and labels come from the file and the graph, and each is told with its flag."""
    path = write(tmp_path / "My Net.onnx", "Softmax", 3, 3)
    assert package(tmp_path / "models", path) == 0
    manifest = load_manifest(tmp_path / "models" / "my-net" / "1")
    assert (manifest.task, manifest.output.kind, manifest.output.labels) == (
        "multiclass",
        "probabilities",
        ("0", "1", "2"),
    )
    told = capsys.readouterr().out
    for flag in ("--features", "--task", "--labels", "--output-kind"):
        assert re.search(rf"  {flag}$", told, re.MULTILINE)


@pytest.mark.parametrize("zipmap", [False, True])
def test_classifier_of_skl2onnx_is_understood(zipmap: bool, tmp_path: Path) -> None:
    """The probabilities are found beside the label, with or without ZipMap, and the graph has the classes."""
    (tmp_path / "pair.onnx").write_bytes(fit_iris(zipmap).SerializeToString())
    assert package(tmp_path / "models", tmp_path / "pair.onnx", "--labels", "no,yes") == 0
    manifest = load_manifest(tmp_path / "models" / "pair" / "1")
    assert (manifest.task, manifest.output.tensor, manifest.output.labels) == ("binary", "probabilities", ("no", "yes"))
    outputs = load_predictor(tmp_path / "models" / "pair" / "1").predict(np.array([[0.9, 0.5]], np.float32))
    assert outputs[0, 1] > 0.5


def test_zipmap_without_onnx_is_refused_with_a_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the package onnx is missing, a sentence says how to export the model anew."""
    (tmp_path / "pair.onnx").write_bytes(fit_iris(zipmap=True).SerializeToString())
    monkeypatch.setattr("service.packaging.graph.find_spec", lambda name: None)
    assert package(tmp_path / "models", tmp_path / "pair.onnx") == 1
    assert 'export it with to_onnx(…, options={"zipmap": False})' in capsys.readouterr().err


def test_several_outputs_and_pictures_are_understood(tmp_path: Path) -> None:
    """A picture's size is read from the graph; an output of higher rank is a named one."""
    write(tmp_path / "echo.onnx", "Identity", [3, 8, 6], 1)
    model = onnx.load(tmp_path / "echo.onnx")
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("outputs", 1, ["batch", 3, 8, 6]))
    onnx.save(model, tmp_path / "echo.onnx")
    assert package(tmp_path / "models", tmp_path / "echo.onnx", "--mean", "0.5,0.5,0.5", "--std", "2,2,2") == 0
    manifest = load_manifest(tmp_path / "models" / "echo" / "1")
    assert isinstance(manifest.input, ImageInput)
    assert (manifest.input.image.width, manifest.input.image.height, manifest.task) == (6, 8, "outputs")
    outputs = load_predictor(tmp_path / "models" / "echo" / "1").predict(np.ones((1, 3, 8, 6), np.float32))
    assert np.allclose(split_rows(outputs)["outputs"], 0.25)


def test_labels_and_picture_of_the_usual_size_make_a_small_manifest(tmp_path: Path) -> None:
    """A golden picture of 224x224 is no text in the manifest."""
    flat = helper.make_node("GlobalAveragePool", ["inputs"], ["means"])
    reshape = helper.make_node("Flatten", ["means"], ["outputs"])
    (tmp_path / "net.onnx").write_bytes(fakes.build_onnx(flat, reshape, wide=[3, 224, 224], out=3))
    (tmp_path / "names.txt").write_text("red, bright\ngreen\nblue\n")
    flags = ("--image", "224x224x3", "--labels", f"@{tmp_path / 'names.txt'}")
    assert package(tmp_path / "models", tmp_path / "net.onnx", *flags) == 0
    folder = tmp_path / "models" / "net" / "1"
    assert load_manifest(folder).output.labels == ("red, bright", "green", "blue")
    assert (folder / "manifest.json").stat().st_size < 100_000


def test_graph_of_whole_numbers_becomes_tensors(tmp_path: Path) -> None:
    """What is neither a table nor a picture is served by /v2 alone."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["ids"], ["same"])],
        "g",
        [helper.make_tensor_value_info("ids", 7, ["batch", "length"])],
        [helper.make_tensor_value_info("same", 7, ["batch", "length"])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "ids.onnx"
    )
    assert package(tmp_path / "models", tmp_path / "ids.onnx") == 0
    assert isinstance(load_any_manifest(tmp_path / "models" / "ids" / "1"), TensorManifest)


def build_pipeline(folder: Path) -> tuple[Path, Path]:
    """Write a pipeline with a category and a number, and its training data."""
    frame = pd.DataFrame({"city": ["Paris", "Rome", "Oslo", "Rome"] * 10, "size": np.arange(40, dtype=np.float32)})
    encode = make_column_transformer((OneHotEncoder(), ["city"]), remainder="passthrough")
    model = make_pipeline(encode, LogisticRegression()).fit(frame, frame.city == "Rome")
    joblib.dump(model, folder / "town.joblib")
    frame.to_csv(folder / "towns.csv", index=False)
    return folder / "town.joblib", folder / "towns.csv"


def test_pipeline_has_a_typed_column_for_each_of_its_frame(tmp_path: Path) -> None:
    """A category with its values and a number with its range, and answers as scikit-learn gives them."""
    model, samples = build_pipeline(tmp_path)
    assert package(tmp_path / "models", model, "--trust-pickle", "--samples", samples) == 0
    manifest = load_manifest(tmp_path / "models" / "town" / "1")
    assert isinstance(manifest.input, ColumnsInput)
    city, size = manifest.input.columns
    assert (city.type, city.values) == ("category", ("Oslo", "Paris", "Rome"))
    assert size.minimum is not None
    assert size.maximum == 39
    assert manifest.output.labels == ("False", "True")


def test_exported_program_is_converted_and_served_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program with one output is an ONNX graph and a program in the same version, which agree."""
    net = torch.nn.Linear(3, 1)
    (tmp_path / "line.pt2").write_bytes(fakes.build_program(net, torch.zeros(2, 3)))
    assert package(tmp_path / "models", tmp_path / "line.pt2") == 0, capsys.readouterr().err
    rows = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    for backend in ("onnx", "torch-export"):
        served = load_predictor(tmp_path / "models" / "line" / "1", backend).predict(rows)
        assert served == pytest.approx(net(torch.from_numpy(rows)).detach().numpy(), abs=1e-5)
    assert package(tmp_path / "models", tmp_path / "line.pt2", "--mean", "0.5") == 1
    assert "--mean and --std are for ONNX graphs; put them into the module" in capsys.readouterr().err


def test_exported_program_with_a_picture_is_converted_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named outputs need an ONNX graph."""
    graph = write(tmp_path / "larger.onnx", "Identity", [1, 4, 4], 1).read_bytes()
    converted = Converted(graph, lambda rows: rows, beside={"torch-export": b"a program"})
    monkeypatch.setattr("service.packaging.package.convert", lambda path, options: converted)
    assert package(tmp_path / "models", tmp_path / "larger.pt2") == 0
    assert list(load_manifest(tmp_path / "models" / "larger" / "1").artifacts) == ["onnx"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.pkl", None, "model.pkl does not exist; give the path of a model's file"),
        ("model.onnx", None, "model.onnx does not exist; give the path of a model's file"),
        ("model.onnx", b"", "model.onnx is empty; write the model's file again"),
        ("", None, "is a folder, not a file; give the model's file"),
        ("picture.png", b"\x89PNG", "picture.png is not a model that can be packaged; its name must end in .onnx"),
        ("notes.txt", b"hello", "notes.txt is not a model of LightGBM; write one with booster_.save_model"),
        ("some.json", b"{}", "some.json is not a model of XGBoost; write one with model.save_model"),
        ("model.pt2", b"\x89PNG", "model.pt2 cannot be read: the file is not a program of torch.export"),
    ],
)
def test_wrong_file_is_told_in_a_sentence(
    name: str, content: bytes | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong, and what to do."""
    for suffix, library in ((".txt", "lightgbm"), (".json", "xgboost")):
        if name.endswith(suffix):
            pytest.importorskip(library)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert package(tmp_path / "models", tmp_path / name) == 1
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1


def test_pickle_is_read_only_if_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle could run any code."""

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Trap()))
    assert package(tmp_path / "models", tmp_path / "model.pkl") == 1
    assert "if you trust it, say --trust-pickle" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npy"])
def test_samples_of_numbers_come_from_each_kind_of_file(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names (an .npy file has none), ranges and golden samples are those of the file."""
    rows = pd.DataFrame({"long": [1.5, 2.5, 0.5], "wide": [10.0, 30.0, 20.0]}, dtype="float32")
    samples = tmp_path / f"rows{suffix}"
    {".csv": lambda: rows.to_csv(samples, index=False), ".parquet": lambda: rows.to_parquet(samples)}.get(
        suffix, lambda: np.save(samples, rows.to_numpy())
    )()
    flags = ["--features", "long,wide"] if suffix == ".npy" else []
    graph = write(tmp_path / "pair.onnx", "Identity", 2, 2)
    assert package(tmp_path / "models", graph, "--task", "regression", "--samples", samples, *flags) == 0
    assert "ranges are unknown" not in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "models" / "pair" / "1")
    assert isinstance(manifest.input, TabularInput)
    assert [(each.name, each.minimum, each.maximum) for each in manifest.input.features] == [
        ("long", 0.5, 2.5), ("wide", 10, 30)
    ]  # fmt: skip
    assert manifest.golden_rows is not None
    assert (manifest.golden_rows.inputs == rows.to_numpy()[: len(manifest.golden_rows.inputs)]).all()


def test_parquet_gives_the_columns_that_csv_gives(tmp_path: Path) -> None:
    """Types, values, ranges and nulls."""
    model, csv = build_pipeline(tmp_path)
    pd.read_csv(csv).to_parquet(tmp_path / "rows.parquet")
    for name, samples in (("one", csv), ("two", tmp_path / "rows.parquet")):
        flags: list[str | Path] = ["--trust-pickle", "--name", name, "--samples", samples]
        assert package(tmp_path / "models", model, *flags) == 0
    one, two = (load_manifest(tmp_path / "models" / name / "1") for name in ("one", "two"))
    assert one.input == two.input
    assert one.output == two.output


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npy"])
def test_samples_that_cannot_be_read_are_told_with_their_name(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, whether they are missing or no table."""
    graph = write(tmp_path / "pair.onnx", "Identity", 2, 2)
    samples = tmp_path / f"rows{suffix}"
    for reason in ("cannot be read: No such file", "is not a table of numbers: "):
        assert package(tmp_path / "models", graph, "--task", "regression", "--samples", samples) == 1
        message = capsys.readouterr().err
        assert f"rows{suffix} {reason}" in message
        assert message.count("\n") == 1
        samples.write_bytes(b"\x00\xff\x00\xff")


def test_ranges_without_samples_are_told_to_be_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the flag that tells them."""
    assert package(tmp_path / "models", write(tmp_path / "pair.onnx", "Identity", 2, 2), "--task", "regression") == 0
    assert "the features' ranges are unknown" in capsys.readouterr().out


def test_graph_that_differs_from_its_library_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversion whose answers are off by more than 1e-4 is refused."""
    model, samples = build_pipeline(tmp_path)
    true = convert.convert

    def shift(path: Path, options: dict[str, object]) -> Converted:
        found = true(path, options)
        predict = found.predict
        assert predict is not None
        return Converted(found.content, lambda rows: predict(rows) + 2e-4, found.flags)

    monkeypatch.setattr("service.packaging.package.convert", shift)
    assert package(tmp_path / "models", model, "--trust-pickle", "--samples", samples) == 1
    assert "the graph differs from the library by 0.0002" in capsys.readouterr().err
    assert not (tmp_path / "models" / "town").exists()


def test_missing_converter_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without skl2onnx, the error says what to install."""
    model, samples = build_pipeline(tmp_path)
    monkeypatch.setitem(sys.modules, "skl2onnx", None)
    assert package(tmp_path / "models", model, "--trust-pickle", "--samples", samples) == 1
    assert "which is not installed: pip install 'model-service[convert]'" in capsys.readouterr().err


def test_manifest_of_a_guess_is_plain_json(tmp_path: Path) -> None:
    """Nothing of the guessing itself stands in the manifest."""
    package(tmp_path / "models", write(tmp_path / "same.onnx", "Identity", 2, 2))
    fields = json.loads((tmp_path / "models" / "same" / "1" / "manifest.json").read_text())
    assert fields["output"]["values"] == [{"name": "y0"}, {"name": "y1"}]
    assert Manifest.model_validate(fields).task == "regression"
