"""Decode the typed API's requests: `{"instances": …, "parameters": …}` or pictures to float32 (N, *shape).

The plain case, `{"instances": [[number, ...], ...]}`, goes from bytes to an array without a Python object per number
(simdjson, https://arxiv.org/abs/1902.08318). Everything else is decoded by orjson and read by `instances`, which has
the sentence for whatever is wrong.
"""

import math
import re
import time
from typing import Any, NamedTuple

import numpy as np
import orjson

from service.api.headers import JSON_TYPES, RequestHeaders
from service.api.json_values import LARGE_BODY, fast_json, kind_of, read_object
from service.api.v1 import pictures
from service.api.v1.instances import read_instances
from service.errors import InvalidRequestError
from service.model.backends import Array
from service.model.manifest import AnyManifest, ImageInput, Manifest

_FIELDS = ("instances", "parameters")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # a reader may ignore it, RFC 8259 section 8.1
_ONE_BITS = np.float64(1).view(np.uint64)
_LARGEST_BITS = np.float64(np.finfo(np.float32).max).view(np.uint64)
_ABSOLUTE_BITS = np.uint64(2**63 - 1)
_LONG_BODY = 2**10
_PIECE_BYTES = 2**16
_PAUSE_SECONDS = 0.0001  # gives the interpreter's lock away; only asking for it back would slow the event loop
_OPENING = re.compile(rb'\s*\{\s*"instances"\s*:\s*\[')
_CLOSING = re.compile(rb"\]\s*\}\s*\Z")
_COMMA = re.compile(rb"\s*,")


class Call(NamedTuple):
    """One decoded predict request: inputs float32 (N, *shape), and its parameters where they were sent.

    `timeout` is always None: a request of this API sets it by the header field `X-Request-Timeout`.
    """

    inputs: Array
    threshold: float | None = None
    top_k: int | None = None
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


def decode(body: bytes, manifest: AnyManifest, headers: RequestHeaders) -> Call:
    """Decode the body of a predict request.

    Raises:
        InvalidRequestError: the model has no task, or the body, a value or a parameter cannot be used; the sentence
            says which and why.
    """
    if not isinstance(manifest, Manifest):
        raise InvalidRequestError(
            f"{manifest.name} has no task, only tensors; send them to /v2/models/{manifest.name}/infer"
        )
    if headers.content_type not in JSON_TYPES and pictures.is_picture(headers.content_type):
        return _decode_pictures(body, manifest, headers.content_type)
    inputs = parse_instances(body, manifest) if len(body) < LARGE_BODY else parse_large(body, manifest)
    return Call(inputs) if inputs is not None else _decode_object(body, manifest)


def parse_instances(body: bytes, manifest: Manifest) -> Array | None:  # noqa: PLR0911 - a reason each
    """Return the inputs float32 (N, *shape) of a plain predict body, or None when the body is anything but plain."""
    parse = fast_json.parse
    if parse is None:
        return None
    wide = math.prod(manifest.input.shape)
    try:
        document: Any = parse(body)
        instances = document["instances"]
        count = len(instances)
        # A document of one key whose list holds `count` rows and no further bracket: no nesting can hide in it.
        if len(document) != 1 or count == 0:
            return None
        if count > 1 or len(body) < _LONG_BODY:
            nests = body.count(b"[") != count + 1
        else:  # to search a long body for one byte takes a tenth of the time of counting it
            nests = body.find(b"[", body.find(b"[", body.find(b"[") + 1) + 1) >= 0
        if nests:
            return None
        for row in instances:
            if len(row) != wide:
                return None
        numbers = np.frombuffer(instances.as_buffer(of_type="d"), dtype=np.float64)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return None
    # Non-negative IEEE 754 numbers are ordered as their bits are, and a sign, an infinity or a NaN has larger bits:
    # one pass over the bits does the work of two comparisons and a test for NaN. It may decline a number on the edge.
    bits = numbers.view(np.uint64)
    if manifest.input.kind == "image":
        is_in_range = np.maximum.reduce(bits) <= _ONE_BITS
    else:
        is_in_range = np.maximum.reduce(bits & _ABSOLUTE_BITS) <= _LARGEST_BITS
    if not is_in_range:
        return None
    return numbers.astype(np.float32).reshape(count, *manifest.input.shape)


def parse_large(body: bytes, manifest: Manifest) -> Array | None:
    """Do what `parse_instances` does in pieces of whole rows, for a thread beside the event loop.

    simdjson holds the interpreter's lock while it parses, 5 ms for a megabyte; between pieces others get a turn.
    """
    start, end = _OPENING.match(body), _CLOSING.search(body, max(0, len(body) - _PIECE_BYTES))
    if start is None or end is None:
        return None
    position, pieces = start.end(), []
    while position < end.start():
        cut = body.find(b"]", position + _PIECE_BYTES, end.start())
        if cut < 0:
            cut = body.rfind(b"]", position, end.start())
        piece = parse_instances(b'{"instances":[' + body[position : cut + 1] + b"]}", manifest)
        comma = _COMMA.match(body, cut + 1, end.start())
        if piece is None or (comma is None and body[cut + 1 : end.start()].strip()):
            return None
        pieces.append(piece)
        time.sleep(_PAUSE_SECONDS)
        position = comma.end() if comma else end.start()
    return np.concatenate(pieces) if pieces and comma is None else None


def _decode_object(body: bytes, manifest: Manifest) -> Call:
    fields = load_object(body)
    for name in fields:
        if name not in _FIELDS:
            raise InvalidRequestError(f"unknown field {name[:60]!r}; a predict body has instances and parameters")
    if "instances" not in fields:
        raise InvalidRequestError('the body has no "instances"; send {"instances": [...]}')
    threshold, top_k = _read_parameters(fields.get("parameters", {}), manifest)
    instances = fields["instances"]
    if isinstance(manifest.input, ImageInput):
        instances = pictures.replace_encoded(instances, manifest.input)
    return Call(read_instances(instances, manifest), threshold, top_k)


def _decode_pictures(body: bytes, manifest: Manifest, content_type: bytes) -> Call:
    assert isinstance(manifest.input, ImageInput)
    inputs, parameters = pictures.read_pictures(body, manifest.input, content_type)
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


def _read_parameters(parameters: object, manifest: Manifest) -> tuple[float | None, int | None]:
    if not isinstance(parameters, dict):
        raise InvalidRequestError(f"parameters is {kind_of(parameters)}, expected an object")
    allowed = {"binary": ("threshold",), "multiclass": ("top_k",), "regression": ()}[manifest.task]
    for name in parameters:
        if name not in allowed:
            known = f"it takes {allowed[0]}" if allowed else "it takes none"
            raise InvalidRequestError(f"unknown parameter {name[:60]!r} for a {manifest.task} model; {known}")
    return _read_threshold(parameters), _read_top_k(parameters, len(manifest.output.labels))


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
