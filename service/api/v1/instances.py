"""Decoded JSON instances to float32 (N, *shape), with a sentence for whatever is wrong with them.

`service.api.v1.decode` reads the plain case, faster and without a Python object per number. It declines everything
else, which comes here. Where both read a body they give the same array; a property test holds them together.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.api.json_values import kind_of
from service.api.v1.columns import read_columns
from service.errors import InvalidRequestError
from service.model.backends import Array
from service.model.manifest import ColumnsInput, ImageInput, Manifest, TabularInput

_NUMBERS = {int, float}
_PIXEL_HINT = "pixels are numbers from 0 (paper) to 1 (ink); divide bytes by 255"


def read_instances(instances: object, manifest: Manifest, first: int = 0) -> Array:
    """Return the inputs float32 (N, *shape) of decoded instances, or the rows of a model with columns.

    Args:
        instances: decoded JSON.
        manifest: of the model.
        first: index of the first of them in the request.

    Raises:
        InvalidRequestError: with where and what is wrong, such as `instances[3] has 783 values, expected 784`.
    """
    if not isinstance(instances, list):
        raise InvalidRequestError(f"instances is {kind_of(instances)}, expected a list of instances")
    if not instances:
        raise InvalidRequestError("instances is empty; send at least one instance")
    if isinstance(manifest.input, ColumnsInput):
        return read_columns(instances, manifest.input, (manifest.name, manifest.version), first)
    rows = [
        _read_instance(instance, manifest, f"instances[{index}]") for index, instance in enumerate(instances, first)
    ]
    inputs = _to_float32(np.array(rows, dtype=np.float64)).reshape(len(rows), *manifest.input.shape)
    if not _is_in_range(inputs, manifest):
        raise _out_of_range(inputs.reshape(len(rows), -1), manifest, first)
    return inputs


def _read_instance(instance: object, manifest: Manifest, where: str) -> Sequence[float]:
    if isinstance(manifest.input, ImageInput):
        return _read_pixels(instance, manifest.input, where)
    assert isinstance(manifest.input, TabularInput)
    features = manifest.input.features
    if isinstance(instance, dict):
        return _read_features(instance, [feature.name for feature in features], where)
    if not isinstance(instance, list):
        if len(features) == 1 and type(instance) in _NUMBERS:  # as TensorFlow Serving's clients send it
            return [_read_number(instance, where)]
        names = ", ".join(feature.name for feature in features)
        raise InvalidRequestError(f"{where} is {kind_of(instance)}, expected a list of numbers or an object of {names}")
    _check_length(instance, len(features), where, "values")
    return _read_numbers(instance, where)


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
        return _read_numbers(instance, where)
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
    if not isinstance(value, list):
        raise InvalidRequestError(f"{where} is {kind_of(value)}, expected a list of {shape[0]}")
    _check_length(value, shape[0], where, "values" if len(shape) == 1 else "rows")
    if len(shape) == 1:
        into += _read_numbers(value, where)
        return
    for index, part in enumerate(value):
        _read_nested(part, shape[1:], f"{where}[{index}]", into)


def _read_numbers(values: list[Any], where: str) -> list[float]:
    if set(map(type, values)) <= _NUMBERS:  # numpy converts them
        return values
    return [_read_number(value, f"{where}[{index}]") for index, value in enumerate(values)]


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


def _to_float32(numbers: NDArray[np.float64]) -> Array:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        return numbers.astype(np.float32)


def _is_in_range(inputs: Array, manifest: Manifest) -> bool:
    if manifest.input.kind == "image":
        return bool(inputs.min() >= 0 and inputs.max() <= 1)
    return bool(np.isfinite(inputs).all())


def _out_of_range(rows: Array, manifest: Manifest, first: int) -> InvalidRequestError:
    good = np.isfinite(rows)
    if good.all():
        good = (rows >= 0) & (rows <= 1)
    index, column = (int(place[0]) for place in np.nonzero(~good))
    value = rows[index, column]
    where = f"instances[{first + index}][{column}]"
    if not np.isfinite(value):
        return InvalidRequestError(f"{where} is not a finite number that float32 can hold")
    assert manifest.input.kind == "image"
    return InvalidRequestError(f"{where} is {value:g}, outside [0, 1]; {_PIXEL_HINT}")
