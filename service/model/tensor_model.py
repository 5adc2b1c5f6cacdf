"""Models without a task: named tensors of any datatype in and out.

They are served only through the Open Inference Protocol. They run on onnxruntime and are not batched, because the
manifest does not say which dimension is the batch.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.errors import InferenceError, InvalidRequestError, ModelRefusedError
from service.model.backends.onnx_runtime import describe_failure, open_session
from service.model.cost import Cost, time_calls
from service.model.manifest import BackendName, TensorManifest, TensorSpec

Tensor = NDArray[Any]

_FAILED_NODE = re.compile(r"Non-zero status code returned while running (\w+) node")
_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


class Tensors(dict[str, Tensor]):
    """The tensors of one request by name. Its length is 1 because queues count it as one instance."""

    def __len__(self) -> int:
        """Return 1."""
        return 1

    @property
    def nbytes(self) -> int:
        """Total size in memory in bytes; each BYTES element is an object."""
        elements = (tensor.flat for tensor in self.values() if tensor.dtype == object)
        return sum(tensor.nbytes for tensor in self.values()) + sum(sum(map(sys.getsizeof, each)) for each in elements)


@dataclass(frozen=True)
class TensorBackend:
    """An onnxruntime session with the attributes of `service.model.backends.Backend`."""

    session: ort.InferenceSession
    device: str
    provider: str
    name: BackendName = "onnx"


@dataclass(frozen=True)
class TensorPredictor:
    """One loaded version of a model without a task."""

    manifest: TensorManifest
    backend: TensorBackend

    def predict(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run the graph on validated inputs. Elements of BYTES tensors are `bytes` in inputs and outputs.

        Raises:
            InvalidRequestError: A BYTES element is not UTF-8, or the graph rejects this combination of tensors.
            InferenceError: The graph failed for another reason.
        """
        fed = {name: as_text(tensor, name) for name, tensor in inputs.items()}
        names = [spec.name for spec in self.manifest.outputs]
        try:
            outputs = self.backend.session.run(names, fed)
            return Tensors((name, as_bytes(np.asarray(output))) for name, output in zip(names, outputs, strict=True))
        except Exception as error:
            node = _FAILED_NODE.search(str(error))
            # Such as mismatched sizes, which only the graph can detect.
            if node and not re.search("allocate|bad_alloc|out of memory|CU[A-Z_]+ failure", str(error)):
                reason = f"the graph does not take these tensors together; its {node[1]} node refuses them"
                raise InvalidRequestError(reason) from error
            raise describe_failure(error, self.backend.device) from error

    def measure_cost(self, max_rows: int) -> Cost:
        """Time a call on zeros with every open dimension set to 1; a graph that fails on them counts as slow."""
        del max_rows  # requests never share a call
        zeros = Tensors((spec.name, _zeros(spec)) for spec in self.manifest.inputs)
        try:
            seconds, _ = time_calls(self.predict, zeros)
        except (InferenceError, InvalidRequestError):
            seconds = 1.0
        return Cost(fixed=0.0, each=seconds, batch=1)


def open_tensor_model(
    content: bytes, manifest: TensorManifest, device: str, threads: int, tf32: bool = False
) -> TensorPredictor:
    """Open an ONNX graph and check its tensors against the manifest.

    Raises:
        ModelRefusedError: The graph does not load, or its tensors do not match the manifest.
        StartError: The graph cannot run on the device.
    """
    session = open_session(content, device, threads, tf32)
    inputs, outputs = read_tensor_specs(session)
    for kind, said, found in (("input", manifest.inputs, inputs), ("output", manifest.outputs, outputs)):
        by_name = {spec.name: spec for spec in found}
        for spec in said:
            have = by_name.get(spec.name)
            if have is None or have.datatype != spec.datatype or len(have.shape) != len(spec.shape):
                raise ModelRefusedError(f"the graph has no {kind} {spec.name} of {spec.datatype} {list(spec.shape)}")
    if {spec.name for spec in manifest.inputs} != {spec.name for spec in inputs}:
        raise ModelRefusedError(f"the graph's inputs are {', '.join(spec.name for spec in inputs)}")
    provider = session.get_providers()[0] + (" with TF32" if tf32 and device.startswith("cuda") else "")
    return TensorPredictor(manifest, TensorBackend(session, device, provider))


def read_tensor_specs(session: ort.InferenceSession) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the inputs and outputs of a session's graph. Dynamic dimensions are -1.

    Raises:
        ModelRefusedError: The protocol has no datatype for a tensor's type.
    """
    return [_spec(node) for node in session.get_inputs()], [_spec(node) for node in session.get_outputs()]


def _spec(node: Any) -> TensorSpec:  # noqa: ANN401 - onnxruntime's NodeArg
    if node.type not in _DATATYPES:
        raise ModelRefusedError(f"the graph's {node.name} is {node.type}, which the protocol has no datatype for")
    shape = tuple(size if isinstance(size, int) and size > 0 else -1 for size in node.shape)
    return TensorSpec(name=node.name, datatype=_DATATYPES[node.type], shape=shape)  # type: ignore[arg-type]


def _zeros(spec: TensorSpec) -> Tensor:
    shape = tuple(max(size, 1) for size in spec.shape)
    if spec.datatype == "BYTES":
        return np.full(shape, b"", dtype=object)
    names = {"FP16": "float16", "FP32": "float32", "FP64": "float64", "BOOL": "bool"}
    return np.zeros(shape, names.get(spec.datatype, spec.datatype.lower()))


def as_text(tensor: Tensor, name: str) -> Tensor:
    """Decode a BYTES tensor, since onnxruntime takes strings as text; return any other as it is.

    Raises:
        InvalidRequestError: An element is not UTF-8.
    """
    if tensor.dtype != object:
        return tensor
    text = np.empty(tensor.shape, dtype=object)
    try:
        text.reshape(-1)[:] = [element.decode() for element in tensor.reshape(-1)]
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"input {name!r} has BYTES that are not UTF-8 text; the graph takes text") from error
    return text


def as_bytes(tensor: Tensor) -> Tensor:
    """Encode a tensor of text as one of BYTES; return any other as it is."""
    if tensor.dtype.kind not in "OU":
        return tensor
    content = np.empty(tensor.shape, dtype=object)
    content.reshape(-1)[:] = [str(element).encode() for element in tensor.reshape(-1)]
    return content
