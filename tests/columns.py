"""Small models with typed columns, and one of each further kind of output; see `tests.fakes`.

Their graphs only move values about, so that each answer can be told from its request.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.model.columns import join_tensors
from service.model.golden import write_golden
from service.model.manifest import ColumnsInput, GoldenRows
from service.model.predictor import Predictor, load_predictor
from tests import fakes
from tests.fakes import TYPES, FakeModel

CITIES = ["Paris", "Rome", "Oslo", "Bern", "Wien", "Riga", "Bonn"]
COLUMNS: list[dict[str, Any]] = [
    {"name": "age", "type": "number", "unit": "years", "nullable": True, "minimum": 0, "maximum": 120},
    {"name": "rooms", "type": "integer", "minimum": 1, "maximum": 9, "default": 3},
    {"name": "garden", "type": "boolean"},
    {"name": "city", "type": "category", "values": CITIES},
    {"name": "remark", "type": "text", "nullable": True, "missing": "none"},
    {"name": "since", "type": "datetime", "datatype": "FP64"},
]
Shapes = dict[str, tuple[str, list[int | str]]]


def build_graph(
    nodes: list[onnx.NodeProto], inputs: Shapes, outputs: Shapes, weights: dict[str, Any] | None = None
) -> bytes:
    """Build a graph; inputs and outputs are {name: (datatype, shape)}."""
    sides = [
        [helper.make_tensor_value_info(name, TYPES[datatype], shape) for name, (datatype, shape) in side.items()]
        for side in (inputs, outputs)
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(nodes, "columns", sides[0], sides[1], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return content


def cast(source: str, target: str) -> onnx.NodeProto:
    """Return a node that casts to float32."""
    return helper.make_node("Cast", [source], [target], to=TensorProto.FLOAT)


def house() -> FakeModel:
    """Columns of every type in, and a number each out: age, rooms, garden, index of the city, days since 1970."""
    nodes = [
        cast("rooms", "rooms_"),
        cast("garden", "garden_"),
        cast("since", "since_"),
        helper.make_node(
            "LabelEncoder", ["city"], ["city_"], domain="ai.onnx.ml", keys_strings=CITIES,
            values_floats=[float(index) for index in range(len(CITIES))], default_float=-1.0,
        ),
        helper.make_node(
            "LabelEncoder", ["remark"], ["remark_"], domain="ai.onnx.ml", keys_strings=["none", "fine"],
            values_floats=[-1.0, 1.0], default_float=0.0,
        ),
        helper.make_node("IsNaN", ["age"], ["is_null"]),
        helper.make_node("Where", ["is_null", "minus", "age"], ["age_"]),
        helper.make_node("Concat", ["age_", "rooms_", "garden_", "city_", "remark_", "since_"], ["outputs"], axis=1),
    ]  # fmt: skip
    inputs: Shapes = {
        name: (datatype, ["N", 1])
        for name, datatype in (
            ("age", "FP32"), ("rooms", "INT64"), ("garden", "BOOL"), ("city", "BYTES"), ("remark", "BYTES"),
            ("since", "FP64"),
        )
    }  # fmt: skip
    content = build_graph(nodes, inputs, {"outputs": ("FP32", ["N", 6])}, {"minus": np.array([[-1]], np.float32)})
    values = [{"name": column["name"], "unit": column.get("unit")} for column in COLUMNS]
    output = {"kind": "values", "values": values}
    return FakeModel("house", "regression", {"kind": "columns", "columns": COLUMNS}, output, {"onnx": content})


def write_house(root: Path) -> Path:
    """Write `house` with golden samples in a file."""
    fake = house()
    folder = fakes.write_version(root, fake)
    spec = fake.manifest().input
    assert isinstance(spec, ColumnsInput)
    tensors: dict[str, Any] = {
        "age": np.array([[31.5], [np.nan]], np.float32),
        "rooms": np.array([[2], [4]], np.int64),
        "garden": np.array([[True], [False]]),
        "city": np.array([["Rome"], ["Bonn"]], dtype=object),
        "remark": np.array([["fine"], ["none"]], dtype=object),
        "since": np.array([[1.0], [20000.5]]),
    }
    outputs = np.array([[31.5, 2, 1, 1, 1, 1], [-1, 4, 0, 6, -1, 20000.5]], np.float32)
    manifest = write_golden(folder, fake.manifest(), GoldenRows(join_tensors(tensors, spec.row_dtype), outputs))
    (folder / "manifest.json").write_text(manifest.model_dump_json(exclude_none=True))
    return folder


def spam() -> FakeModel:
    """Text in, class out: spam if the text is "win"."""
    nodes = [
        helper.make_node(
            "LabelEncoder", ["text"], ["is_spam"], domain="ai.onnx.ml", keys_strings=["win"], values_floats=[0.9],
            default_float=0.2,
        ),
    ]  # fmt: skip
    content = build_graph(nodes, {"text": ("BYTES", ["N", 1])}, {"is_spam": ("FP32", ["N", 1])})
    columns = {"kind": "columns", "feed": "strings", "tensor": "text", "columns": [{"name": "text", "type": "text"}]}
    output = {"kind": "probability", "labels": ["ham", "spam"]}
    return FakeModel("spam", "binary", columns, output, {"onnx": content})


def _identity(wide: int) -> bytes:
    return build_graph(
        [helper.make_node("Identity", ["inputs"], ["outputs"])],
        {"inputs": ("FP32", ["N", wide])},
        {"outputs": ("FP32", ["N", wide])},
    )


def box() -> FakeModel:
    """Several values: the two features, as width and height."""
    values = [{"name": "width", "unit": "m"}, {"name": "height", "unit": "m"}]
    output = {"kind": "values", "values": values}
    return FakeModel("box", "regression", fakes.tabular("a", "b"), output, {"onnx": _identity(2)})


def tags() -> FakeModel:
    """Multilabel: the logits are the three features, with a threshold for each label."""
    output = {"kind": "logits", "labels": ["a", "b", "c"], "thresholds": [0.5, 0.5, 0.9]}
    return FakeModel("tags", "multilabel", fakes.tabular("a", "b", "c"), output, {"onnx": _identity(3)})


def forecast() -> FakeModel:
    """Interval: x, x - 1 and x + 1, from three outputs of the graph."""
    nodes = [
        helper.make_node("Identity", ["inputs"], ["middle"]),
        helper.make_node("Sub", ["inputs", "one"], ["low"]),
        helper.make_node("Add", ["inputs", "one"], ["high"]),
    ]
    outputs: Shapes = {name: ("FP32", ["N", 1]) for name in ("low", "middle", "high")}
    content = build_graph(nodes, {"inputs": ("FP32", ["N", 1])}, outputs, {"one": np.array([1], np.float32)})
    output = {"kind": "interval", "level": 0.8, "unit": "°C", "tensors": ["middle", "low", "high"]}
    return FakeModel("forecast", "regression", fakes.tabular("x"), output, {"onnx": content})


def embedder() -> FakeModel:
    """Embedding: the four features themselves."""
    output = {"kind": "vector", "width": 4}
    return FakeModel("embedder", "embedding", fakes.tabular(*"abcd"), output, {"onnx": _identity(4)})


def detector() -> FakeModel:
    """Named outputs: two boxes of two numbers, the sum as a whole number, and whether it is positive."""
    nodes = [
        helper.make_node("Reshape", ["inputs", "shape"], ["boxes"]),
        helper.make_node("ReduceSum", ["inputs", "axis"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["total"], to=TensorProto.INT64),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("Cast", ["total"], ["text"], to=TensorProto.STRING),
    ]
    outputs: Shapes = {
        "boxes": ("FP32", ["N", 2, 2]), "total": ("INT64", ["N"]), "positive": ("BOOL", ["N"]), "text": ("BYTES", ["N"])
    }  # fmt: skip
    weights = {"shape": np.array([-1, 2, 2]), "axis": np.array([1]), "zero": np.array(0, np.float32)}
    content = build_graph(nodes, {"inputs": ("FP32", ["N", 4])}, outputs, weights)
    named = [
        {"name": "corners", "tensor": "boxes", "shape": [2, 2], "unit": "px"},
        {"name": "total", "datatype": "INT64"},
        {"name": "positive", "datatype": "BOOL"},
        {"name": "text", "datatype": "BYTES"},
    ]
    output = {"kind": "tensors", "outputs": named}
    return FakeModel("detector", "outputs", fakes.tabular(*"abcd"), output, {"onnx": content})


OTHERS = (spam, box, tags, forecast, embedder, detector)


def write_all(root: Path) -> None:
    """Write every model of this module."""
    write_house(root)
    for build in OTHERS:
        fakes.write_version(root, build())


def load(build: Any, root: Path) -> Predictor:
    """Write a model and load it."""
    return load_predictor(fakes.write_version(root, build()))
