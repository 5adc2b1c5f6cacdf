"""Datatypes of the Open Inference Protocol, and request tensors from JSON or binary data to arrays.

Source: https://github.com/kserve/open-inference-protocol, "Tensor Data", and the binary tensor data extension. Elements
are in row-major order. Binary numbers are little-endian; a BYTES element is a uint32 length followed by that many
bytes. `json_values.parse_numbers` reads plain FP32 data without a Python object per number; `read_json` reads
everything, and names the element that is wrong. A property test checks that they agree.
"""

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.api.json_values import kind_of
from service.api.limits import MAX_VALUES
from service.errors import InvalidRequestError, TooLargeError

Tensor = NDArray[Any]

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
BYTES_LENGTH = struct.Struct("<I")  # precedes each element of binary BYTES data

_JSON_TYPES: dict[str, tuple[set[type], str]] = {  # by the dtype's kind: what orjson gives, and its name in errors
    "b": ({bool}, "true or false"),
    "u": ({int}, "a whole number"),
    "i": ({int}, "a whole number"),
    "f": ({int, float}, "a number"),
    "O": ({str}, "a string"),
}
_MAX_ELEMENTS = 2**31
_MAX_DIMENSIONS = 16


def read_datatype(value: object, where: str) -> str:
    """Return a known datatype.

    Raises:
        InvalidRequestError: it is not a string, or not one of the protocol's.
    """
    if not isinstance(value, str) or value not in DATATYPES:
        shown = repr(value[:40]) if isinstance(value, str) else kind_of(value)
        raise InvalidRequestError(f"{where}.datatype is {shown}, expected one of {', '.join(DATATYPES)}")
    return value


def read_shape(value: object, where: str) -> tuple[int, ...]:
    """Return a shape of at most 16 dimensions and 2³¹ elements.

    Raises:
        InvalidRequestError: it is not a list of whole numbers from 0, or too large.
    """
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        raise InvalidRequestError(f"{where}.shape is not a list of at most {_MAX_DIMENSIONS} whole numbers")
    for index, size in enumerate(value):
        if type(size) is not int or size < 0:
            shown = size if type(size) in (int, float) else kind_of(size)
            raise InvalidRequestError(f"{where}.shape[{index}] is {shown}, expected a whole number from 0")
    if math.prod(filter(None, value)) > _MAX_ELEMENTS:  # without zeros: numpy's sizes overflow even beside one
        raise InvalidRequestError(f"{where}.shape {value} has more than {_MAX_ELEMENTS} elements")
    return tuple(value)


def read_json(data: object, datatype: str, shape: tuple[int, ...], where: str) -> Tensor:
    """Return the tensor of decoded JSON data, flat or nested.

    Raises:
        InvalidRequestError: an element has another type or is out of range, or count or nesting differ from the shape.
    """
    if datatype == "FP16":
        raise InvalidRequestError(f"{where}.data cannot carry FP16 as JSON; send the tensor as binary data")
    flat = _list_elements(data, shape, where)
    _check_elements(flat, datatype, f"{where}.data")
    if datatype == "BYTES":
        tensor = np.empty(len(flat), dtype=object)
        tensor[:] = list(map(str.encode, flat))
        return tensor.reshape(shape)
    with np.errstate(over="ignore"):
        tensor = np.array(flat, dtype=DATATYPES[datatype]).reshape(shape)
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        index = int(np.flatnonzero(~np.isfinite(tensor.reshape(-1)))[0])
        raise InvalidRequestError(f"{where}.data[{index}] is not a finite number that {datatype} can hold")
    return tensor


def read_values(data: object, shape: tuple[int, ...], where: str) -> Tensor:
    """Return decoded JSON data, flat or nested, as objects: any JSON values, whatever the datatype.

    Raises:
        InvalidRequestError: count or nesting differ from the shape.
    """
    flat = _list_elements(data, shape, where)
    return np.fromiter(flat, object, len(flat)).reshape(shape)


def _list_elements(data: object, shape: tuple[int, ...], where: str) -> list[Any]:
    if not isinstance(data, list):
        raise InvalidRequestError(f"{where}.data is {kind_of(data)}, expected a list")
    flat = data if not data or not isinstance(data[0], list) else _flatten(data, shape, f"{where}.data")
    if len(flat) != math.prod(shape):
        raise InvalidRequestError(
            f"{where}.data has {len(flat)} elements, its shape {list(shape)} has {math.prod(shape)}"
        )
    return flat


def _flatten(data: list[Any], shape: tuple[int, ...], where: str) -> list[Any]:
    """Return the elements of data nested exactly as the shape says."""
    if not shape or len(data) != shape[0]:
        raise InvalidRequestError(f"{where} has {len(data)} parts, the shape says {list(shape[:1])}")
    if len(shape) == 1:
        return data
    flat: list[Any] = []
    for index, part in enumerate(data):
        if not isinstance(part, list):
            raise InvalidRequestError(f"{where}[{index}] is {kind_of(part)}, expected a list of {shape[1]}")
        flat += _flatten(part, shape[1:], f"{where}[{index}]")
    return flat


def _check_elements(flat: list[Any], datatype: str, where: str) -> None:
    """Check types, and the range of integers: all elements at once, then one by one to find the one to report."""
    kind = DATATYPES[datatype].kind
    types, expected = _JSON_TYPES[kind]
    low, high = -math.inf, math.inf
    if kind in "ui":
        limits = np.iinfo(DATATYPES[datatype])
        low, high = int(limits.min), int(limits.max)
    if set(map(type, flat)) <= types and (kind not in "ui" or not flat or (min(flat) >= low and max(flat) <= high)):
        return
    for index, element in enumerate(flat):
        if type(element) not in types:
            shown = element if kind in "ui" and isinstance(element, float) else kind_of(element)
            raise InvalidRequestError(f"{where}[{index}] is {shown}, expected {expected} for {datatype}")
        if kind in "ui" and not low <= element <= high:
            shown = f"{element}, outside {datatype}'s range {low} to {high}"
            raise InvalidRequestError(f"{where}[{index}] is {shown}")


def read_binary(data: bytes | memoryview, datatype: str, shape: tuple[int, ...], where: str) -> Tensor:
    """Return the tensor of binary data; numbers are a read-only view of it.

    Raises:
        InvalidRequestError: its length differs from the shape's, or a BOOL is neither 0 nor 1.
        TooLargeError: it has too many BYTES.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _read_strings(bytes(data), count, where).reshape(shape)
    dtype = DATATYPES[datatype]
    if len(data) != count * dtype.itemsize:
        expected = f"{datatype} of shape {list(shape)} has {count * dtype.itemsize}"
        raise InvalidRequestError(f"{where} has {len(data)} bytes of binary data, {expected}")
    if datatype == "BOOL" and count and np.frombuffer(data, np.uint8).max() > 1:
        raise InvalidRequestError(f"{where} has a BOOL byte that is neither 0 nor 1")
    return np.frombuffer(data, dtype).reshape(shape)


def _read_strings(data: bytes, count: int, where: str) -> Tensor:
    if count * BYTES_LENGTH.size > len(data):
        raise InvalidRequestError(f"{where} has too few bytes of binary data for {count} BYTES elements")
    if count > MAX_VALUES:
        raise TooLargeError(f"{where} has {count} BYTES elements; at most {MAX_VALUES} are taken at once")
    tensor = np.empty(count, dtype=object)
    position = 0
    for index in range(count):
        end = position + BYTES_LENGTH.size
        if end > len(data):
            raise InvalidRequestError(f"{where} ends before its BYTES element {index}")
        (length,) = BYTES_LENGTH.unpack_from(data, position)
        if end + length > len(data):
            raise InvalidRequestError(f"{where} ends within its BYTES element {index}")
        tensor[index] = data[end : end + length]
        position = end + length
    if position != len(data):
        raise InvalidRequestError(f"{where} has {len(data) - position} bytes left over after its last BYTES element")
    return tensor
