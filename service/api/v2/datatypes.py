"""Tensors of the Open Inference Protocol: datatypes, and numbers or bytes on the wire to arrays and back.

Source: https://github.com/kserve/open-inference-protocol, "Tensor Data" and the binary tensor data extension. All
elements are row-major; binary numbers are little-endian; a BYTES element is a uint32 length and that many bytes.
"""

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.api.v1.instances import kind_of
from service.errors import InvalidRequestError

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
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_MAX_ELEMENTS = 2**31
_MAX_DIMENSIONS = 16
_LENGTH = struct.Struct("<I")


def datatype_of(tensor: Tensor) -> str:
    """Return the protocol's name of an array's dtype."""
    return _NAMES[tensor.dtype.newbyteorder("<") if tensor.dtype != object else tensor.dtype]


def read_datatype(value: object, where: str) -> str:
    """Return a datatype that is known.

    Raises:
        InvalidRequestError: it is not a string, or not one of the protocol's.
    """
    if not isinstance(value, str) or value not in DATATYPES:
        shown = repr(value[:40]) if isinstance(value, str) else kind_of(value)
        raise InvalidRequestError(f"{where}.datatype is {shown}, expected one of {', '.join(DATATYPES)}")
    return value


def read_shape(value: object, where: str) -> tuple[int, ...]:
    """Return a shape whose elements can be counted.

    Raises:
        InvalidRequestError: not a list of whole numbers from 0, or more elements than any body could hold.
    """
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        raise InvalidRequestError(f"{where}.shape is not a list of at most {_MAX_DIMENSIONS} whole numbers")
    for index, size in enumerate(value):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            shown = size if isinstance(size, int | float) and not isinstance(size, bool) else kind_of(size)
            raise InvalidRequestError(f"{where}.shape[{index}] is {shown}, expected a whole number from 0")
    if math.prod(size or 1 for size in value) > _MAX_ELEMENTS:  # Python's integers do not overflow; numpy's sizes do
        raise InvalidRequestError(f"{where}.shape {value} has more than {_MAX_ELEMENTS} elements")
    return tuple(value)


def read_json(data: object, datatype: str, shape: tuple[int, ...], where: str) -> Tensor:
    """Return the tensor of JSON data, flat or nested.

    Raises:
        InvalidRequestError: an element is of another kind or out of range, or count or nesting is not the shape's.
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
    check = _CHECKS[DATATYPES[datatype].kind]
    for index, element in enumerate(flat):
        check(element, datatype, f"{where}.data[{index}]")
    if datatype == "BYTES":
        tensor = np.empty(len(flat), dtype=object)
        tensor[:] = [element.encode() for element in flat]
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


def _check_bool(element: object, datatype: str, where: str) -> None:
    if not isinstance(element, bool):
        raise InvalidRequestError(f"{where} is {kind_of(element)}, expected true or false for {datatype}")


def _check_integer(element: object, datatype: str, where: str) -> None:
    if isinstance(element, bool) or not isinstance(element, int):
        shown = element if isinstance(element, float) else kind_of(element)
        raise InvalidRequestError(f"{where} is {shown}, expected a whole number for {datatype}")
    limits = np.iinfo(DATATYPES[datatype])
    if not limits.min <= element <= limits.max:
        raise InvalidRequestError(f"{where} is {element}, outside {datatype}'s range {limits.min} to {limits.max}")


def _check_number(element: object, datatype: str, where: str) -> None:
    if isinstance(element, bool) or not isinstance(element, int | float):
        raise InvalidRequestError(f"{where} is {kind_of(element)}, expected a number for {datatype}")


def _check_string(element: object, datatype: str, where: str) -> None:
    if not isinstance(element, str):
        raise InvalidRequestError(f"{where} is {kind_of(element)}, expected a string for {datatype}")


_CHECKS = {"b": _check_bool, "u": _check_integer, "i": _check_integer, "f": _check_number, "O": _check_string}


def read_binary(data: bytes, datatype: str, shape: tuple[int, ...], where: str) -> Tensor:
    """Return the tensor of binary data; numbers are a read-only view of it.

    Raises:
        InvalidRequestError: its length is not that of the shape, or a BOOL is neither 0 nor 1.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _read_strings(data, count, where).reshape(shape)
    dtype = DATATYPES[datatype]
    if len(data) != count * dtype.itemsize:
        expected = f"{datatype} of shape {list(shape)} has {count * dtype.itemsize}"
        raise InvalidRequestError(f"{where} has {len(data)} bytes of binary data, {expected}")
    if datatype == "BOOL" and count and max(data) > 1:
        raise InvalidRequestError(f"{where} has a BOOL byte that is neither 0 nor 1")
    return np.frombuffer(data, dtype).reshape(shape)


def _read_strings(data: bytes, count: int, where: str) -> Tensor:
    if count * _LENGTH.size > len(data):
        raise InvalidRequestError(f"{where} has too few bytes of binary data for {count} BYTES elements")
    tensor = np.empty(count, dtype=object)
    position = 0
    for index in range(count):
        end = position + _LENGTH.size
        if end > len(data):
            raise InvalidRequestError(f"{where} ends before its BYTES element {index}")
        (length,) = _LENGTH.unpack_from(data, position)
        if end + length > len(data):
            raise InvalidRequestError(f"{where} ends within its BYTES element {index}")
        tensor[index] = data[end : end + length]
        position = end + length
    if position != len(data):
        raise InvalidRequestError(f"{where} has {len(data) - position} bytes left over after its last BYTES element")
    return tensor


def write_json(tensor: Tensor) -> Any:  # noqa: ANN401 - a list, or an array that orjson writes as one
    """Return a tensor's elements, row-major and flat, as orjson takes them.

    Raises:
        InvalidRequestError: JSON cannot carry them: FP16, NaN and infinities, or BYTES that are not UTF-8.
    """
    if tensor.dtype == object:
        try:
            return [element.decode() for element in tensor.reshape(-1)]
        except UnicodeDecodeError as error:
            raise InvalidRequestError("a BYTES output is not UTF-8 text; ask for it as binary data") from error
    if tensor.dtype == np.float16:
        raise InvalidRequestError("an FP16 output cannot be written as JSON; ask for it as binary data")
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        raise InvalidRequestError("an output has a number that is not finite; ask for it as binary data")
    return np.ascontiguousarray(tensor).reshape(-1)


def write_binary(tensor: Tensor) -> bytes:
    """Return a tensor's elements as binary data."""
    if tensor.dtype == object:
        return b"".join(_LENGTH.pack(len(element)) + element for element in tensor.reshape(-1))
    return np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<")).tobytes()
