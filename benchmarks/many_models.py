"""The models of `--cases many`: small nets with random weights, made here and kept in a cache folder."""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.clients import build_request
from benchmarks.contenders import JSON
from benchmarks.medium_models import open_cache
from service.model.manifest import Artifact, Feature, Golden, Manifest, Output, TabularInput, digest
from service.model.version_folder import MANIFEST_FILE

FEATURES, LABELS = 4, 3
SMALLEST, LARGEST = 10_000, 2_000_000  # bytes of weights; their logarithm is uniform


@dataclass(frozen=True)
class Small:
    """One net, as a client sees it: the bytes of a request, and the probabilities that must be the answer."""

    request: bytes
    expected: NDArray[np.float32]


def open_folder(count: int) -> tuple[Path, list[Small]]:
    """Return a models folder in the cache, and its models; what is not there is made."""
    root = open_cache() / f"many-{count}"
    return root, [_open_model(root, number, count) for number in range(count)]


def _open_model(root: Path, number: int, count: int) -> Small:
    name = f"net-{number:04d}"
    folder = root / name / "1"
    if not (folder / MANIFEST_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        weights = SMALLEST * (LARGEST / SMALLEST) ** (number / max(1, count - 1))
        content = build_net(round(math.sqrt(weights / 4)), number)
        (folder / "model.onnx").write_bytes(content)
        (folder / MANIFEST_FILE).write_text(_describe(name, content, number).model_dump_json(exclude_none=True))
    golden = json.loads((folder / MANIFEST_FILE).read_bytes())["golden"]
    body = json.dumps({"instances": golden["inputs"][:1]}).encode()
    logits = np.array(golden["outputs"][0], np.float32)
    exponents = np.exp(logits - logits.max())
    return Small(build_request(f"/v1/models/{name}:predict", body, JSON), exponents / exponents.sum())


def build_net(hidden: int, seed: int) -> bytes:
    """Return a graph of two hidden layers of the same width, with random weights."""
    random = np.random.default_rng(seed)
    widths = [FEATURES, hidden, hidden, LABELS]
    weights, nodes, previous = {}, [], "inputs"
    for layer, (wide, out) in enumerate(pairwise(widths)):
        weights[f"w{layer}"] = random.normal(0, 1 / math.sqrt(wide), (wide, out)).astype(np.float32)
        last = "outputs" if layer == len(widths) - 2 else f"sum{layer}"
        nodes.append(helper.make_node("Gemm", [previous, f"w{layer}"], [last]))
        if last != "outputs":
            nodes.append(helper.make_node("Relu", [last], [previous := f"hidden{layer}"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["batch", LABELS])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def _describe(name: str, content: bytes, seed: int) -> Manifest:
    inputs = np.random.default_rng(seed).random((2, FEATURES), dtype=np.float32)
    outputs = ort.InferenceSession(content).run(None, {"inputs": inputs})[0]
    return Manifest(
        name=name,
        version=1,
        task="multiclass",
        input=TabularInput(
            kind="tabular",
            shape=(FEATURES,),
            features=tuple(Feature(name=f"x{index}") for index in range(FEATURES)),
        ),
        output=Output(kind="logits", labels=tuple(f"label {index}" for index in range(LABELS))),
        artifacts={"onnx": Artifact(file="model.onnx", sha256=digest(content), bytes=len(content))},
        golden=Golden(inputs=tuple(map(tuple, inputs.tolist())), outputs=tuple(map(tuple, outputs.tolist()))),
    )
