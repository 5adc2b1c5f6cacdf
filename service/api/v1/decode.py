"""Decode the typed API's requests: `{"instances": …, "parameters": …}` or pictures to float32 (N, *shape).

The plain case, `{"instances": [[number, ...], ...]}`, goes from bytes to an array without a Python object per number
(simdjson, https://arxiv.org/abs/1902.08318). Everything else is decoded by orjson and read by `instances`, which has
the sentence for whatever is wrong. The instances of a large body are read in pieces, so that what is wrong with the
first of them, or with their number, is found before the last are read.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np
import orjson

from service.api.headers import JSON_TYPES, RequestHeaders
from service.api.json_values import LARGE_BODY, kind_of, parse_numbers, read_object, split_list
from service.api.limits import MAX_VALUES, NO_LIMITS, ReadLimits, check_values
from service.api.v1 import pictures
from service.api.v1.instances import read_instances
from service.api.v1.tfserving import read_form, unwrap
from service.errors import InvalidRequestError
from service.model.backends import Array
from service.model.manifest import AnyManifest, ImageInput, Manifest

_PARAMETERS = {"binary": "threshold", "multilabel": "threshold", "multiclass": "top_k", "embedding": "encoding"}
_FIELDS = ("instances", "parameters")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # a reader may ignore it, RFC 8259 section 8.1
_BLANKS = b" \t\r\n"
_PLAIN = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"instances"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_MAX_HEADER = 2**16  # of a body without its instances


class Parameters(NamedTuple):
    """The parameters of a request, as `Call` has them."""

    threshold: float | None
    top_k: int | None
    is_base64: bool
    form: str = ""


class Call(NamedTuple):
    """One decoded predict request: inputs float32 (N, *shape), and its parameters where they were sent.

    `is_base64` says how an embedding is written, and `form` which of TensorFlow Serving's forms the answer has, if any;
    see `service.api.v1.tfserving`. `timeout` is always None: a request of this API sets it by the header
    field `X-Request-Timeout`.
    """

    inputs: Array
    threshold: float | None = None
    top_k: int | None = None
    is_base64: bool = False
    form: str = ""
    timeout: float | None = None


def is_heavy(body: bytes, headers: RequestHeaders) -> bool:
    """Tell whether decoding a body takes so long that it belongs in a thread: it is large, or may hold pictures."""
    if len(body) >= LARGE_BODY:
        return True
    if headers.content_type not in JSON_TYPES and pictures.is_picture(headers.content_type):
        return True
    # A plain body has one key. One with another key may have "b64", perhaps spelled with escapes.
    end = body.find(b'"', body.find(b'"') + 1)
    return body.find(b'"', end + 1) >= 0 and (b'b64"' in body or b"\\u" in body)


def decode(body: bytes, manifest: AnyManifest, headers: RequestHeaders, limits: ReadLimits = NO_LIMITS) -> Call:
    """Decode the body of a predict request.

    Raises:
        InvalidRequestError: the model has no task, or the body, a value or a parameter cannot be used; the sentence
            says which and why.
        TooLargeError: it has too many instances or values.
    """
    if not isinstance(manifest, Manifest):
        raise InvalidRequestError(
            f"{manifest.name} has no task, only tensors; send them to /v2/models/{manifest.name}/infer"
        )
    if headers.content_type not in JSON_TYPES and pictures.is_picture(headers.content_type):
        return _decode_pictures(body, manifest, headers.content_type, limits)
    if len(body) < LARGE_BODY:
        inputs = parse_instances(body, manifest)
        return Call(inputs) if inputs is not None else _decode_object(body, manifest, limits)
    return _decode_pieces(body, manifest, limits)


def parse_instances(body: bytes, manifest: Manifest) -> Array | None:
    """Return the inputs float32 (N, *shape) of a plain predict body, or None when the body is anything but plain."""
    found = _PLAIN.match(body)
    end = body.rfind(b"]") + 1
    if found is None or body[end:].strip(_BLANKS) != b"}":  # then nothing stands beside the list
        return None
    return _parse_rows(body[found.end() : end], manifest)


def _parse_rows(text: bytes, manifest: Manifest) -> Array | None:
    """Return the inputs of a JSON list of flat instances; None for any other."""
    if text.find(b"[", 1) < 0:
        return None
    spec = manifest.input
    if spec.kind == "columns":
        return None
    rows = parse_numbers(text, (-1, math.prod(spec.shape)), is_unit=spec.kind == "image")
    return None if rows is None else rows.reshape(-1, *spec.shape)


def _decode_pieces(body: bytes, manifest: Manifest, limits: ReadLimits) -> Call:
    """Do what `_decode_object` does, with numbers in pieces.

    The first bracket opens the list of instances and the last one closes it, if what is left without them is valid JSON
    with an empty list for them: nothing else in it has brackets. Pictures are decoded as a whole, as their limits are.
    """
    start, end = body.find(b"[") + 1, body.rfind(b"]")
    is_long = not 0 < start <= end or start + len(body) - end > _MAX_HEADER
    kind = manifest.input.kind  # text may have brackets
    if is_long or kind == "columns" or (kind == "image" and body.find(b"{", start, end) >= 0):
        return _decode_object(body, manifest, limits)
    fields = load_object(body[:start] + body[end:])
    if fields.get("instances") != []:
        return _decode_object(body, manifest, limits)
    parameters = _read_fields(fields, manifest)
    most_values = max(MAX_VALUES, 2 * math.prod(manifest.input.shape))
    pieces: list[Array] = []
    count = 0
    for piece in split_list(body, start, end):
        limits.check()
        check_values(piece, most_values)
        inputs = _parse_rows(b"[%b]" % piece, manifest)
        pieces.append(_read_piece(piece, manifest, count) if inputs is None else inputs)
        count += len(pieces[-1])
        limits.check_rows(count)
    return Call(np.concatenate(pieces), *parameters)


def _read_piece(piece: bytes, manifest: Manifest, first: int) -> Array:
    """Return the inputs of instances that are not plain; `first` is the index of the first of them."""
    try:
        instances = orjson.loads(b"[" + piece + b"]")
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error.msg}, in instances[{first}] or behind it") from error
    if first and not instances:
        raise InvalidRequestError(f"the body is not JSON: there is a comma, and no instances[{first}] behind it")
    return read_instances(unwrap(instances, manifest), manifest, first)


def _decode_object(body: bytes, manifest: Manifest, limits: ReadLimits) -> Call:
    fields = load_object(body)
    parameters = _read_fields(fields, manifest)
    instances = fields["instances"]
    if isinstance(instances, list):
        limits.check_rows(len(instances))
        instances = unwrap(instances, manifest) if instances else instances
        if isinstance(manifest.input, ImageInput) and any(isinstance(instance, dict) for instance in instances):
            return Call(pictures.read_encoded(instances, manifest, limits), *parameters)
    return Call(read_instances(instances, manifest), *parameters)


def _read_fields(fields: dict[str, Any], manifest: Manifest) -> Parameters:
    """Check the fields of a body, and return its parameters; what is TensorFlow Serving's becomes ours."""
    form = read_form(fields, manifest)
    for name in fields:
        if name not in _FIELDS:
            raise InvalidRequestError(f"unknown field {name[:60]!r}; a predict body has instances and parameters")
    if "instances" not in fields:
        raise InvalidRequestError('the body has no "instances"; send {"instances": [...]}')
    return _read_parameters(fields.get("parameters", {}), manifest)._replace(form=form)


def _decode_pictures(body: bytes, manifest: Manifest, content_type: bytes, limits: ReadLimits) -> Call:
    assert isinstance(manifest.input, ImageInput)
    inputs, parameters = pictures.read_pictures(body, manifest.input, content_type, limits)
    return Call(inputs, *_read_parameters(_load_form_field(parameters or b""), manifest))


def _load_form_field(field: bytes) -> object:
    """Decode a form's parameters; a field that was left empty, as browsers send it, has none."""
    try:
        return orjson.loads(field) if field.strip() else {}
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the form's field parameters is not JSON: {error}; send an object") from error


def load_object(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        InvalidRequestError: the body is empty, not JSON (RFC 8259, so no NaN), or not an object.
    """
    if not body.strip():
        raise InvalidRequestError('the body is empty; send {"instances": [...]}')
    return read_object(body.removeprefix(_BYTE_ORDER_MARK), 'an object like {"instances": [...]}')


def _read_parameters(parameters: object, manifest: Manifest) -> Parameters:
    if not isinstance(parameters, dict):
        raise InvalidRequestError(f"parameters is {kind_of(parameters)}, expected an object")
    allowed = _PARAMETERS.get(manifest.task)
    for name in parameters:
        if name != allowed:
            known = f"it takes {allowed}" if allowed else "it takes none"
            raise InvalidRequestError(f"unknown parameter {name[:60]!r} for a {manifest.task} model; {known}")
    encoding = parameters.get("encoding", "list")
    if encoding not in ("list", "base64"):
        raise InvalidRequestError("parameters.encoding is neither list nor base64")
    top_k = _read_top_k(parameters, len(manifest.output.labels))
    return Parameters(_read_threshold(parameters), top_k, encoding == "base64")


def _read_threshold(parameters: dict[str, Any]) -> float | None:
    if "threshold" not in parameters:
        return None
    value = parameters["threshold"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"parameters.threshold is {kind_of(value)}, expected a number in [0, 1]")
    if not 0 <= value <= 1:
        raise InvalidRequestError(f"parameters.threshold is {value}, outside [0, 1]")
    return float(value)


def _read_top_k(parameters: dict[str, Any], labels: int) -> int | None:
    if "top_k" not in parameters:
        return None
    value = parameters["top_k"]
    if isinstance(value, bool) or not isinstance(value, int):
        shown = value if isinstance(value, float) else kind_of(value)
        raise InvalidRequestError(f"parameters.top_k is {shown}, expected a whole number")
    if not 1 <= value <= labels:
        raise InvalidRequestError(f"parameters.top_k is {value}, outside [1, {labels}]")
    return value
