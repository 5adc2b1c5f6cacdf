"""Numbers on the wire to arrays: instances of the typed API to float32 (N, *shape).

Two readers of one grammar. `parse_instances` reads the plain case, `{"instances": [[number, ...], ...]}`, from bytes to
array without a Python object per number (simdjson, https://arxiv.org/abs/1902.08318), and says None to anything else.
`read_instances` reads every case from decoded JSON and has the sentence for what is wrong. Where the first answers,
the second gives the same array; a property test holds them together.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import InvalidRequestError
from service.model.backends import Array
from service.model.manifest import ImageInput, Manifest

_new_parser: Callable[[], Any] | None
try:
    import simdjson
except ImportError:  # no wheel for this Python: every body takes the other reader
    _new_parser = None
else:
    _new_parser = simdjson.Parser

Numbers = NDArray[np.float64]

_ONE_BITS = np.float64(1).view(np.uint64)
_LARGEST_BITS = np.float64(np.finfo(np.float32).max).view(np.uint64)
_ABSOLUTE_BITS = np.uint64(2**63 - 1)
_PIECE_BYTES = 2**16
_PAUSE_SECONDS = 0.0001  # asking for the lock back costs the event loop a wait at every callback; this gives it away
_OPENING = re.compile(rb'\s*\{\s*"instances"\s*:\s*\[')
_CLOSING = re.compile(rb"\]\s*\}\s*\Z")
_COMMA = re.compile(rb"\s*,")
_PIXEL_HINT = "pixels are numbers from 0 (paper) to 1 (ink); divide bytes by 255"


def parse_instances(body: bytes, manifest: Manifest) -> Array | None:
    """Return the inputs float32 (N, *shape) of a plain predict body, or None when the body is anything but plain."""
    if _new_parser is None:
        return None
    wide = math.prod(manifest.input.shape)
    try:
        document: Any = _new_parser().parse(body)
        instances = document["instances"]
        count = len(instances)
        # A document of one key whose list holds `count` rows and no further bracket: no nesting can hide in it.
        if len(document) != 1 or count == 0 or body.count(b"[") != count + 1:
            return None
        for row in instances:
            if len(row) != wide:
                return None
        numbers = np.frombuffer(instances.as_buffer(of_type="d"), dtype=np.float64)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return None
    if not _is_plain(numbers, manifest):
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


def _is_plain(numbers: Numbers, manifest: Manifest) -> bool:
    """Tell whether all numbers are in [0, 1] (image) or within float32 (tabular); may say no to a number on the edge.

    Non-negative IEEE 754 numbers are ordered as their bits are, and a sign, an infinity or a NaN has larger bits: one
    pass over the bits does what would take two comparisons and a test for NaN.
    """
    bits = numbers.view(np.uint64)
    if manifest.input.kind == "image":
        return bool(np.maximum.reduce(bits) <= _ONE_BITS)
    return bool(np.maximum.reduce(bits & _ABSOLUTE_BITS) <= _LARGEST_BITS)


def read_instances(instances: object, manifest: Manifest) -> Array:
    """Return the inputs float32 (N, *shape) of decoded instances.

    Raises:
        InvalidRequestError: with where and what is wrong, such as `instances[3] has 783 values, expected 784`.
    """
    if not isinstance(instances, list):
        raise InvalidRequestError(f"instances is {kind_of(instances)}, expected a list of instances")
    if not instances:
        raise InvalidRequestError("instances is empty; send at least one instance")
    rows = [_read_instance(instance, manifest, f"instances[{index}]") for index, instance in enumerate(instances)]
    inputs = _to_float32(np.array(rows, dtype=np.float64)).reshape(len(rows), *manifest.input.shape)
    if not _is_in_range(inputs, manifest):
        raise _out_of_range(inputs.reshape(len(rows), -1), manifest)
    return inputs


def read_object(body: bytes, wanted: str = "an object") -> dict[str, Any]:
    """Return the JSON object that a body is.

    Raises:
        InvalidRequestError: it is not JSON, or another kind of value; `wanted` says what was expected.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"the body is {kind_of(fields)}, expected {wanted}")
    return fields


def kind_of(value: object) -> str:
    """Return what a decoded JSON value is, in JSON's words."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds[type(value)]


def _read_instance(instance: object, manifest: Manifest, where: str) -> Sequence[float]:
    if isinstance(manifest.input, ImageInput):
        return _read_pixels(instance, manifest.input, where)
    features = manifest.input.features
    if isinstance(instance, dict):
        return _read_features(instance, [feature.name for feature in features], where)
    if not isinstance(instance, list):
        names = ", ".join(feature.name for feature in features)
        raise InvalidRequestError(f"{where} is {kind_of(instance)}, expected a list of numbers or an object of {names}")
    _check_length(instance, len(features), where, "values")
    return [_read_number(value, f"{where}[{column}]") for column, value in enumerate(instance)]


def _read_features(instance: Mapping[str, Any], names: list[str], where: str) -> list[float]:
    for name in instance:
        if name not in names:
            raise InvalidRequestError(f"{where} has an unknown feature {name[:60]!r}; expected {', '.join(names)}")
    for name in names:
        if name not in instance:
            raise InvalidRequestError(f"{where} lacks the feature {name!r}; expected {', '.join(names)}")
    return [_read_number(instance[name], f"{where}.{name}") for name in names]


def _read_pixels(instance: object, spec: ImageInput, where: str) -> list[float]:
    """Read one picture: flat, or nested in one of the ways of `nested_shapes`."""
    image = spec.image
    flat = math.prod(spec.shape)
    if not isinstance(instance, list):
        raise InvalidRequestError(
            f"{where} is {kind_of(instance)}, expected {flat} numbers, flat or as {image.height} rows of {image.width}"
        )
    if instance and not isinstance(instance[0], list):
        _check_length(instance, flat, where, "values")
        return [_read_number(value, f"{where}[{index}]") for index, value in enumerate(instance)]
    shapes = nested_shapes(spec)
    depth = _depth(instance)
    numbers: list[float] = []
    _read_nested(instance, next((shape for shape in shapes if len(shape) == depth), shapes[0]), where, numbers)
    return numbers


def nested_shapes(spec: ImageInput) -> list[tuple[int, ...]]:
    """Return how one picture may be nested, the plainest first: as rows of pixels, and as the input's shape.

    Each has the numbers in the order of the input's shape, so rows of pixels are not a way to send channels that the
    shape has first.
    """
    image = spec.image
    rows = (image.height, image.width) if image.channels == 1 else (image.height, image.width, image.channels)
    if len(spec.shape) == 1:
        return [rows]
    return [rows, spec.shape] if image.channels == 1 and rows != spec.shape else [spec.shape]


def _depth(value: object) -> int:
    depth = 0
    while isinstance(value, list):
        depth += 1
        value = value[0] if value else None
    return depth


def _read_nested(value: object, shape: tuple[int, ...], where: str, into: list[float]) -> None:
    if not shape:
        into.append(_read_number(value, where))
        return
    if not isinstance(value, list):
        raise InvalidRequestError(f"{where} is {kind_of(value)}, expected a list of {shape[0]}")
    _check_length(value, shape[0], where, "values" if len(shape) == 1 else "rows")
    for index, part in enumerate(value):
        _read_nested(part, shape[1:], f"{where}[{index}]", into)


def _read_number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"{where} is {kind_of(value)}, expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_length(values: Sequence[object], expected: int, where: str, what: str) -> None:
    if len(values) != expected:
        raise InvalidRequestError(f"{where} has {len(values)} {what}, expected {expected}")


def _to_float32(numbers: Numbers) -> Array:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        return numbers.astype(np.float32)


def _is_in_range(inputs: Array, manifest: Manifest) -> bool:
    if manifest.input.kind == "image":
        return bool(inputs.min() >= 0 and inputs.max() <= 1)
    return bool(np.isfinite(inputs).all())


def _out_of_range(rows: Array, manifest: Manifest) -> InvalidRequestError:
    good = np.isfinite(rows)
    if good.all():
        good = (rows >= 0) & (rows <= 1)
    index, column = (int(place[0]) for place in np.nonzero(~good))
    value = rows[index, column]
    where = f"instances[{index}][{column}]"
    if not np.isfinite(value):
        return InvalidRequestError(f"{where} is not a finite number that float32 can hold")
    assert manifest.input.kind == "image"
    return InvalidRequestError(f"{where} is {value:g}, outside [0, 1]; {_PIXEL_HINT}")
