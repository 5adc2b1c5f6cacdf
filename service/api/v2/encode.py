"""Answers to infer requests: the tensors that were asked for, as JSON or binary data.

Source: https://github.com/kserve/open-inference-protocol, and Triton's extensions for binary tensor data and
classification. A model with a task returns its graph's own output and, as further named outputs, `prediction`,
`probabilities` and `label`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orjson

from service.api.json_values import PIECE_NUMBERS, write_numbers
from service.api.v2.datatypes import BYTES_LENGTH, DATATYPES, Tensor
from service.api.v2.decode import InferCall
from service.errors import InvalidRequestError
from service.model import postprocess
from service.model.backends import Array
from service.model.columns import split_rows
from service.model.manifest import AnyManifest, Manifest
from service.model.tensor_model import Tensors, as_bytes

DATATYPE_NAMES = {dtype.str[1:]: name for name, dtype in DATATYPES.items()}  # by dtype.str without the byte order

_JSON = b"content-type: application/json\r\n"
_BINARY = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n"


def encode(outputs: Array | Tensors, manifest: AnyManifest, call: InferCall) -> tuple[bytes, bytes]:
    """Return header lines and body of the answer: JSON, with binary data behind it if some was asked for.

    Args:
        outputs: the graph's, as `Predictor.predict` or `TensorPredictor.predict` returns them.
        manifest: of the version that computed them.
        call: what was asked for.

    Raises:
        InvalidRequestError: an output cannot be written as asked.
    """
    described: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for (_, as_binary, _), (name, tensor) in zip(call.outputs, build_outputs(outputs, manifest, call), strict=True):
        fields: dict[str, Any] = {"name": name, "datatype": DATATYPE_NAMES[tensor.dtype.str[1:]], "shape": tensor.shape}
        if as_binary:
            binary.append(write_binary(tensor))
            fields["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            fields["data"] = write_json(tensor)
        described.append(fields)
    answer: dict[str, Any] = {"model_name": manifest.name, "model_version": str(manifest.version)}
    if call.id is not None:
        answer["id"] = call.id
    answer["outputs"] = described
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return _JSON, header
    return _BINARY % len(header), b"".join((header, *binary))


def build_outputs(outputs: Array | Tensors, manifest: AnyManifest, call: InferCall) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each output that was asked for, in that order.

    Raises:
        InvalidRequestError: classes were asked for where there are none.
    """
    tensors = outputs if isinstance(outputs, Tensors) else _build_tensors(outputs, manifest, call)
    for name, _, classes in call.outputs:
        yield name, _classify(name, tensors[name], classes, manifest) if classes else tensors[name]


def _build_tensors(outputs: Array, manifest: AnyManifest, call: InferCall) -> Mapping[str, Tensor]:
    """Return the outputs of a model with a task by name; only the graph's own if nothing else was asked for."""
    assert isinstance(manifest, Manifest)
    if outputs.dtype.names:
        return {name: as_bytes(tensor) for name, tensor in split_rows(outputs).items()}
    own: dict[str, Tensor] = {manifest.output.tensor or "outputs": outputs}
    if len(call.outputs) == 1 and call.outputs[0].name in own:
        return own
    if manifest.task == "regression":
        prediction = outputs if manifest.output.kind == "values" else outputs[:, 0]
        return {"prediction": prediction, "interval": outputs[:, 1:], **own}
    if manifest.task == "multilabel":
        probabilities = postprocess.interpret(outputs, manifest)
        present = postprocess.choose_present(probabilities, manifest).astype(np.int64)
        return {"prediction": present, "probabilities": probabilities, **own}
    probabilities, indices = postprocess.classify(outputs, manifest)
    labels = list(map(str.encode, map(manifest.output.labels.__getitem__, indices)))
    return {
        "prediction": np.array(indices, np.int64),
        "probabilities": probabilities,
        "label": np.array(labels, dtype=object),
        **own,  # last: the graph's own output may itself be called "probabilities"
    }


def _classify(name: str, tensor: Tensor, classes: int, manifest: AnyManifest) -> Tensor:
    """Return the largest of each row of (N, K) as BYTES "value:index" or "value:index:label", largest first."""
    if tensor.ndim != 2:  # noqa: PLR2004 - (N, classes)
        raise InvalidRequestError(f"output {name!r} has shape {list(tensor.shape)}, which has no classes")
    labels = manifest.output.labels if isinstance(manifest, Manifest) else ()
    endings = [f":{label}" for label in labels] if len(labels) == tensor.shape[1] else [""] * tensor.shape[1]
    falling = ~tensor if tensor.dtype.kind in "iu" else -tensor  # minus an integer could overflow
    order = np.argsort(falling, axis=1, kind="stable")[:, :classes]
    form = "d" if tensor.dtype.kind in "iu" else "f"
    texts = np.empty(order.shape, dtype=object)
    for row, columns in enumerate(order.tolist()):
        for place, column in enumerate(columns):
            texts[row, place] = f"{tensor[row, column]:{form}}:{column}{endings[column]}".encode()
    return texts


def write_json(tensor: Tensor) -> Any:  # noqa: ANN401 - a list, an array that orjson writes as one, or JSON
    """Return a tensor's elements, flat in row-major order, as orjson takes them.

    Raises:
        InvalidRequestError: JSON cannot carry them: FP16, NaN and infinities, or BYTES that are not UTF-8.
    """
    if tensor.dtype == object:
        try:
            return list(map(bytes.decode, tensor.reshape(-1)))
        except UnicodeDecodeError as error:
            raise InvalidRequestError("a BYTES output is not UTF-8 text; ask for it as binary data") from error
    if tensor.dtype == np.float16:
        raise InvalidRequestError("an FP16 output cannot be written as JSON; ask for it as binary data")
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        raise InvalidRequestError("an output has a number that is not finite; ask for it as binary data")
    flat = np.ascontiguousarray(tensor).reshape(-1)
    return flat if flat.size <= PIECE_NUMBERS else orjson.Fragment(write_numbers(flat))


def write_binary(tensor: Tensor) -> bytes:
    """Return a tensor's elements as binary data."""
    if tensor.dtype == object:
        return b"".join(BYTES_LENGTH.pack(len(element)) + element for element in tensor.reshape(-1))
    return np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<")).tobytes()
