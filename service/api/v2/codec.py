"""The Open Inference Protocol's infer bodies: JSON, binary tensors, and both mixed, in and out.

Source: https://github.com/kserve/open-inference-protocol and Triton's extensions for binary tensor data and
classification. A model with a task gives its graph's own output and, as named outputs, `prediction`, `probabilities`
and `label`.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import orjson

from service.api.headers import RequestHeaders
from service.api.v1.codec import LARGE_BODY
from service.api.v2 import datatypes
from service.api.v2.datatypes import Tensor
from service.api.v2.infer_request import (
    MAX_PLAN_BYTES,
    Plan,
    Wanted,
    all_outputs,
    input_name,
    input_specs,
    plan_again,
    plan_of,
)
from service.errors import InvalidRequestError
from service.model import postprocess
from service.model.backends import Array
from service.model.manifest import AnyManifest, ImageInput, Manifest, TensorManifest
from service.model.tensor_model import Tensors

_NUMPY = orjson.OPT_SERIALIZE_NUMPY
_JSON = b"content-type: application/json\r\n"
_BINARY = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n"


class InferCall(NamedTuple):
    """One decoded infer request: inputs float32 (N, *shape), or the tensors of a signature, and what to answer."""

    inputs: Array | Tensors
    plan: Plan

    @property
    def timeout(self) -> float | None:
        """Seconds that the request gives itself, if it does."""
        return self.plan.timeout


def is_heavy(body: bytes, head: RequestHeaders) -> bool:
    """Tell whether reading a body takes so long that it belongs in a thread: large JSON, or pictures."""
    return b'"BYTES"' in body[:MAX_PLAN_BYTES] or (len(body) >= LARGE_BODY and not head.json_length)


def decode(body: bytes, manifest: AnyManifest, head: RequestHeaders) -> InferCall:
    """Read an infer body.

    Raises:
        InvalidRequestError: with what and where.
    """
    length = _read_json_length(head.json_length, len(body))
    if length == 0 and head.json_length:
        return InferCall(_read_raw(body, manifest), Plan(None, (), all_outputs(manifest, binary=True), None))
    header, rest = (body, b"") if length is None else (body[:length], body[length:])
    plan = plan_again(header, manifest) if rest and len(header) <= MAX_PLAN_BYTES else plan_of(header, manifest)
    tensors = read_tensors(plan, rest)
    if isinstance(manifest, Manifest):
        return InferCall(_choose_input(plan, tensors, manifest), plan)
    return InferCall(_choose_inputs(plan, tensors, manifest), plan)


def _read_json_length(value: bytes, total: int) -> int | None:
    if not value:
        return None
    if not value.isdigit() or len(value) > 10 or int(value) > total:  # noqa: PLR2004 - digits
        shown = value[:20].decode("latin-1")
        raise InvalidRequestError(f"Inference-Header-Content-Length is {shown}, expected 0 to the body's {total} bytes")
    return int(value)


def _read_raw(body: bytes, manifest: AnyManifest) -> Array | Tensors:
    """Read a raw binary request: no JSON, the body is the one input's bytes, as a batch of one."""
    specs = input_specs(manifest)
    if len(specs) != 1:
        raise InvalidRequestError(f"a raw binary request has one input, the model has {len(specs)}")
    ((name, (datatype, shape)),) = specs.items()
    open_places = [place for place, size in enumerate(shape) if size < 0]
    if datatype == "BYTES":
        content = np.empty([1] * len(shape), dtype=object)
        content[...] = body
        _check_shape(name, content.shape, shape)
        return _as_inputs(name, content, manifest)
    if isinstance(manifest, Manifest):
        filled = [1, *shape[1:]]
    elif len(open_places) > 1:
        raise InvalidRequestError(f"a raw binary request needs an input with one open dimension, {name!r} has {shape}")
    else:
        rest = datatypes.DATATYPES[datatype].itemsize * math.prod(size for size in shape if size >= 0)
        filled = [len(body) // max(rest, 1) if size < 0 else size for size in shape]
    return _as_inputs(name, datatypes.read_binary(body, datatype, tuple(filled), "the body"), manifest)


def _as_inputs(name: str, tensor: Tensor, manifest: AnyManifest) -> Array | Tensors:
    return _check_finite(tensor, "the body") if isinstance(manifest, Manifest) else Tensors({name: tensor})


def read_tensors(plan: Plan, rest: bytes) -> list[Tensor]:
    """Return the request's tensors, in order; `rest` is the binary data after the JSON.

    Raises:
        InvalidRequestError: with what and where.
    """
    tensors: list[Tensor] = []
    position = 0
    for index, part in enumerate(plan.parts):
        where = f"inputs[{index}]"
        if part.size is None:
            tensors.append(datatypes.read_json(part.data, part.datatype, part.shape, where))
            continue
        if position + part.size > len(rest):
            raise InvalidRequestError(f"{where} has {part.size} bytes of binary data, {len(rest) - position} are left")
        data = rest if part.size == len(rest) else rest[position : position + part.size]
        tensors.append(datatypes.read_binary(data, part.datatype, part.shape, where))
        position += part.size
    if position != len(rest):
        raise InvalidRequestError(f"the body has {len(rest) - position} bytes after the last tensor")
    return tensors


def _choose_inputs(plan: Plan, tensors: list[Tensor], manifest: TensorManifest) -> Tensors:
    """Return the tensors of a signature by name, each of the datatype and shape that it says."""
    specs = input_specs(manifest)
    for part in plan.parts:
        if part.name not in specs:
            raise InvalidRequestError(f"the model has no input {part.name[:60]!r}; its inputs are {', '.join(specs)}")
        datatype, shape = specs[part.name]
        if part.datatype != datatype:
            raise InvalidRequestError(f"input {part.name!r} has datatype {part.datatype}, the model takes {datatype}")
        _check_shape(part.name, part.shape, shape)
    missing = specs.keys() - {part.name for part in plan.parts}
    if missing:
        raise InvalidRequestError(f"the request lacks the input {min(missing)!r}")
    return Tensors((part.name, tensor) for part, tensor in zip(plan.parts, tensors, strict=True))


def _check_shape(name: str, shape: tuple[int, ...], wanted: list[int]) -> None:
    if len(shape) != len(wanted) or any(want not in (-1, have) for have, want in zip(shape, wanted, strict=True)):
        raise InvalidRequestError(f"input {name!r} has shape {list(shape)}, the model takes {wanted}")


def _choose_input(plan: Plan, tensors: list[Tensor], manifest: Manifest) -> Array:
    """Return the model's one input, float32 (N, *shape)."""
    name = input_name(manifest)
    for part in plan.parts:
        if part.name != name:
            raise InvalidRequestError(f"the model has no input {part.name[:60]!r}; its input is {name!r}")
    (part,) = plan.parts
    if part.datatype == "BYTES" and isinstance(manifest.input, ImageInput):
        return _read_images(tensors[0], manifest.input)
    if part.datatype != "FP32":
        raise InvalidRequestError(f"input {name!r} has datatype {part.datatype}, the model takes FP32")
    if part.shape[1:] != manifest.input.shape or not part.shape or part.shape[0] == 0:
        expected = ["N from 1", *manifest.input.shape]
        raise InvalidRequestError(f"input {name!r} has shape {list(part.shape)}, the model takes {expected}")
    return _check_finite(tensors[0], f"input {name!r}")


def _read_images(tensor: Tensor, spec: ImageInput) -> Array:
    from service.model.preprocess import read_images  # noqa: PLC0415 - Pillow is only imported where pictures come

    if tensor.ndim != 1 or not tensor.size:
        raise InvalidRequestError(f"pictures as BYTES have shape [N] with N from 1, not {list(tensor.shape)}")
    return read_images(list(tensor), spec, [f"picture {index}" for index in range(len(tensor))])


def _check_finite(tensor: Tensor, where: str) -> Array:
    if not np.isfinite(tensor).all():
        index = int(np.flatnonzero(~np.isfinite(tensor.reshape(-1)))[0])
        raise InvalidRequestError(f"{where} has an element that is not finite, at {index}")
    return tensor


def encode(results: Array | Tensors, manifest: AnyManifest, call: InferCall) -> tuple[bytes, bytes]:
    """Return header lines and body of the answer.

    Args:
        results: as `Predictor.predict` gives them.
        manifest: of the version that gave them.
        call: what was asked.
    """
    tensors = [_build_output(wanted, results, manifest) for wanted in call.plan.outputs]
    answer: dict[str, Any] = {"model_name": manifest.name, "model_version": str(manifest.version)}
    if call.plan.id is not None:
        answer["id"] = call.plan.id
    return write_answer(answer, call.plan.outputs, tensors)


def write_answer(answer: dict[str, Any], outputs: tuple[Wanted, ...], tensors: list[Tensor]) -> tuple[bytes, bytes]:
    """Return header lines and body: the answer's JSON with its outputs, and binary data behind it where asked for."""
    described, binary = [], []
    for wanted, tensor in zip(outputs, tensors, strict=True):
        about: dict[str, Any] = {
            "name": wanted.name,
            "datatype": datatypes.datatype_of(tensor),
            "shape": list(tensor.shape),
        }
        if wanted.binary:
            binary.append(datatypes.write_binary(tensor))
            about["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            about["data"] = datatypes.write_json(tensor)
        described.append(about)
    header = orjson.dumps(answer | {"outputs": described}, option=_NUMPY)
    if not binary:
        return _JSON, header
    return _BINARY % len(header), b"".join((header, *binary))


def _build_output(wanted: Wanted, results: Array | Tensors, manifest: AnyManifest) -> Tensor:
    known: tuple[str, ...] = ()
    if isinstance(results, Tensors):
        tensor = results[wanted.name]
    else:
        assert isinstance(manifest, Manifest)
        tensor, known = _choose_output(wanted.name, results, manifest), manifest.output.labels
    if not wanted.classes:
        return tensor
    if tensor.ndim != 2:  # noqa: PLR2004 - (N, classes)
        raise InvalidRequestError(f"output {wanted.name!r} has shape {list(tensor.shape)}, which has no classes")
    labels = known if tensor.shape[1] == len(known) else ()
    falling = ~tensor if tensor.dtype.kind in "iu" else -tensor  # minus a whole number would wrap
    order = np.argsort(falling, axis=1, kind="stable")[:, : wanted.classes]
    classes = np.empty(order.shape, dtype=object)
    for row, columns in enumerate(order.tolist()):
        for place, column in enumerate(columns):
            text = f"{tensor[row, column]:f}:{column}" + (f":{labels[column]}" if labels else "")
            classes[row, place] = text.encode()
    return classes


def _choose_output(name: str, results: Array, manifest: Manifest) -> Tensor:
    if name == (manifest.output.tensor or "outputs"):
        return results
    if manifest.task == "regression":
        return results[:, 0]
    probabilities = postprocess.interpret(results, manifest)
    if name == "probabilities":
        return probabilities
    indices = postprocess.decide(probabilities, manifest)
    if name == "prediction":
        return indices.astype(np.int64)
    labels = np.empty(len(indices), dtype=object)
    labels[:] = [manifest.output.labels[index].encode() for index in indices]
    return labels
