"""The models of `benchmarks.gpu` beside the published ones, each as ONNX and as TorchScript, with random weights.

ResNet-50, an encoder of BERT-base's size whose words come as numbers, `lookup`, whose kernel fails an assertion on a
GPU when it is asked for a row that it does not have, and `hungry`, which asks for as much memory as it is told.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from benchmarks.gpu_steps import build_inputs
from benchmarks.medium_models import LABELS, LENGTH, SIDE, WIDTH, build_net
from service.model.manifest import (
    Artifact,
    Feature,
    Golden,
    ImageInput,
    ImageSpec,
    Manifest,
    Output,
    TabularInput,
    digest,
)
from service.model.version_folder import MANIFEST_FILE

FILES = {"onnx": "model.onnx", "torchscript": "model.pt"}
OPSET = 18
MIB_OF_FLOATS = 2**18


class Words(nn.Module):
    """A net over int64 words that takes them as float32."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, rows: Tensor) -> Tensor:
        """Map float32 (N, 128) to float32 (N, 768)."""
        encoded: Tensor = self.net(rows.long())
        return encoded


class Lookup(nn.Module):
    """y = 2·x for x in 0, 1, ..., 7; on a GPU any other x fails an assertion in a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(2 * torch.arange(8.0)[:, None])

    def forward(self, rows: Tensor) -> Tensor:
        """Map float32 (N, 1) to float32 (N, 1)."""
        return torch.nn.functional.embedding(rows[:, 0].long(), self.table)


class Hungry(nn.Module):
    """y = 2·x, by way of as many MiB as the largest x of the batch."""

    def forward(self, rows: Tensor) -> Tensor:
        """Map float32 (N, 1) to float32 (N, 1)."""
        count = int(rows.max().item()) * 262144
        return 2 * rows + 0 * torch.ones(count, device=rows.device).sum()


def write_medium(root: Path, name: str) -> None:
    """Write a model in `MEDIUM` as version 1, unless it is there."""
    folder = root / name / "1"
    if (folder / MANIFEST_FILE).exists():
        return
    torch.backends.mha.set_fastpath_enabled(False)  # its fused layers have no ONNX
    net = build_net("resnet50") if name == "resnet50" else Words(build_net("bert-base"))
    example = torch.from_numpy(build_inputs(name, 2))
    contents = {"onnx": _export_onnx(net, example), "torchscript": _export_torchscript(net, example)}
    about: dict[str, Any]
    if name == "resnet50":
        image = ImageSpec(width=SIDE, height=SIDE, channels=3, polarity="as-is", fitting="stretch")
        about = {"input": ImageInput(kind="image", shape=(3, SIDE, SIDE), image=image)}
        labels = tuple(f"label {number}" for number in range(LABELS))
    else:
        about = {"input": _describe_columns(LENGTH), "golden": _sample(net, example)}
        labels = tuple(f"direction {number}" for number in range(WIDTH))
    output = Output(kind="logits", labels=labels, tensor="outputs")
    _write(folder, name, contents, task="multiclass", output=output, **about)


def write_lookup(root: Path) -> None:
    """Write `lookup`: TorchScript alone, since onnxruntime's gather asserts nothing on a GPU."""
    net = Lookup().eval()
    example = torch.tensor([[1.0], [3.0]])
    _write_regression(root, "lookup", {"torchscript": _script(net)}, net, example)


def write_hungry(root: Path) -> None:
    """Write `hungry`."""
    net = Hungry().eval()
    nodes = [
        helper.make_node("ReduceMax", ["inputs"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Mul", ["whole", "each"], ["count"]),
        helper.make_node("ConstantOfShape", ["count"], ["ones"], value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("ReduceSum", ["ones"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Mul", ["inputs", "two"], ["doubled"]),
        helper.make_node("Add", ["doubled", "nothing"], ["outputs"]),
    ]
    constants = {"each": np.array([MIB_OF_FLOATS]), "zero": np.float32(0), "two": np.float32(2)}
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", 1]) for end in ("inputs", "outputs")]
    initializers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, "hungry", ends[:1], ends[1:], initializers)
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10).SerializeToString()
    onnx.checker.check_model(content)
    contents = {"onnx": content, "torchscript": _script(net)}
    _write_regression(root, "hungry", contents, net, torch.tensor([[1.0], [0.5]]))


def _write_regression(root: Path, name: str, contents: dict[str, bytes], net: nn.Module, example: Tensor) -> None:
    golden = _sample(net, example)
    output = Output(kind="value", tensor="outputs")
    _write(
        root / name / "1", name, contents, task="regression", input=_describe_columns(1), output=output, golden=golden
    )


def _write(folder: Path, name: str, contents: dict[str, bytes], **about: Any) -> None:  # noqa: ANN401 - of a manifest
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = {}
    for backend, content in contents.items():
        (folder / FILES[backend]).write_bytes(content)
        artifacts[backend] = Artifact(file=FILES[backend], sha256=digest(content), bytes=len(content))
    manifest = Manifest.model_validate({"name": name, "version": 1, "title": name, "artifacts": artifacts} | about)
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(exclude_none=True))


def _describe_columns(count: int) -> TabularInput:
    features = tuple(Feature(name=f"x{number}") for number in range(count))
    return TabularInput(kind="tabular", shape=(count,), features=features, tensor="inputs")


def _sample(net: nn.Module, example: Tensor) -> Golden:
    with torch.inference_mode():
        outputs = net(example)
    return Golden(inputs=tuple(map(tuple, example.tolist())), outputs=tuple(map(tuple, outputs.tolist())))


def _export_onnx(net: nn.Module, example: Tensor) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            external_data=False,
            verbose=False,
            opset_version=OPSET,
            input_names=["inputs"],
            output_names=["outputs"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _export_torchscript(net: nn.Module, example: Tensor) -> bytes:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return _save(torch.jit.trace(net, example, check_trace=False))  # type: ignore[no-untyped-call]


def _script(net: nn.Module) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _save(torch.jit.script(net))


def _save(module: Any) -> bytes:  # noqa: ANN401 - a ScriptModule
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()
