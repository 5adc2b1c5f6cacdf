"""Small models with known outputs, as real artifacts for both backends, and models that are broken in various ways.

Each is a manifest and the bytes of its artifacts; `write_version` writes it to a models folder.
"""

import io
import json
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.model.manifest import BackendName, Manifest, digest

FILES: dict[BackendName, str] = {
    "onnx": "model.onnx",
    "torchscript": "model.pt",
    "torch-export": "model.pt2",
    "onnx-int8": "model.int8.onnx",
}
ACTIVATIONS = {"": torch.nn.Identity(), "Sigmoid": torch.nn.Sigmoid(), "Softmax": torch.nn.Softmax(dim=1)}
Weights = NDArray[np.float32]
HEAVY_BYTES = 20 * 2**20  # of weights: too many for a copy in every worker


@dataclass(frozen=True)
class FakeModel:
    """The fields of a manifest, except its artifacts, and the artifacts' bytes."""

    name: str
    task: str
    input: dict[str, Any]
    output: dict[str, Any]
    contents: dict[BackendName, bytes]
    version: int = 1
    more: dict[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Return the manifest as a dict, ready to be written as JSON."""
        artifacts = {
            name: {"file": FILES[name], "sha256": digest(content), "bytes": len(content)}
            for name, content in self.contents.items()
        }
        own = {"schema_version": 1, "name": self.name, "version": self.version, "task": self.task}
        return own | {"input": self.input, "output": self.output, "artifacts": artifacts} | self.more

    def manifest(self) -> Manifest:
        """Return the validated manifest."""
        return Manifest.model_validate_json(json.dumps(self.fields()))

    def only(self, *backends: BackendName) -> "FakeModel":
        """Return the model with only the given artifacts."""
        return replace(self, contents={name: self.contents[name] for name in backends})


def write_version(root: Path, fake: FakeModel) -> Path:
    """Write a model into a models folder and return the version's folder."""
    folder = root / fake.name / str(fake.version)
    folder.mkdir(parents=True)
    for name, content in fake.contents.items():
        (folder / FILES[name]).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(fake.fields()))
    return folder


def build_onnx(
    *nodes: onnx.NodeProto, weights: dict[str, Weights] | None = None, wide: int | list[int], out: int
) -> bytes:
    """Build a graph from `inputs`, float32 (batch, wide), to `outputs`, float32 (batch, out)."""
    shape = [wide] if isinstance(wide, int) else wide
    graph = helper.make_graph(
        list(nodes),
        "fake",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["batch", out])],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def build_torchscript(module: torch.nn.Module, example: torch.Tensor) -> bytes:
    """Trace a module and return its archive."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*")  # deprecated, but the service reads this format
        traced = torch.jit.trace(module.eval(), example, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, buffer)
    return buffer.getvalue()


def build_program(module: torch.nn.Module, example: torch.Tensor) -> bytes:
    """Export a module with a dynamic batch and return the archive of its program."""
    buffer = io.BytesIO()
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(module.eval(), (example,), dynamic_shapes=shapes), buffer)
    return buffer.getvalue()


def build_affine(weights: Weights, bias: Weights, activation: str = "") -> dict[BackendName, bytes]:
    """Build both artifacts of `activation(inputs @ weights + bias)`, with weights (wide, out) and bias (out,)."""
    wide, out = weights.shape
    last = "outputs" if not activation else "logits"
    nodes = [helper.make_node("Gemm", ["inputs", "weights", "bias"], [last])]
    if activation:
        nodes.append(helper.make_node(activation, [last], ["outputs"]))
    layer = torch.nn.Linear(wide, out)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights.T.copy()))
        layer.bias.copy_(torch.from_numpy(bias))
    net = torch.nn.Sequential(layer, ACTIVATIONS[activation])
    return {
        "onnx": build_onnx(*nodes, weights={"weights": weights, "bias": bias}, wide=wide, out=out),
        "torchscript": build_torchscript(net, torch.zeros(2, wide)),
    }


def tabular(*names: str) -> dict[str, Any]:
    """Return the manifest input of a tabular model."""
    return {"kind": "tabular", "shape": [len(names)], "features": [{"name": name} for name in names]}


def doubler(version: int = 1, factor: float = 2.0) -> FakeModel:
    """Regression on one feature: y = factor * x."""
    contents = build_affine(np.array([[factor]], np.float32), np.zeros(1, np.float32))
    x = {"name": "x", "unit": "m", "description": "a length", "minimum": -10, "maximum": 10}
    return FakeModel(
        "doubler",
        "regression",
        {"kind": "tabular", "shape": [1], "features": [x]},
        {"kind": "value", "name": "y", "unit": "m"},
        contents,
        version,
        {
            "title": "Twice as long",
            "metrics": {"mse": 0.0},
            "golden": {"inputs": [[0.0], [1.5]], "outputs": [[0.0], [1.5 * factor]]},
        },
    )


def coin() -> FakeModel:
    """Binary on two features; the graph outputs P(heads) = sigmoid(a - b), with threshold 0.7."""
    contents = build_affine(np.array([[1], [-1]], np.float32), np.zeros(1, np.float32), "Sigmoid")
    output = {"kind": "probability", "labels": ["tails", "heads"], "threshold": 0.7}
    return FakeModel("coin", "binary", tabular("a", "b"), output, contents)


def switch() -> FakeModel:
    """Binary on one feature; the graph outputs the logit 10 * x."""
    contents = build_affine(np.array([[10]], np.float32), np.zeros(1, np.float32))
    return FakeModel("switch", "binary", tabular("x"), {"kind": "logits", "labels": ["off", "on"]}, contents)


COMPASS_WEIGHTS = np.array([[0, 1, 0, -1], [1, 0, -1, 0]], np.float32)


def compass() -> FakeModel:
    """Multiclass on two features; the graph outputs the logits (y, x, -y, -x)."""
    contents = build_affine(COMPASS_WEIGHTS, np.zeros(4, np.float32))
    output = {"kind": "logits", "labels": ["north", "east", "south", "west"]}
    return FakeModel("compass", "multiclass", tabular("x", "y"), output, contents)


def canvas() -> FakeModel:
    """Multiclass on 28×28 images, with seeded random weights and a softmax in the graph."""
    weights = np.random.default_rng(7).normal(0, 0.1, (784, 10)).astype(np.float32)
    contents = build_affine(weights, np.zeros(10, np.float32), "Softmax")
    picture = {"kind": "image", "shape": [784], "image": {"width": 28, "height": 28, "fitting": "mnist"}}
    output = {"kind": "probabilities", "labels": [str(digit) for digit in range(10)]}
    return FakeModel("canvas", "multiclass", picture, output, contents)


def traffic_light() -> FakeModel:
    """Multiclass on 8×6 colour images, channels first; the logits are the mean red, green and blue. ONNX only."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["inputs"], ["means"]),
        helper.make_node("Flatten", ["means"], ["outputs"]),
    ]
    content = build_onnx(*nodes, wide=[3, 6, 8], out=3)
    picture = {"kind": "image", "shape": [3, 6, 8], "image": {"width": 8, "height": 6, "channels": 3}}
    output = {"kind": "logits", "labels": ["red", "green", "blue"]}
    return FakeModel("traffic-light", "multiclass", picture, output, {"onnx": content})


def unary(operator: str, name: str) -> FakeModel:
    """ONNX-only regression that applies one operator, such as Log, which is not finite at zero."""
    content = build_onnx(helper.make_node(operator, ["inputs"], ["outputs"]), wide=1, out=1)
    return FakeModel(name, "regression", tabular("x"), {"kind": "value"}, {"onnx": content})


def logarithm() -> FakeModel:
    """Regression that is finite only for positive numbers; at zero, the warm-up input, it is -inf."""
    return unary("Log", "logarithm")


def picky() -> FakeModel:
    """Regression whose graph fails at run time: it reshapes to (3, 7)."""
    node = helper.make_node("Reshape", ["inputs", "shape"], ["outputs"])
    shape = np.array([3, 7], np.int64)
    content = build_onnx(node, weights={"shape": shape}, wide=1, out=1)  # type: ignore[dict-item]
    return FakeModel("picky", "regression", tabular("x"), {"kind": "value"}, {"onnx": content})


def liar() -> FakeModel:
    """Regression whose golden output does not match its graph."""
    more = {"golden": {"inputs": [[1.0]], "outputs": [[3.0]]}}
    return replace(doubler().only("onnx"), name="liar", more=more)


def shapeshifter() -> FakeModel:
    """Regression whose graph outputs two columns."""
    contents = build_affine(np.ones((1, 2), np.float32), np.zeros(2, np.float32))
    return FakeModel("shapeshifter", "regression", tabular("x"), {"kind": "value"}, contents)


def heavy(name: str = "heavy") -> FakeModel:
    """Regression y = 2 * x with weights that are large and of no use."""
    wide = HEAVY_BYTES // 4
    nodes = [
        helper.make_node("MatMul", ["inputs", "factor"], ["doubled"]),
        helper.make_node("ReduceSum", ["ballast"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["doubled", "nothing"], ["outputs"]),
    ]
    weights = {
        "factor": np.array([[2]], np.float32),
        "zero": np.array(0, np.float32),
        "ballast": np.random.default_rng(0).random(wide, dtype=np.float32),
    }
    content = build_onnx(*nodes, weights=weights, wide=1, out=1)
    return FakeModel(name, "regression", tabular("x"), {"kind": "value"}, {"onnx": content})


GOOD = (doubler, coin, switch, compass, canvas)


TYPES = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip


def write_signature(
    root: Path, name: str, inputs: dict[str, Any], outputs: dict[str, Any], *nodes: onnx.NodeProto
) -> None:
    """Write a model without a task. Inputs and outputs are {name: (datatype, shape)}; -1 is a dynamic dimension."""

    def describe(tensors: dict[str, Any]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                key, TYPES[datatype], [f"{key}{at}" if size < 0 else size for at, size in enumerate(shape)]
            )
            for key, (datatype, shape) in tensors.items()
        ]

    graph = helper.make_graph(list(nodes), name, describe(inputs), describe(outputs))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    content = model.SerializeToString()
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(content)
    manifest = {
        "name": name,
        "version": 1,
        "task": "tensors",
        "inputs": [{"name": key, "datatype": each[0], "shape": each[1]} for key, each in inputs.items()],
        "outputs": [{"name": key, "datatype": each[0], "shape": each[1]} for key, each in outputs.items()],
        "artifacts": {"onnx": {"file": "model.onnx", "sha256": digest(content), "bytes": len(content)}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
