"""The typed API's bodies: `{"instances": …, "parameters": …}` in, `{"model", "version", "predictions"}` out."""

from typing import Any, NamedTuple

import numpy as np
import orjson

from service.api.headers import RequestHeaders
from service.api.v1 import pictures
from service.api.v1.instances import kind_of, parse_instances, parse_large, read_instances, read_object
from service.errors import InvalidRequestError
from service.model import postprocess
from service.model.backends import Array
from service.model.manifest import AnyManifest, ImageInput, Manifest

LARGE_BODY = 2**18  # bytes; reading such a body would hold the event loop for a millisecond or more
_FIELDS = ("instances", "parameters")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # a reader may ignore it, RFC 8259 section 8.1
_JSON = b"content-type: application/json\r\n"
_NUMPY = orjson.OPT_SERIALIZE_NUMPY


class Call(NamedTuple):
    """One decoded predict request: inputs float32 (N, *shape), and its parameters where they were sent."""

    inputs: Array
    threshold: float | None = None
    top_k: int | None = None

    @property
    def timeout(self) -> float | None:
        """Seconds that the request gives itself: this API has the header field `X-Request-Timeout` for it."""
        return None


def is_heavy(body: bytes, head: RequestHeaders) -> bool:
    """Tell whether reading a body takes so long that it belongs in a thread."""
    if head.content_type and pictures.is_picture(head.content_type):
        return True
    return len(body) >= LARGE_BODY or _may_hold_picture(body)


def _may_hold_picture(body: bytes) -> bool:
    """Tell whether JSON has the key "b64", perhaps spelled with escapes; soon told of a body with the one plain key."""
    end = body.find(b'"', body.find(b'"') + 1)
    return body.find(b'"', end + 1) >= 0 and (b'b64"' in body or b"\\u" in body)


def decode(body: bytes, manifest: AnyManifest, head: RequestHeaders) -> Call:
    """Read a predict request's body; see `decode_call`."""
    return decode_call(body, check_task(manifest), head.content_type)


def encode(results: Array, manifest: AnyManifest, call: Call) -> tuple[bytes, bytes]:
    """Return header lines and body of the answer; see `encode_results`."""
    return _JSON, encode_results(results, check_task(manifest), call)


def check_task(manifest: AnyManifest) -> Manifest:
    """Return the manifest of a model that has a task.

    Raises:
        InvalidRequestError: it has none, and so no instances and no predictions.
    """
    if isinstance(manifest, Manifest):
        return manifest
    raise InvalidRequestError(
        f"{manifest.name} has no task, only tensors; send them to /v2/models/{manifest.name}/infer"
    )


def decode_call(body: bytes, manifest: Manifest, content_type: bytes = b"") -> Call:
    """Read a predict body.

    Raises:
        InvalidRequestError: the body, a value or a parameter cannot be used; the sentence says which and why.
    """
    if content_type and isinstance(manifest.input, ImageInput) and pictures.is_picture(content_type):
        return _decode_pictures(body, manifest, content_type)
    inputs = parse_instances(body, manifest) if len(body) < LARGE_BODY else parse_large(body, manifest)
    if inputs is not None:
        return Call(inputs)
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


def encode_results(results: Array, manifest: Manifest, call: Call) -> bytes:
    """Return the answer's body for a graph's outputs float32 (N, K).

    Numbers are written as the shortest decimal that reads back as the same float32.
    """
    answer = {
        "model": manifest.name,
        "version": manifest.version,
        "predictions": build_predictions(results, manifest, call),
    }
    return orjson.dumps(answer, option=_NUMPY)


def encode_preview(inputs: Array, manifest: AnyManifest) -> bytes:
    """Return the body that shows instances as the graph is given them; of many, others get a turn between any two."""
    about = orjson.dumps({"model": manifest.name, "version": manifest.version})
    rows = b",".join(orjson.dumps(row, option=_NUMPY) for row in inputs)
    return b'%b,"instances":[%b]}' % (about[:-1], rows)


def build_predictions(results: Array, manifest: Manifest, call: Call) -> list[dict[str, Any]]:
    """Return one prediction per row, in the words of the manifest's task."""
    if manifest.task == "regression":
        return [{"prediction": value} for value in results[:, 0]]
    labels = manifest.output.labels
    results = postprocess.interpret(results, manifest)
    indices = postprocess.decide(results, manifest, call.threshold).tolist()
    if manifest.task == "binary":
        # "probability" is that of the second label, the one the threshold speaks of, whichever label is predicted.
        return [
            {"prediction": index, "label": labels[index], "probability": row[1], "probabilities": row}
            for index, row in zip(indices, results, strict=True)
        ]
    predictions: list[dict[str, Any]] = [
        {"prediction": index, "label": labels[index], "probability": row[index], "probabilities": row}
        for index, row in zip(indices, results, strict=True)
    ]
    if call.top_k is not None:
        for prediction, row in zip(predictions, results, strict=True):
            prediction["top_k"] = _best(row, call.top_k, labels)
    return predictions


def _best(row: Array, top_k: int, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    order = np.argsort(-row, kind="stable")[:top_k].tolist()
    return [{"prediction": index, "label": labels[index], "probability": row[index]} for index in order]
