"""Tests of columns: service.model.manifest.inputs, service.model.columns and service.api.v1.columns."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.api.v1.columns import read_columns
from service.errors import InvalidRequestError, ModelRefusedError
from service.model import channel
from service.model.columns import build_row, join_tensors, read_row
from service.model.golden import parse_golden, write_golden
from service.model.manifest import ColumnsInput, GoldenRows, Manifest, digest
from service.model.predictor import load_predictor
from service.model.version_folder import load_manifest
from tests import columns, fakes

MODEL = ("house", 1)


def build(*each: dict[str, Any], **more: Any) -> ColumnsInput:
    """Return an input of columns."""
    return ColumnsInput.model_validate_json(json.dumps({"kind": "columns", "columns": each, **more}))


def read(instances: list[Any], spec: ColumnsInput) -> dict[str, list[Any]]:
    """Return the tensors of instances, as lists."""
    rows = read_columns(instances, spec, MODEL)
    return {name: rows[name].tolist() for name in rows.dtype.names or ()}


def test_floats_share_one_tensor() -> None:
    """Numbers, 0 and 1 for booleans, the index of a category, days for a datetime, and NaN for null."""
    spec = build(
        {"name": "x", "type": "number", "nullable": True},
        {"name": "n", "type": "integer"},
        {"name": "b", "type": "boolean"},
        {"name": "c", "type": "category", "values": ["u", "v"]},
        {"name": "d", "type": "datetime"},
        feed="floats",
        tensor="X",
    )
    assert read([[1.5, 2, True, "v", "1970-01-02"]], spec) == {"X": [[1.5, 2.0, 1.0, 1.0, 1.0]]}
    assert np.isnan(read([[None, 2, True, "v", "1970-01-02"]], spec)["X"][0][0])


def test_strings_share_one_tensor() -> None:
    """One text tensor has texts as they are, and a column's marker for null."""
    spec = build(
        {"name": "t", "type": "text", "nullable": True, "missing": "?"},
        {"name": "c", "type": "category", "values": ["u", "v"]},
        feed="strings",
    )
    assert read([["a\u0000ü", "u"], {"c": "v"}], spec) == {"inputs": [["a\u0000ü", "u"], ["?", "v"]]}


def test_columns_of_one_tensor_stand_side_by_side() -> None:
    """Columns may name the graph's input that they are part of."""
    spec = build(
        {"name": "a", "type": "number", "tensor": "numbers"},
        {"name": "k", "type": "category", "values": [1, 2, 3]},
        {"name": "b", "type": "integer", "nullable": True, "tensor": "numbers"},
    )
    assert [(each.name, each.datatype) for each in spec.tensors] == [("numbers", "FP32"), ("k", "INT64")]
    assert read([{"a": 1, "b": 2, "k": 3}], spec) == {"numbers": [[1.0, 2.0]], "k": [[3]]}


@pytest.mark.parametrize(
    ("column", "value", "datatype", "element"),
    [
        ({"type": "integer", "datatype": "INT32"}, 2**31 - 1, "INT32", 2**31 - 1),
        ({"type": "integer"}, 3.0, "INT64", 3),
        ({"type": "integer"}, 2**63 - 1, "INT64", 2**63 - 1),
        ({"type": "boolean", "datatype": "INT64"}, True, "INT64", 1),
        ({"type": "boolean", "nullable": True}, True, "FP32", 1.0),
        ({"type": "category", "values": ["u", "v"], "datatype": "INT64"}, "v", "INT64", 1),
        ({"type": "category", "values": [5, 7], "datatype": "BYTES"}, 7, "BYTES", "7"),
        ({"type": "datetime"}, "2024-02-29T01:02:03+02:00", "BYTES", "2024-02-29T01:02:03+02:00"),
        ({"type": "number", "datatype": "FP64"}, 1e300, "FP64", 1e300),
    ],
)
def test_datatype_of_a_tensor(column: dict[str, Any], value: Any, datatype: str, element: Any) -> None:
    """Each type goes into a tensor of its plain datatype, or of the one that the manifest says."""
    spec = build({"name": "x"} | column)
    assert spec.tensors[0].datatype == datatype
    assert read([[value]], spec) == {"x": [[element]]}
    assert list(read_row(spec, build_row(spec)[0])) == ["x"]


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ({"type": "integer", "datatype": "INT32"}, [1, 2**31], "instances[1].x is not a number that INT32 can hold"),
        ({"type": "integer"}, [2.0, 2**63], "instances[1].x is not a number that INT64 can hold"),
        ({"type": "integer"}, [1, 1e30], "instances[1].x is not a number that INT64 can hold"),
        ({"type": "number"}, [1, -(10**400)], "instances[1].x is not a number that FP32 can hold"),
        ({"type": "category", "values": [1, 2]}, [1, True], "instances[1].x is a boolean, expected one of 1, 2"),
        ({"type": "datetime"}, ["2024-01-01", "2024-13-01"], "instances[1].x is \"2024-13-01\", expected a date and"),
    ],
)  # fmt: skip
def test_value_that_a_tensor_cannot_have(column: dict[str, Any], values: list[Any], sentence: str) -> None:
    """The sentence says which of the values it is."""
    with pytest.raises(InvalidRequestError) as caught:
        read([[value] for value in values], build({"name": "x"} | column))
    assert str(caught.value).startswith(sentence)


ANY = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False) | st.text(max_size=5)


@given(st.lists(st.lists(ANY | st.sampled_from(["Rome", "1970-01-01"]), min_size=6, max_size=6), min_size=1))
def test_any_values_are_read_or_refused(instances: list[list[Any]]) -> None:
    """Whatever JSON has, in whatever mixture, becomes rows, or is refused as a bad request."""
    spec = columns.house().manifest().input
    assert isinstance(spec, ColumnsInput)
    with contextlib.suppress(InvalidRequestError):
        assert len(read_columns(instances, spec, MODEL)) == len(instances)


def test_rows_cross_a_channel_as_they_are() -> None:
    """Text, numbers and NaN come out of a message as they went in, field by field."""
    spec = columns.house().manifest().input
    assert isinstance(spec, ColumnsInput)
    rows = read_columns([[None, 1, True, "Rome", "ü" * 1000, "1970-01-02"]] * 3, spec, MODEL)
    parts = channel.pack({"id": 1}, rows)
    fields, found = channel.unpack(bytes(parts[1]), b"".join(parts[2:]))
    assert fields == {"id": 1}
    assert found.dtype == rows.dtype
    assert found.tobytes() != b""
    assert [each[1:] for each in found.tolist()] == [each[1:] for each in rows.tolist()]
    assert np.isnan(found["age"]).all()


@pytest.mark.parametrize(
    ("each", "more", "sentence"),
    [
        ([{"name": "x", "type": "category"}], {}, "only a category has values"),
        ([{"name": "x", "type": "number", "values": ["a"]}], {}, "only a category has values"),
        ([{"name": "x", "type": "category", "values": ["a", "a"]}], {}, "values that repeat"),
        ([{"name": "x", "type": "text", "minimum": 1}], {}, "only numbers and integers have a range"),
        ([{"name": "x", "type": "text", "datatype": "FP32"}], {}, "has datatype FP32, expected one of BYTES"),
        ([{"name": "x", "type": "integer", "datatype": "INT64", "nullable": True}], {}, "INT64 has no value for null"),
        ([{"name": "x", "type": "integer", "default": "a"}], {}, "has a default that it would refuse"),
        ([{"name": "x", "type": "text"}], {"feed": "floats"}, "a tensor of floats cannot have"),
        ([{"name": "x", "type": "number"}], {"feed": "strings"}, "a tensor of strings cannot have"),
        ([{"name": "x", "type": "number"}] * 2, {}, "column 'x' is there twice"),
        (
            [{"name": "x", "type": "number", "tensor": "t"}, {"name": "y", "type": "text", "tensor": "t"}],
            {},
            "have several datatypes",
        ),
    ],
)
def test_contradiction_is_refused(each: list[dict[str, Any]], more: dict[str, Any], sentence: str) -> None:
    """A column says only what its type and its tensor can have."""
    with pytest.raises(ValidationError, match=sentence):
        build(*each, **more)


@pytest.mark.parametrize(
    ("make", "path", "value", "sentence"),
    [
        (columns.box, "values", [], "an output of kind 'values' has values"),
        (columns.tags, "thresholds", [0.5], "thresholds, one for each label"),
        (columns.tags, "labels", [], "a multilabel model has labels"),
        (columns.embedder, "width", None, "an output of kind 'vector' has width"),
        (columns.forecast, "kind", "vector", "has width"),
        (columns.detector, "labels", ["a"], "an outputs model has neither labels nor a threshold"),
    ],
)
def test_output_without_its_fields_is_refused(make: Any, path: str, value: Any, sentence: str) -> None:
    """Each kind of output has its own fields, and no other's."""
    fields = make().fields()
    fields["output"] = fields["output"] | {path: value}
    with pytest.raises(ValidationError, match=sentence):
        Manifest.model_validate_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "years"}, "the graph's inputs are age, rooms, garden, city, remark, since, the manifest's are years"),
        ({"datatype": "FP64"}, r"the graph's input age is tensor\(float\), the manifest's tensor\(double\)"),
    ],
)
def test_graph_of_other_inputs_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """The graph must have the inputs that the columns say."""
    fake = columns.house()
    fake.input["columns"] = [columns.COLUMNS[0] | change, *columns.COLUMNS[1:]]
    with pytest.raises(ModelRefusedError, match=sentence):
        load_predictor(fakes.write_version(tmp_path, fake))


def test_golden_rows_come_back_from_their_file(tmp_path: Path) -> None:
    """Arrays are read as they were written, and the manifest stays small however large they are."""
    fake = fakes.canvas().only("onnx")
    folder = fakes.write_version(tmp_path, fake)
    predictor = load_predictor(folder)
    inputs = np.random.default_rng(0).random((3, 784), dtype=np.float32)
    manifest = write_golden(folder, fake.manifest(), GoldenRows(inputs, predictor.predict(inputs)))
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    found = load_predictor(folder).manifest
    assert found.golden_rows is not None
    assert (found.golden_rows.inputs == inputs).all()
    assert (found.schema_version, (folder / "manifest.json").stat().st_size < 2000) == (2, True)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"inputs/inputs": np.zeros((1, 3), np.float32)}, r"inputs have shape \[1, 3\], expected \['N', 1\]"),
        ({"inputs/inputs": np.zeros((1, 1))}, "has no array"),
        ({"inputs/inputs": np.zeros((2, 1)), "outputs/outputs": np.zeros((1, 1))}, "has 2 inputs and 1 outputs"),
        ({"inputs/inputs": np.array([[{}]], object)}, "is not golden samples of this model"),
    ],
)
def test_file_of_other_arrays_is_refused(arrays: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """A golden file has the graph's tensors in their shapes, and no pickled objects."""
    fake = fakes.doubler().only("onnx")
    folder = fakes.write_version(tmp_path, fake)
    rows = GoldenRows(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))
    write_golden(folder, fake.manifest(), rows)
    np.savez(folder / "golden.npz", **arrays)
    content = (folder / "golden.npz").read_bytes()
    golden = {"file": "golden.npz", "sha256": digest(content), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(fake.fields() | {"golden": golden}))
    with pytest.raises(ModelRefusedError, match=sentence):
        load_manifest(folder)


def test_file_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may hold large arrays; they are not unpacked."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, inputs=np.zeros((2000, 1), np.float32))
    monkeypatch.setattr("service.model.golden.MAX_BYTES", 1000)
    with pytest.raises(ModelRefusedError, match="its arrays have over 1000 bytes"):
        parse_golden(buffer.getvalue(), fakes.doubler().manifest())


def test_tensors_of_unequal_length_are_refused() -> None:
    """Rows have as many elements in each field."""
    dtype = np.dtype([("a", "<f4", (1,)), ("b", "<f4", (1,))])
    with pytest.raises(ValueError, match="b has shape"):
        join_tensors({"a": np.zeros((2, 1)), "b": np.zeros((1, 1))}, dtype)
