"""The JSON of an infer request, checked: its tensors, the outputs it asks for, its deadline.

Source: https://github.com/kserve/open-inference-protocol, "Inference Request JSON Object", and Triton's extensions.
Names, datatypes and shapes are checked against the model; tensor data is not read here.
"""

from difflib import get_close_matches
from typing import Any, NamedTuple

from service.api.json_values import kind_of, read_object
from service.api.v2.columns import check_columns, is_by_column
from service.api.v2.datatypes import read_datatype, read_shape
from service.errors import InvalidRequestError
from service.model.manifest import AnyManifest, ColumnsInput, Manifest

MAX_CACHED_BYTES = 2048  # longer JSON is parsed anew for each request
_MAX_CACHED = 512
_REQUEST_FIELDS = {"id", "parameters", "inputs", "outputs", "model_name", "model_version"}  # KServe's client sends all
_INPUT_FIELDS = {"name", "shape", "datatype", "parameters", "data"}
_OUTPUT_FIELDS = {"name", "parameters"}


class RequestedOutput(NamedTuple):
    """One output to return: its name, whether as binary data, and how many classes (0: the tensor itself)."""

    name: str
    binary: bool
    classes: int


class InputTensor(NamedTuple):
    """One input tensor as the JSON describes it, with its JSON data or else the size of its binary data in bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    binary_size: int | None
    data: object


class InferRequest(NamedTuple):
    """The JSON of a request, all but tensor data checked.

    `timeout` is in seconds. `by_column` says that the inputs are a model's columns or features; see
    `service.api.v2.columns`.
    """

    id: str | None
    inputs: tuple[InputTensor, ...]
    outputs: tuple[RequestedOutput, ...]
    timeout: float | None
    by_column: bool = False


_cache: dict[tuple[int, bytes], tuple[AnyManifest, InferRequest]] = {}


def parse_request(header: bytes, manifest: AnyManifest) -> InferRequest:
    """Parse the JSON of a request and check it against the model.

    Raises:
        InvalidRequestError: the JSON, a field or a tensor's description cannot be used.
    """
    return check_request(read_object(header, "an object with inputs"), manifest)


def check_request(fields: dict[str, Any], manifest: AnyManifest) -> InferRequest:
    """Do what `parse_request` does, for decoded JSON."""
    _check_fields(fields, _REQUEST_FIELDS, "the request")
    request_id = fields.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidRequestError(f"id is {kind_of(request_id)}, expected a string")
    parameters = _read_parameters(fields, "the request")
    inputs = _name_input(_read_inputs(fields.get("inputs")), manifest)
    by_column = _check_columns(inputs, manifest)
    if not by_column:
        _check_inputs(inputs, manifest)
    binary = parameters.get("binary_data_output", False)
    if not isinstance(binary, bool):
        raise InvalidRequestError(f"parameters.binary_data_output is {kind_of(binary)}, expected true or false")
    outputs = _read_outputs(fields.get("outputs"), manifest, binary)
    return InferRequest(request_id, inputs, outputs, _read_timeout(parameters), by_column)


def parse_cached(header: bytes, manifest: AnyManifest) -> InferRequest:
    """Do `parse_request`, but only once for JSON that is repeated, as by clients that send only new data each time."""
    cached = _cache.get((id(manifest), header))
    if cached is not None:  # the entry keeps its manifest alive, so no other manifest can have this id
        return cached[1]
    request = parse_request(header, manifest)
    if len(_cache) >= _MAX_CACHED:
        _cache.clear()
    _cache[id(manifest), header] = manifest, request
    return request


def _read_parameters(fields: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = fields.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidRequestError(f"{where}'s parameters is {kind_of(parameters)}, expected an object")
    return parameters


def _read_timeout(parameters: dict[str, Any]) -> float | None:
    """Return the `timeout` parameter, which is in microseconds, in seconds; 0 means none, as in Triton."""
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequestError("parameters.timeout is not a whole number of microseconds")
    return value / 1e6 if value else None


def _read_inputs(inputs: object) -> tuple[InputTensor, ...]:
    if not isinstance(inputs, list) or not inputs:
        raise InvalidRequestError("inputs is missing or empty; send a list of tensors")
    tensors = [_read_input(fields, f"inputs[{index}]") for index, fields in enumerate(inputs)]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise InvalidRequestError("two inputs have the same name")
    return tuple(tensors)


def _read_input(fields: object, where: str) -> InputTensor:
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"{where} is {kind_of(fields)}, expected a tensor")
    _check_fields(fields, _INPUT_FIELDS, where)
    name = fields.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(f"{where} has no name")
    datatype = read_datatype(fields.get("datatype"), where)
    shape = read_shape(fields.get("shape"), where)
    size = _read_parameters(fields, where).get("binary_data_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise InvalidRequestError(f"{where}.parameters.binary_data_size is not a whole number from 0")
    if (size is None) == ("data" not in fields):
        raise InvalidRequestError(f"{where} has neither or both of data and binary_data_size; send one")
    return InputTensor(name, datatype, shape, size, fields.get("data"))


def _name_input(inputs: tuple[InputTensor, ...], manifest: AnyManifest) -> tuple[InputTensor, ...]:
    """Give a request's only tensor the name of the model's only input: KServe's and MLServer's clients make one up."""
    specs = input_specs(manifest)
    if len(inputs) != 1 or len(specs) != 1 or not isinstance(manifest, Manifest):
        return inputs
    return (inputs[0]._replace(name=next(iter(specs))),)


def _check_columns(inputs: tuple[InputTensor, ...], manifest: AnyManifest) -> bool:
    """Tell whether the inputs are a model's columns or features, and check that they fit one another."""
    described = {each.name: (each.datatype, each.shape) for each in inputs}
    by_column = is_by_column(described, manifest)
    if by_column:
        check_columns(described)
    return by_column


def _check_inputs(inputs: tuple[InputTensor, ...], manifest: AnyManifest) -> None:
    """Check that the tensors are the model's inputs, each with its datatype and shape."""
    specs = input_specs(manifest)
    for name, *_ in inputs:
        if name not in specs:
            raise InvalidRequestError(f"the model has no input {name[:60]!r}; it takes {', '.join(map(repr, specs))}")
    for name, datatype, shape, *_ in inputs:
        expected_datatype, expected_shape = specs[name]
        if isinstance(manifest, Manifest) and datatype == "BYTES" and manifest.input.kind == "image":
            continue  # encoded pictures; their shape is checked when they are read
        if datatype != expected_datatype and not is_convertible(datatype, manifest):
            raise InvalidRequestError(f"input {name!r} has datatype {datatype}, the model takes {expected_datatype}")
        check_shape(name, shape, expected_shape)
        if isinstance(manifest, Manifest) and shape[0] == 0:
            raise InvalidRequestError(f"input {name!r} has shape {list(shape)}; send at least one instance")
    missing = specs.keys() - {tensor.name for tensor in inputs}
    if missing:
        raise InvalidRequestError(f"the request lacks the input {min(missing)!r}")


def is_convertible(datatype: str, manifest: AnyManifest) -> bool:
    """Tell whether a model takes numbers of another datatype than FP32: those with a task and one input of numbers."""
    return isinstance(manifest, Manifest) and manifest.input.kind != "columns" and datatype not in ("BOOL", "BYTES")


def check_shape(name: str, shape: tuple[int, ...], expected: list[int]) -> None:
    """Check a shape against an input's, where -1 is any size.

    Raises:
        InvalidRequestError: it differs.
    """
    sizes = [size if fixed < 0 else fixed for size, fixed in zip(shape, expected, strict=False)]
    if len(shape) != len(expected) or sizes != list(shape):
        raise InvalidRequestError(f"input {name!r} has shape {list(shape)}, the model takes {expected}")


def _read_outputs(outputs: object, manifest: AnyManifest, binary: bool) -> tuple[RequestedOutput, ...]:
    if outputs is None or outputs == []:
        return all_outputs(manifest, binary)
    if not isinstance(outputs, list):
        raise InvalidRequestError(f"outputs is {kind_of(outputs)}, expected a list")
    specs = output_specs(manifest)
    requested: dict[str, RequestedOutput] = {}
    for index, fields in enumerate(outputs):
        where = f"outputs[{index}]"
        if not isinstance(fields, dict):
            raise InvalidRequestError(f"{where} is {kind_of(fields)}, expected an object with a name")
        _check_fields(fields, _OUTPUT_FIELDS, where)
        name = fields.get("name")
        if not isinstance(name, str) or name not in specs:
            raise InvalidRequestError(f"{where} asks for {name!r:.60}; the model gives {', '.join(specs)}")
        if name in requested:
            raise InvalidRequestError(f"{where} asks for {name!r} a second time")
        requested[name] = _read_output(name, _read_parameters(fields, where), binary, specs[name], where)
    return tuple(requested.values())


def _read_output(
    name: str, parameters: dict[str, Any], binary: bool, spec: tuple[str, list[int]], where: str
) -> RequestedOutput:
    datatype, shape = spec
    as_binary = parameters.get("binary_data", binary)
    if not isinstance(as_binary, bool):
        raise InvalidRequestError(f"{where}.parameters.binary_data is {kind_of(as_binary)}, expected true or false")
    classes = parameters.get("classification", 0)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
        raise InvalidRequestError(f"{where}.parameters.classification is not a whole number from 0")
    if "shared_memory_region" in parameters:
        raise InvalidRequestError(f"{where} asks for shared memory, which is not supported; leave it out of parameters")
    if classes and (len(shape) != 2 or datatype in ("BOOL", "BYTES")):  # noqa: PLR2004 - (N, classes)
        raise InvalidRequestError(f"{where} asks for classes of {name!r}, which has none")
    return RequestedOutput(name, as_binary, min(classes, shape[-1]) if shape[-1:] > [0] else classes)


def _check_fields(fields: dict[str, Any], known: set[str], where: str) -> None:
    """Refuse a field that is probably misspelled; others that are unknown are ignored, as by Triton."""
    for name in fields.keys() - known:
        if meant := get_close_matches(name.lower(), known, 1, cutoff=0.75):
            raise InvalidRequestError(f"{where} has an unknown field {name[:60]!r}; did you mean {meant[0]!r}?")


def input_specs(manifest: AnyManifest) -> dict[str, tuple[str, list[int]]]:
    """Return datatype and shape of each input by name; -1 is an open dimension, or the batch."""
    if isinstance(manifest, Manifest):
        if isinstance(manifest.input, ColumnsInput):
            return {each.name: (each.datatype, [-1, len(each.columns)]) for each in manifest.input.tensors}
        return {manifest.input.tensor or "inputs": ("FP32", [-1, *manifest.input.shape])}
    return {spec.name: (spec.datatype, list(spec.shape)) for spec in manifest.inputs}


def output_specs(manifest: AnyManifest) -> dict[str, tuple[str, list[int]]]:
    """Return datatype and shape of each output by name: the graph's own, then those of the task.

    -1 is an open dimension, or the batch.
    """
    if not isinstance(manifest, Manifest):
        return {spec.name: (spec.datatype, list(spec.shape)) for spec in manifest.outputs}
    width = manifest.output_width
    if manifest.output.kind == "tensors":
        return {each.name: (each.datatype, [-1, *each.shape]) for each in manifest.output.outputs}
    specs: dict[str, tuple[str, list[int]]] = {manifest.output.tensor or "outputs": ("FP32", [-1, width])}
    if manifest.task == "regression":
        specs.setdefault("prediction", ("FP32", [-1, width] if manifest.output.kind == "values" else [-1]))
        if manifest.output.kind == "interval":
            specs.setdefault("interval", ("FP32", [-1, 2]))
        return specs
    if manifest.task == "embedding":
        return specs
    is_multilabel = manifest.task == "multilabel"
    specs.setdefault("prediction", ("INT64", [-1, width] if is_multilabel else [-1]))
    specs.setdefault("probabilities", ("FP32", [-1, len(manifest.output.labels)]))
    if not is_multilabel:
        specs.setdefault("label", ("BYTES", [-1]))
    return specs


def all_outputs(manifest: AnyManifest, binary: bool) -> tuple[RequestedOutput, ...]:
    """Return every output of a model, which is what a request gets that lists none."""
    return tuple([RequestedOutput(name, binary, 0) for name in output_specs(manifest)])
