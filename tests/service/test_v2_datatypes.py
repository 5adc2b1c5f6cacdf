"""Tests of service.api.v2.datatypes, and of how service.api.v2.encode writes what they read."""

import math
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.json_values import parse_numbers
from service.api.v2.datatypes import DATATYPES, Tensor, read_binary, read_datatype, read_json, read_shape
from service.api.v2.encode import DATATYPE_NAMES, write_binary, write_json
from service.errors import InvalidRequestError

NUMBERS = sorted(set(DATATYPES) - {"BYTES"})
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


def same(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors are equal to the bit, so that a NaN equals itself and -0 is not 0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.tolist() == right.tolist() if left.dtype == object else left.tobytes() == right.tobytes()


def nest(flat: list[Any], shape: tuple[int, ...]) -> Any:
    """Return a flat list nested as a shape says."""
    if len(shape) < 2:
        return flat
    size = math.prod(shape[1:])
    return [nest(flat[start * size : (start + 1) * size], shape[1:]) for start in range(shape[0])]


@st.composite
def tensors(draw: st.DrawFn, finite: bool = False) -> Tensor:
    """Draw a tensor of any datatype and shape."""
    datatype, shape = draw(st.sampled_from(sorted(DATATYPES))), draw(SHAPES)
    count = math.prod(shape)
    if datatype == "BYTES":
        element = st.text(max_size=8).map(str.encode) if finite else st.binary(max_size=8)
        tensor = np.empty(count, object)
        tensor[:] = draw(st.lists(element, min_size=count, max_size=count))
        return tensor.reshape(shape)
    dtype = DATATYPES[datatype]
    content = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if datatype == "BOOL":
        content = bytes(byte & 1 for byte in content)
    tensor = np.frombuffer(content, dtype).reshape(shape)
    return np.nan_to_num(tensor) if finite and dtype.kind == "f" else tensor


@given(tensors())
def test_binary_is_exact(tensor: Tensor) -> None:
    """Every datatype and shape comes back from binary data to the bit, NaN and all."""
    datatype = DATATYPE_NAMES[tensor.dtype.str[1:]]
    assert same(read_binary(write_binary(tensor), datatype, tensor.shape, "x"), tensor)


@given(tensors(finite=True), st.booleans())
def test_json_is_exact(tensor: Tensor, nested: bool) -> None:
    """Every datatype but FP16 comes back from JSON, flat or nested: int64 to the last digit, FP32 as float32."""
    datatype = DATATYPE_NAMES[tensor.dtype.str[1:]]
    if datatype == "FP16":
        with pytest.raises(InvalidRequestError, match="FP16"):
            write_json(tensor)
        return
    data = orjson.loads(orjson.dumps(write_json(tensor), option=orjson.OPT_SERIALIZE_NUMPY))
    if nested and tensor.ndim:
        data = nest(data, tensor.shape)
    assert same(read_json(data, datatype, tensor.shape, "x"), tensor)


def test_wide_integers_survive_json() -> None:
    """Integers beyond 2^53, which a double cannot hold, are not rounded."""
    for datatype, numbers in (
        ("INT64", [2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)]),
        ("UINT64", [2**53 + 1, 2**64 - 1, 0, 1]),
    ):
        data = orjson.loads(orjson.dumps(numbers))
        assert read_json(data, datatype, (4,), "x").tolist() == numbers
        assert orjson.dumps(write_json(np.array(numbers, DATATYPES[datatype])), option=orjson.OPT_SERIALIZE_NUMPY) == (
            orjson.dumps(numbers)
        )


def test_bytes_on_the_wire() -> None:
    """A BYTES element is a little-endian uint32 length and the bytes; numbers are little-endian, a BOOL one byte."""
    elements = np.array([b"", b"ab"], object)
    assert write_binary(elements) == b"\0\0\0\0\x02\0\0\0ab"
    assert write_binary(np.array([1, 258], ">i2")) == b"\x01\0\x02\x01"
    assert write_binary(np.array([True, False])) == b"\x01\0"


@given(st.binary(max_size=40), st.sampled_from(sorted(DATATYPES)), SHAPES)
def test_any_bytes_are_read_or_refused(content: bytes, datatype: str, shape: tuple[int, ...]) -> None:
    """Whatever the bytes, there is a tensor of the shape or one sentence; nothing else is ever raised."""
    with suppress(InvalidRequestError):
        tensor = read_binary(content, datatype, shape, "x")
        assert tensor.shape == shape
        assert write_binary(tensor) == content


@given(JSON, st.sampled_from(sorted(DATATYPES)), SHAPES)
def test_any_json_is_read_or_refused(data: Any, datatype: str, shape: tuple[int, ...]) -> None:
    """Whatever the JSON, there is a tensor of the shape or one sentence; nothing else is ever raised."""
    with suppress(InvalidRequestError):
        assert read_json(data, datatype, shape, "x").shape == shape


NUMBER_LISTS = st.recursive(
    st.floats(allow_nan=False, allow_infinity=False) | st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.integers(-(2**63), 2**64 - 1) | st.just(True) | st.none(),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(NUMBER_LISTS, SHAPES)
def test_parsed_json_is_what_is_read(data: Any, shape: tuple[int, ...]) -> None:
    """What `parse_numbers` returns for any numbers, nested in any way, is what `read_json` does, to the bit."""
    tensor = parse_numbers(orjson.dumps(data), shape)
    if tensor is not None:
        assert same(tensor, read_json(data, "FP32", shape, "x"))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)), st.booleans())
def test_plain_numbers_are_parsed(numbers: list[float], nested: bool) -> None:
    """Finite numbers, flat or nested by the shape, are never left to `read_json`, and one number more always is."""
    shape = (len(numbers), 1)
    tensor = parse_numbers(orjson.dumps(nest(numbers, shape) if nested else numbers), shape)
    assert (tensor is None) == (not numbers)
    if tensor is not None:
        assert same(tensor, np.array(numbers, "<f4").reshape(shape))
    assert parse_numbers(orjson.dumps([*numbers, 1.0]), shape) is None


@given(JSON)
def test_any_shape_and_datatype_is_read_or_refused(value: Any) -> None:
    """Whatever stands where a shape or a datatype belongs is one, or is refused with a sentence."""
    for read in (read_shape, read_datatype):
        with suppress(InvalidRequestError):
            read(value, "x")


@pytest.mark.parametrize(
    "shape",
    [[-1], [1.0], [True], ["1"], [None], [[1]], [2**63], [2**62, 4], [2**31 + 1], [0, 2**62], [1] * 17, 3, None, {}],
)
def test_shape_that_cannot_be_counted_is_refused(shape: Any) -> None:
    """Negative, fractional and boolean sizes, and products that overflow, also beside a zero, are refused."""
    with pytest.raises(InvalidRequestError, match=r"^x\.shape"):
        read_shape(shape, "x")


@pytest.mark.parametrize(
    ("datatype", "element"),
    [
        ("UINT8", 300), ("UINT8", -1), ("INT8", 128), ("INT32", 2**31), ("UINT64", -1), ("INT64", 2**63),
        ("INT32", 1.5), ("INT32", 1.0), ("INT32", True), ("INT32", "1"), ("FP32", True), ("FP32", "1"), ("FP32", None),
        ("FP32", 1e39), ("FP32", [1]), ("BOOL", 1), ("BOOL", 0), ("BOOL", "true"), ("BYTES", 1), ("BYTES", None),
        ("FP64", False), ("FP16", 1.0), ("UINT64", 1.8446744073709552e19),
    ],
)  # fmt: skip
def test_element_of_another_kind_is_refused(datatype: str, element: Any) -> None:
    """Nothing wraps, is rounded or is converted: a number out of range, a fraction, a boolean is a sentence."""
    with pytest.raises(InvalidRequestError, match=r"^x\.data"):
        read_json([element], datatype, (1,), "x")


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (b"", 1),
        (b"\x01\0\0\0", 1),
        (b"\x01\0\0", 1),
        (b"\0\0\0\0\0", 1),
        (struct.pack("<I", 2**32 - 1) + b"a", 1),
        (b"\x05\0\0\0abcde", 2),
        (b"\0\0\0\0", 2**31),
    ],
)
def test_bytes_elements_that_do_not_fit_are_refused(content: bytes, count: int) -> None:
    """A length that leads beyond the data, too few elements, and bytes left over are refused before any are made."""
    with pytest.raises(InvalidRequestError):
        read_binary(content, "BYTES", (count,), "x")


def test_bool_is_zero_or_one() -> None:
    """A byte that is neither is refused, for no tensor could give it back."""
    with pytest.raises(InvalidRequestError, match="neither 0 nor 1"):
        read_binary(b"\x02", "BOOL", (1,), "x")


@pytest.mark.parametrize("tensor", [np.array([b"\xff"], object), np.array([np.nan]), np.array([1, -np.inf], "<f4")])
def test_what_json_cannot_say_is_refused(tensor: Tensor) -> None:
    """Bytes that are no text, and numbers that are not finite, can be had as binary data alone."""
    with pytest.raises(InvalidRequestError, match="binary"):
        write_json(tensor)
