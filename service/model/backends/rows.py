"""Run ONNX graphs with several inputs or outputs: rows of columns in, rows of named outputs or float32 (N, K) out."""

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.errors import InferenceError, ModelRefusedError
from service.model.backends import as_rows
from service.model.backends.onnx_runtime import choose_input, describe_failure, open_session
from service.model.columns import join_tensors
from service.model.manifest import BackendName, ColumnsInput, Datatype, Manifest

_TYPES: dict[Datatype, str] = {"FP16": "float16", "FP32": "float", "FP64": "double", "BYTES": "string"}
_FLOATS = ("tensor(float)", "tensor(double)")


class RowsBackend:
    """An onnxruntime session whose inputs or outputs are rows; see `service.model.columns`.

    Args:
        session: Runs the graph.
        inputs: The rank that the graph has for each field of the rows, by the name of its tensor; or, for a graph that
            takes an array, the name of its input alone.
        outputs: The names of the graph's outputs.
        fields: The dtype of rows of these outputs, if they are not put side by side.
        device: Where it runs.
        name: Of the artifact.
        is_tf32: Whether a GPU rounds operands to TF32.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: dict[str, int] | str,
        outputs: list[str],
        fields: "np.dtype[Any] | None",
        device: str,
        name: BackendName,
        is_tf32: bool,
    ) -> None:
        self.name = name
        self.device = device
        self.provider: str = session.get_providers()[0]
        self.is_tf32 = is_tf32
        self._session = session
        self._inputs = inputs
        self._outputs = outputs
        self._fields = fields

    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Return the graph's outputs for rows or an array. See `Backend.run`."""
        if isinstance(self._inputs, str):
            fed = {self._inputs: inputs}
        else:
            fed = {
                name: inputs[name].reshape(-1) if rank == 1 else np.ascontiguousarray(inputs[name])
                for name, rank in self._inputs.items()
            }
        try:
            outputs = self._session.run(self._outputs, fed)
        except Exception as error:  # onnxruntime raises about a dozen exception types
            raise describe_failure(error, self.device) from error
        if self._fields is None:
            columns = [as_rows(output, len(inputs)) for output in outputs]
            return np.ascontiguousarray(np.concatenate(columns, axis=1), dtype=np.float32)
        try:
            return join_tensors(dict(zip(self._fields.names or (), outputs, strict=True)), self._fields, len(inputs))
        except ValueError as error:
            raise InferenceError(f"the graph's output {error}") from error


def open_rows(
    content: bytes, manifest: Manifest, device: str, threads: int, name: BackendName, tf32: bool
) -> RowsBackend:
    """Open an ONNX graph that has columns or several outputs. See `open_backend`.

    Raises:
        ModelRefusedError: The graph does not load, or its tensors do not match the manifest.
        StartError: onnxruntime cannot use the device.
    """
    session = open_session(content, device, threads, tf32)
    spec = manifest.input
    inputs = _match_inputs(session, spec) if isinstance(spec, ColumnsInput) else choose_input(session, manifest)
    is_named = manifest.output.kind == "tensors"
    outputs = _match_named(session, manifest) if is_named else _match_side_by_side(session, manifest)
    fields = manifest.output.row_dtype if is_named else None
    return RowsBackend(session, inputs, outputs, fields, device, name, tf32 and device.startswith("cuda"))


def _match_inputs(session: ort.InferenceSession, spec: ColumnsInput) -> dict[str, int]:
    """Return the rank of the graph's input for each tensor of columns."""
    nodes = {node.name: node for node in session.get_inputs()}
    if set(nodes) != {tensor.name for tensor in spec.tensors}:
        raise ModelRefusedError(
            f"the graph's inputs are {', '.join(nodes)}, the manifest's are"
            f" {', '.join(each.name for each in spec.tensors)}; a column's tensor, or input.tensor, names one"
        )
    ranks: dict[str, int] = {}
    for tensor in spec.tensors:
        node, width = nodes[tensor.name], len(tensor.columns)
        if node.type != (wanted := f"tensor({_TYPES.get(tensor.datatype, tensor.datatype.lower())})"):
            raise ModelRefusedError(f"the graph's input {node.name} is {node.type}, the manifest's {wanted}")
        sizes = [size for size in node.shape[1:] if isinstance(size, int)]
        if len(node.shape) > 2 or (sizes and sizes != [width]) or (len(node.shape) == 1 and width > 1):  # noqa: PLR2004
            raise ModelRefusedError(f"the graph's input {node.name} has shape {node.shape}, expected ['N', {width}]")
        if node.shape and isinstance(node.shape[0], int):
            raise ModelRefusedError(
                f"the batch of {node.name} is fixed at {node.shape[0]}; export it with a dynamic one"
            )
        ranks[tensor.name] = len(node.shape)
    return ranks


def _match_named(session: ort.InferenceSession, manifest: Manifest) -> list[str]:
    nodes = {node.name: node for node in session.get_outputs()}
    names = []
    for output in manifest.output.outputs:
        node = nodes.get(output.tensor or output.name)
        wanted = f"tensor({_TYPES.get(output.datatype, output.datatype.lower())})"
        if node is None:
            raise ModelRefusedError(
                f"the graph has no output {output.tensor or output.name}; it has {', '.join(nodes)}"
            )
        if node.type != wanted:
            raise ModelRefusedError(f"the graph's output {node.name} is {node.type}, the manifest's {wanted}")
        names.append(node.name)
    return names


def _match_side_by_side(session: ort.InferenceSession, manifest: Manifest) -> list[str]:
    nodes = {node.name: node for node in session.get_outputs()}
    only = [manifest.output.tensor] if manifest.output.tensor else list(nodes)
    names = list(manifest.output.tensors) or only
    if len(only) > 1 and not manifest.output.tensors:
        raise ModelRefusedError(f"the graph's outputs are {', '.join(nodes)}; name one in output.tensor")
    for name in names:
        if name not in nodes:
            raise ModelRefusedError(f"the graph has no output {name}; it has {', '.join(nodes)}")
        if nodes[name].type not in _FLOATS:
            kind = nodes[name].type
            cure = '; export it with to_onnx(…, options={"zipmap": False})' if kind.startswith("seq(map(") else ""
            raise ModelRefusedError(f"the graph's output {name} is {kind}, expected {_FLOATS[0]}{cure}")
    return names
