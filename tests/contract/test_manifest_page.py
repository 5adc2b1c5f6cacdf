"""docs/manifest.md: each of its examples serves as it stands there, and it has every field."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.model import manifest
from service.model.manifest import digest
from service.model.manifest.parts import find_dtype
from tests import columns
from tests.columns import Shapes
from tests.servers import ROOT, Server

PAGE = (ROOT / "docs/manifest.md").read_text()
EXAMPLES = {
    fields["name"]: fields for fields in map(json.loads, re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S))
}
OTHERS = ("price", "spam", "forecast", "topics", "faces", "detector")  # with columns, or another kind of output
ACTIVATIONS = {"value": "Identity", "probability": "Sigmoid", "probabilities": "Softmax", "logits": "Identity"}
PARTS = (
    manifest.Manifest,
    manifest.TensorManifest,
    manifest.TabularInput,
    manifest.ImageInput,
    manifest.ColumnsInput,
    manifest.Feature,
    manifest.Column,
    manifest.OutputValue,
    manifest.NamedOutput,
    manifest.ImageSpec,
    manifest.Output,
    manifest.Artifact,
    manifest.Golden,
    manifest.Training,
    manifest.TensorSpec,
)


def build_zeros(described: manifest.Manifest) -> bytes:
    """Return a graph with the inputs and outputs that a manifest describes, which gives zeros."""
    spec, output = described.input, described.output
    inputs: Shapes = {"inputs": ("FP32", ["N", *spec.shape])}
    if isinstance(spec, manifest.ColumnsInput):
        inputs = {each.name: (each.datatype, ["N", len(each.columns)]) for each in spec.tensors}
    outputs: Shapes = {each.tensor or each.name: (each.datatype, ["N", *each.shape]) for each in output.outputs}
    if output.tensors:
        outputs = {name: ("FP32", ["N", 1]) for name in output.tensors}
    outputs = outputs or {"outputs": ("FP32", ["N", described.output_width])}
    nodes = [
        helper.make_node("Shape", [next(iter(inputs))], ["sizes"]),
        helper.make_node("Slice", ["sizes", "zero", "one"], ["count"]),
    ]
    weights: dict[str, Any] = {"zero": np.array([0]), "one": np.array([1])}
    for name, (datatype, shape) in outputs.items():
        weights[f"{name}_rest"] = np.array(shape[1:], np.int64)
        weights[f"{name}_zero"] = np.zeros((), find_dtype(datatype))  # type: ignore[arg-type]
        nodes.append(helper.make_node("Concat", ["count", f"{name}_rest"], [f"{name}_shape"], axis=0))
        nodes.append(helper.make_node("Expand", [f"{name}_zero", f"{name}_shape"], [name]))
    return columns.build_graph(nodes, inputs, outputs, weights)


def build_graph(fields: dict[str, Any]) -> bytes:
    """Return a graph with the tensors that a manifest describes; its weights are zeros."""
    if fields["name"] in OTHERS:
        artifact = {"file": "model.onnx", "sha256": "0" * 64, "bytes": 1}
        return build_zeros(
            manifest.Manifest.model_validate_json(json.dumps(fields | {"artifacts": {"onnx": artifact}}))
        )
    if fields["task"] == "tensors":
        nodes = [helper.make_node("Add", [spec["name"] for spec in fields["inputs"]], [fields["outputs"][0]["name"]])]
        shapes = [(spec["name"], ["batch", *spec["shape"][1:]]) for spec in (*fields["inputs"], *fields["outputs"])]
        weights = []
    else:
        shape, wide = fields["input"]["shape"], int(np.prod(fields["input"]["shape"]))
        out = len(fields["output"].get("labels", "1")) if fields["task"] == "multiclass" else 1
        nodes = [
            helper.make_node("Flatten", ["inputs"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "weights"], ["raw"]),
            helper.make_node(ACTIVATIONS[fields["output"]["kind"]], ["raw"], ["outputs"]),
        ]
        shapes = [("inputs", ["batch", *shape]), ("outputs", ["batch", out])]
        weights = [numpy_helper.from_array(np.zeros((wide, out), np.float32), "weights")]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes]
    graph = helper.make_graph(nodes, "example", tensors[:-1], tensors[-1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a folder that was written by hand, as the page says."""
    root: Path = tmp_path_factory.mktemp("by-hand") / "models"
    for name, fields in EXAMPLES.items():
        folder = root / name / str(fields["version"])
        folder.mkdir(parents=True)
        content = build_graph(fields)
        (folder / "model.onnx").write_bytes(content)
        about = {"sha256": digest(content), "bytes": len(content)}
        artifacts = {"artifacts": {"onnx": fields["artifacts"]["onnx"] | about}}
        (folder / "manifest.json").write_text(json.dumps(fields | artifacts))
    with Server(root, "--workers", "1") as server:
        yield server


def test_every_example_serves(written: Server) -> None:
    """All are ready; those with a task answer instances, the one without answers tensors."""
    assert written.get("/health/ready").status_code == 200, written.log()
    assert {fields["task"] for fields in EXAMPLES.values()} == {*get_args(manifest.Task), "tensors"}
    home = {"area": 60, "garden": True, "city": "Oslo"}
    assert written.predict("price", [home]).json()["predictions"] == [{"prediction": {"rent": 0.0, "price": 0.0}}]
    assert written.predict("topics", [{"text": "goal"}]).json()["predictions"][0]["labels"] == []
    assert written.predict("forecast", [[1]]).json()["predictions"] == [{"prediction": 0.0, "interval": [0.0, 0.0]}]
    picture = [[0.0] * 192]
    assert written.predict("faces", picture).json()["predictions"] == [{"embedding": [0.0] * 16}]
    found = written.predict("detector", picture).json()["predictions"][0]["outputs"]
    assert found == {"boxes": [[0.0] * 4] * 10, "classes": [0] * 10}
    assert written.predict("rent", [{"rooms": 2, "area": 60}]).json()["predictions"] == [{"prediction": 0.0}]
    exam = written.predict("exam", [[3]]).json()["predictions"][0]
    assert (exam["label"], exam["probability"]) == ("fail", 0.5)
    shapes = written.predict("shapes", [[0.0] * 32 * 32]).json()["predictions"][0]
    assert shapes["probabilities"] == pytest.approx([1 / 3] * 3)
    tensors = [
        {"name": name, "datatype": "FP32", "shape": [1, 3], "data": data}
        for name, data in (("a", [1, 2, 3]), ("b", [1] * 3))
    ]
    assert written.post("/v2/models/sum/infer", json={"inputs": tensors}).json()["outputs"][0]["data"] == [2, 3, 4]


@pytest.mark.parametrize("part", PARTS)
def test_every_field_is_explained(part: Any) -> None:
    """Each field of each part of a manifest stands on the page, as code."""
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S)
    words = {word for code in re.findall(r"`([^`]+)`", prose) for word in code.split(".")} | {"inputs", "outputs"}
    assert set(part.model_fields) <= words
