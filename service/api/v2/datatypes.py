"""Datatypes of the Open Inference Protocol, and request tensors from JSON or binary data to arrays.

Source: https://github.com/kserve/open-inference-protocol, "Tensor Data", and the binary tensor data extension. Elements
are in row-major order. Binary numbers are little-endian; a BYTES element is a uint32 length followed by that many
bytes. `parse_json` reads plain FP32 data without a Python object per number; `read_json` reads everything, and names
the element that is wrong. A property test checks that they agree.
"""

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.api.json_values import fast_json, kind_of, split_list
from service.api.limits import MAX_VALUES, check_values
from service.errors import InvalidRequestError, TooLargeError
from service.model.backends import Array

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
_NUMBER_BYTES = b"0123456789+-.eE \t\r\n"
_FLOAT32_MAX = float(np.finfo(np.float32).max)
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


def parse_json(data: bytes, shape: tuple[int, ...]) -> Array | None:
    """Return the FP32 tensor of a JSON list of numbers, or None if `read_json` has to read or refuse it.

    Args:
        data: the bytes of the list, flat or nested as the shape says; a first size of -1 is whatever the list has.
        shape: of the tensor.
    """
    if fast_json.parse is None:
        return None
    try:
        numbers = np.frombuffer(fast_json.parse(data).as_buffer(of_type="d"), dtype=np.float64)
    except (ValueError, TypeError, AttributeError, RuntimeError):
        return None
    if shape and shape[0] < 0:
        shape = (numbers.size // math.prod(shape[1:]), *shape[1:])
    if not numbers.size or numbers.size != math.prod(shape) or np.maximum.reduce(np.abs(numbers)) > _FLOAT32_MAX:
        return None
    # as_buffer flattens, so the nesting is checked by what is left without the numbers: brackets and commas.
    if data.find(b"[", 1) >= 0 and data.translate(None, _NUMBER_BYTES) != _build_brackets(shape):
        return None
    return numbers.astype(np.float32).reshape(shape)


def parse_large_json(data: bytes, shape: tuple[int, ...], check: Callable[[], object]) -> Array | None:
    """Do what `parse_json` does in pieces, calling `check` before each.

    Raises:
        TooLargeError: a piece has more numbers than the tensor.
    """
    count = math.prod(shape)
    if not count or data[:1] != b"[":
        return None
    rest = shape[1:] if data[1:100].lstrip()[:1] == b"[" else ()
    pieces: list[Array] = []
    for piece in split_list(data, 1, len(data) - 1):
        check()
        check_values(piece, max(MAX_VALUES, 2 * count))
        numbers = parse_json(b"[%b]" % piece, (-1, *rest))
        if numbers is None or numbers.size > count:
            return None
        pieces.append(numbers.reshape(-1))
        count -= numbers.size
    return np.concatenate(pieces).reshape(shape) if count == 0 else None


def _build_brackets(shape: tuple[int, ...]) -> bytes:
    """Return JSON nested as a shape says, without its numbers: `[[,],[,]]` for (2, 2)."""
    text = b""
    for size in reversed(shape):
        text = b"[%b]" % b",".join([text] * size)
    return text


def read_json(data: object, datatype: str, shape: tuple[int, ...], where: str) -> Tensor:
    """Return the tensor of decoded JSON data, flat or nested.

    Raises:
        InvalidRequestError: an element has another type or is out of range, or count or nesting differ from the shape.
    """
    if datatype == "FP16":
        raise InvalidRequestError(f"{where}.data cannot carry FP16 as JSON; send the tensor as binary data")
    if not isinstance(data, list):
        raise InvalidRequestError(f"{where}.data is {kind_of(data)}, expected a list")
    flat = data if not data or not isinstance(data[0], list) else _flatten(data, shape, f"{where}.data")
    if len(flat) != math.prod(shape):
        raise InvalidRequestError(
            f"{where}.data has {len(flat)} elements, its shape {list(shape)} has {math.prod(shape)}"
        )
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


def read_binary(data: bytes, datatype: str, shape: tuple[int, ...], where: str) -> Tensor:
    """Return the tensor of binary data; numbers are a read-only view of it.

    Raises:
        InvalidRequestError: its length differs from the shape's, or a BOOL is neither 0 nor 1.
        TooLargeError: it has too many BYTES.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _read_strings(data, count, where).reshape(shape)
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
