"""What an infer request's JSON says, checked once: its tensors, the outputs it wants, its deadline.

Source: https://github.com/kserve/open-inference-protocol, "Inference Request JSON Object", and Triton's extensions. It
knows what a model's inputs and outputs are called; it does not read their data.
"""

from typing import Any, NamedTuple

from service.api.v1.instances import kind_of, read_object
from service.api.v2 import datatypes
from service.errors import InvalidRequestError
from service.model.manifest import AnyManifest, Manifest

MAX_PLAN_BYTES = 2048  # of JSON that is worth keeping
_MAX_PLANS = 512
_REQUEST_FIELDS = {"id", "parameters", "inputs", "outputs", "model_name", "model_version"}  # KServe's client: all six
_INPUT_FIELDS = {"name", "shape", "datatype", "parameters", "data"}
_OUTPUT_FIELDS = {"name", "parameters"}


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


_plans: dict[tuple[int, bytes], tuple[AnyManifest, Plan]] = {}


def plan_of(header: bytes, manifest: AnyManifest) -> Plan:
    """Check a request's JSON.

    Raises:
        InvalidRequestError: with what and where.
    """
    fields = read_object(header, "an object with inputs")
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


def plan_again(header: bytes, manifest: AnyManifest) -> Plan:
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
        return all_outputs(manifest, binary)
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
        wanted.append(_read_wanted(name, _read_parameters(output, where), binary, known[name], where))
    return tuple(wanted)


def _read_wanted(
    name: str, parameters: dict[str, Any], binary: bool, spec: tuple[str, list[int]], where: str
) -> Wanted:
    datatype, shape = spec
    as_binary = parameters.get("binary_data", binary)
    if not isinstance(as_binary, bool):
        raise InvalidRequestError(f"{where}.parameters.binary_data is {kind_of(as_binary)}, expected true or false")
    classes = parameters.get("classification", 0)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
        raise InvalidRequestError(f"{where}.parameters.classification is not a whole number from 0")
    if classes and (len(shape) != 2 or datatype in ("BOOL", "BYTES")):  # noqa: PLR2004 - (N, classes)
        raise InvalidRequestError(f"{where} asks for classes of {name!r}, which has none")
    return Wanted(name, as_binary, min(classes, shape[-1]) if shape[-1:] > [0] else classes)


def _check_fields(fields: dict[str, Any], known: set[str], where: str) -> None:
    for name in fields:
        if name not in known:
            raise InvalidRequestError(f"{where} has an unknown field {name[:60]!r}")


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


def all_outputs(manifest: AnyManifest, binary: bool) -> tuple[Wanted, ...]:
    """Return every output of a model, as a request that names none wants them."""
    return tuple(Wanted(name, binary, 0) for name in output_specs(manifest))
