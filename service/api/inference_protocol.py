"""The Open Inference Protocol's infer bodies: JSON, binary tensors, and both mixed, in and out.

Source: https://github.com/kserve/open-inference-protocol and Triton's extensions for binary tensor data and
classification. A model with a task gives its graph's own output and, as named outputs, `prediction`, `probabilities`
and `label`.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import orjson

from service import tasks
from service.api import datatypes
from service.api.datatypes import Tensor
from service.api.head import RequestHead
from service.api.tensors import kind_of
from service.api.typed import LARGE_BODY
from service.backends import Array
from service.errors import InvalidRequestError
from service.manifest import AnyManifest, ImageInput, Manifest, SignatureManifest
from service.signature import Tensors

_NUMPY = orjson.OPT_SERIALIZE_NUMPY
_JSON = b"content-type: application/json\r\n"
_BINARY = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n"
_MAX_PLANS = 512
_MAX_PLAN_BYTES = 2048
_REQUEST_FIELDS = {"id", "parameters", "inputs", "outputs", "model_name", "model_version"}  # KServe's client: all six
_INPUT_FIELDS = {"name", "shape", "datatype", "parameters", "data"}
_OUTPUT_FIELDS = {"name", "parameters"}


_plans: "dict[tuple[int, bytes], tuple[AnyManifest, Plan]]" = {}


class Wanted(NamedTuple):
    """One output to give: its name, whether as binary data, and how many classes (0: the tensor itself)."""

    name: str
    binary: bool
    classes: int


class Part(NamedTuple):
    """One input tensor: what the request's JSON says of it. `size` is that of its binary data, None for JSON data."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int | None
    data: object


class Plan(NamedTuple):
    """A request's JSON, checked: everything but binary data. `timeout` is in seconds."""

    id: str | None
    parts: tuple[Part, ...]
    outputs: tuple[Wanted, ...]
    timeout: float | None


class InferCall(NamedTuple):
    """One decoded infer request: inputs float32 (N, *shape), or the tensors of a signature, and what to answer."""

    inputs: Array | Tensors
    plan: Plan

    @property
    def timeout(self) -> float | None:
        """Seconds that the request gives itself, if it does."""
        return self.plan.timeout


def is_heavy(body: bytes, head: RequestHead) -> bool:
    """Tell whether reading a body takes so long that it belongs in a thread: large JSON, or pictures."""
    return b'"BYTES"' in body[:_MAX_PLAN_BYTES] or (len(body) >= LARGE_BODY and not head.json_length)


def decode(body: bytes, manifest: AnyManifest, head: RequestHead) -> InferCall:
    """Read an infer body.

    Raises:
        InvalidRequestError: with what and where.
    """
    length = _read_json_length(head.json_length, len(body))
    if length == 0 and head.json_length:
        return InferCall(_read_raw(body, manifest), Plan(None, (), _all_outputs(manifest, binary=True), None))
    header, rest = (body, b"") if length is None else (body[:length], body[length:])
    plan = _plan_again(header, manifest) if rest and len(header) <= _MAX_PLAN_BYTES else plan_of(header, manifest)
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
        content = np.empty(1, dtype=object)
        content[0] = body
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


def plan_of(header: bytes, manifest: AnyManifest) -> Plan:
    """Check a request's JSON.

    Raises:
        InvalidRequestError: with what and where.
    """
    try:
        fields = orjson.loads(header)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"the body is {kind_of(fields)}, expected an object with inputs")
    _check_fields(fields, _REQUEST_FIELDS, "the request")
    name = fields.get("id")
    if name is not None and not isinstance(name, str):
        raise InvalidRequestError(f"id is {kind_of(name)}, expected a string")
    parameters = _read_parameters(fields, "the request")
    inputs = fields.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise InvalidRequestError("inputs is missing or empty; send a list of tensors")
    parts = tuple(_read_part(part, f"inputs[{index}]") for index, part in enumerate(inputs))
    if len({part.name for part in parts}) != len(parts):
        raise InvalidRequestError("two inputs have the same name")
    binary = parameters.get("binary_data_output", False)
    if not isinstance(binary, bool):
        raise InvalidRequestError(f"parameters.binary_data_output is {kind_of(binary)}, expected true or false")
    return Plan(name, parts, _read_outputs(fields.get("outputs"), manifest, binary), _read_timeout(parameters))


def _plan_again(header: bytes, manifest: AnyManifest) -> Plan:
    """Do `plan_of`, once for headers that come again and again: those of a client that sends binary data and no ids."""
    known = _plans.get((id(manifest), header))
    if known is not None:  # it holds its manifest, so no other can have the same id
        return known[1]
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()
    plan = plan_of(header, manifest)
    _plans[id(manifest), header] = manifest, plan
    return plan


def _read_parameters(fields: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = fields.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidRequestError(f"{where}'s parameters is {kind_of(parameters)}, expected an object")
    return parameters


def _read_timeout(parameters: dict[str, Any]) -> float | None:
    """Return the `timeout` parameter, microseconds, in seconds; 0 is none, as in Triton."""
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequestError("parameters.timeout is not a whole number of microseconds")
    return value / 1e6 if value else None


def _read_part(part: object, where: str) -> Part:
    if not isinstance(part, dict):
        raise InvalidRequestError(f"{where} is {kind_of(part)}, expected a tensor")
    _check_fields(part, _INPUT_FIELDS, where)
    name = part.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(f"{where} has no name")
    datatype = datatypes.read_datatype(part.get("datatype"), where)
    shape = datatypes.read_shape(part.get("shape"), where)
    size = _read_parameters(part, where).get("binary_data_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise InvalidRequestError(f"{where}.parameters.binary_data_size is not a whole number from 0")
    if (size is None) == ("data" not in part):
        raise InvalidRequestError(f"{where} has neither or both of data and binary_data_size; send one")
    return Part(name, datatype, shape, size, part.get("data"))


def _read_outputs(outputs: object, manifest: AnyManifest, binary: bool) -> tuple[Wanted, ...]:
    if outputs is None or outputs == []:
        return _all_outputs(manifest, binary)
    if not isinstance(outputs, list):
        raise InvalidRequestError(f"outputs is {kind_of(outputs)}, expected a list")
    known = output_specs(manifest)
    wanted: list[Wanted] = []
    for index, output in enumerate(outputs):
        where = f"outputs[{index}]"
        if not isinstance(output, dict):
            raise InvalidRequestError(f"{where} is {kind_of(output)}, expected an object with a name")
        _check_fields(output, _OUTPUT_FIELDS, where)
        name = output.get("name")
        if not isinstance(name, str) or name not in known:
            raise InvalidRequestError(f"{where} asks for {name!r:.60}; the model gives {', '.join(known)}")
        if any(name == other.name for other in wanted):
            raise InvalidRequestError(f"{where} asks for {name!r} a second time")
        wanted.append(_read_wanted(name, _read_parameters(output, where), binary, known[name][1], where))
    return tuple(wanted)


def _read_wanted(name: str, parameters: dict[str, Any], binary: bool, shape: list[int], where: str) -> Wanted:
    as_binary = parameters.get("binary_data", binary)
    if not isinstance(as_binary, bool):
        raise InvalidRequestError(f"{where}.parameters.binary_data is {kind_of(as_binary)}, expected true or false")
    classes = parameters.get("classification", 0)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
        raise InvalidRequestError(f"{where}.parameters.classification is not a whole number from 0")
    if classes and len(shape) != 2:  # noqa: PLR2004 - (N, classes)
        raise InvalidRequestError(f"{where} asks for classes of {name!r}, which has none")
    return Wanted(name, as_binary, min(classes, shape[-1]) if shape[-1:] > [0] else classes)


def _check_fields(fields: dict[str, Any], known: set[str], where: str) -> None:
    for name in fields:
        if name not in known:
            raise InvalidRequestError(f"{where} has an unknown field {name[:60]!r}")


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


def _choose_inputs(plan: Plan, tensors: list[Tensor], manifest: SignatureManifest) -> Tensors:
    """Return the tensors of a signature by name, each of the datatype and shape that it says."""
    specs = input_specs(manifest)
    for part in plan.parts:
        if part.name not in specs:
            raise InvalidRequestError(f"the model has no input {part.name[:60]!r}; its inputs are {', '.join(specs)}")
        datatype, shape = specs[part.name]
        if part.datatype != datatype:
            raise InvalidRequestError(f"input {part.name!r} has datatype {part.datatype}, the model takes {datatype}")
        fits = len(part.shape) == len(shape) and all(
            want in (-1, have) for have, want in zip(part.shape, shape, strict=True)
        )
        if not fits:
            raise InvalidRequestError(f"input {part.name!r} has shape {list(part.shape)}, the model takes {shape}")
    missing = specs.keys() - {part.name for part in plan.parts}
    if missing:
        raise InvalidRequestError(f"the request lacks the input {min(missing)!r}")
    return Tensors((part.name, tensor) for part, tensor in zip(plan.parts, tensors, strict=True))


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
    from service.images import read_images  # noqa: PLC0415 - Pillow is only imported where pictures come

    if tensor.ndim != 1 or not tensor.size:
        raise InvalidRequestError(f"pictures as BYTES have shape [N] with N from 1, not {list(tensor.shape)}")
    return read_images(list(tensor), spec, [f"picture {index}" for index in range(len(tensor))])


def _check_finite(tensor: Tensor, where: str) -> Array:
    if not np.isfinite(tensor).all():
        index = int(np.flatnonzero(~np.isfinite(tensor.reshape(-1)))[0])
        raise InvalidRequestError(f"{where} has an element that is not finite, at {index}")
    return tensor


def input_name(manifest: Manifest) -> str:
    """Return the name of the input of a model with a task."""
    return manifest.input.tensor or "inputs"


def input_specs(manifest: AnyManifest) -> dict[str, tuple[str, list[int]]]:
    """Return datatype and shape (-1: open, or the batch) of each input."""
    if isinstance(manifest, Manifest):
        return {input_name(manifest): ("FP32", [-1, *manifest.input.shape])}
    return {spec.name: (spec.datatype, list(spec.shape)) for spec in manifest.inputs}


def output_specs(manifest: AnyManifest) -> dict[str, tuple[str, list[int]]]:
    """Return datatype and shape (-1: open, or the batch) of each output: the graph's own, then those of the task."""
    if not isinstance(manifest, Manifest):
        return {spec.name: (spec.datatype, list(spec.shape)) for spec in manifest.outputs}
    own = manifest.output.tensor or "outputs"
    specs: dict[str, tuple[str, list[int]]] = {own: ("FP32", [-1, manifest.output_width])}
    if manifest.task == "regression":
        specs.setdefault("prediction", ("FP32", [-1]))
        return specs
    specs.setdefault("prediction", ("INT64", [-1]))
    specs.setdefault("probabilities", ("FP32", [-1, len(manifest.output.labels)]))
    specs.setdefault("label", ("BYTES", [-1]))
    return specs


def _all_outputs(manifest: AnyManifest, binary: bool) -> tuple[Wanted, ...]:
    return tuple(Wanted(name, binary, 0) for name in output_specs(manifest))


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
    order = np.argsort(-tensor, axis=1, kind="stable")[:, : wanted.classes]
    classes = np.empty(order.shape, dtype=object)
    for row, columns in enumerate(order.tolist()):
        for place, column in enumerate(columns):
            text = f"{tensor[row, column]:f}:{column}" + (f":{labels[column]}" if labels else "")
            classes[row, place] = text.encode()
    return classes


def _choose_output(name: str, results: Array, manifest: Manifest) -> Tensor:
    if name == (manifest.output.tensor or "outputs"):
        return tasks.outputs_of(results, manifest)
    if manifest.task == "regression":
        return results[:, 0]
    if name == "probabilities":
        return tasks.probabilities_of(results, manifest)
    indices = tasks.decide(results, manifest)
    if name == "prediction":
        return indices.astype(np.int64)
    labels = np.empty(len(indices), dtype=object)
    labels[:] = [manifest.output.labels[index].encode() for index in indices]
    return labels
