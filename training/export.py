"""Export a net to the bytes of one TorchScript file and one ONNX file.

Equal nets give equal bytes, whatever was exported before in the same process. Both exporters embed the paths and lines
of the Python source that they traced; these are removed.
"""

import io
import re
import warnings
import zipfile

import onnx
import torch
from torch import nn

from service.model.manifest import BackendName
from training.errors import CheckError

ARTIFACT_FILES: dict[BackendName, str] = {"onnx": "model.onnx", "torchscript": "model.pt"}
INPUT_TENSOR, OUTPUT_TENSOR = "inputs", "outputs"
_ALIGNMENT = 64  # bytes; PyTorch aligns tensors in its archives for memory mapping
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name
_EXTRA_HEADER = 4  # bytes of a zip extra field before its content


def export(net: nn.Module, shape: tuple[int, ...], torchscript: bool = True) -> dict[BackendName, bytes]:
    """Return the artifacts of a serving net, by backend.

    Args:
        net: on the CPU, float32 (N, *shape) -> float32 (N, K); its graph must not depend on N.
        shape: of one instance.
        torchscript: whether to make that as well; a model with columns is ONNX only.
    """
    net.eval()
    contents: dict[BackendName, bytes] = {"onnx": export_onnx(net, shape)}
    return contents | {"torchscript": export_torchscript(net, shape)} if torchscript else contents


def export_onnx(net: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Return a single-file ONNX graph with input "inputs", output "outputs" and a dynamic batch.

    Raises:
        CheckError: the exported graph is not valid ONNX or keeps its weights elsewhere.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            net,
            (torch.zeros(2, *shape),),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=[INPUT_TENSOR],
            output_names=[OUTPUT_TENSOR],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    if program is None:
        raise CheckError("the ONNX exporter returned no graph")
    model = program.model_proto
    strip(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckError(f"the exported graph is not valid ONNX: {error}") from error
    if any(weights.data_location == onnx.TensorProto.EXTERNAL for weights in model.graph.initializer):
        raise CheckError("the exported ONNX graph keeps weights outside its file")
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def strip(model: onnx.ModelProto) -> None:
    """Remove the stack traces and module names that the exporter adds to every node and value."""
    graph = model.graph
    del model.metadata_props[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")


def export_torchscript(net: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Return a TorchScript archive: traced, frozen into one class, and without the paths of this machine."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*")  # deprecated, but it works and is required here
        with torch.no_grad():
            traced = torch.jit.trace(net, torch.zeros(2, *shape), check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), buffer)
    return _clean(buffer)


def _clean(archive: io.BytesIO) -> bytes:
    """Rewrite a TorchScript archive without source locations, build counters and times.

    `*.debug_pkl` contains file names and lines, `.data/` a digest of them, `traced_inputs` the example.
    `___torch_mangle_7` counts the classes exported before in this process; the frozen graph is one class and needs no
    number.
    """
    cleaned = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(cleaned, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            if name.endswith(".debug_pkl") or "/.data/" in name or "/traced_inputs" in name:
                continue
            content = source.read(name)
            if name.endswith((".py", ".pkl")):
                content = re.sub(rb"\.___torch_mangle_\d+", b"", content)
            entry = zipfile.ZipInfo(re.sub(r"/___torch_mangle_\d+", "", name))  # its time is 1980-01-01
            start = cleaned.tell() + _LOCAL_HEADER + len(entry.filename.encode()) + _EXTRA_HEADER
            padding = -start % _ALIGNMENT
            entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            target.writestr(entry, content)
    return cleaned.getvalue()
