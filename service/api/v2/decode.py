"""Bodies of infer requests to arrays: JSON, binary tensors, and both mixed.

Source: https://github.com/kserve/open-inference-protocol, and Triton's binary tensor data extension.
"""

import base64
import math
import re
from typing import NamedTuple

import numpy as np

from service.api.headers import RequestHeaders
from service.api.json_values import LARGE_BODY, parse_long_numbers, parse_numbers
from service.api.limits import NO_LIMITS, ReadLimits
from service.api.v2.columns import read_rows
from service.api.v2.datatypes import DATATYPES, Tensor, read_binary, read_json, read_values
from service.api.v2.infer_request import (
    MAX_CACHED_BYTES,
    InputTensor,
    RequestedOutput,
    all_outputs,
    check_shape,
    input_specs,
    parse_cached,
    parse_request,
)
from service.errors import InvalidRequestError
from service.model.backends import Array
from service.model.columns import Rows, join_tensors
from service.model.manifest import AnyManifest, ColumnsInput, ImageInput, Manifest
from service.model.tensor_model import Tensors, as_text

_LARGEST_EXACT = 2**24  # float32 holds each whole number up to here
_DATA = re.compile(rb'"data"\s*:\s*')


class InferCall(NamedTuple):
    """One decoded infer request.

    `inputs` is float32 (N, *shape), or the tensors of a model without a task; `timeout` is in seconds, None for the
    server's own.
    """

    inputs: Array | Tensors
    id: str | None
    outputs: tuple[RequestedOutput, ...]
    timeout: float | None


def is_heavy(body: bytes, headers: RequestHeaders) -> bool:
    """Tell whether a body is decoded in a thread, since it would hold up the event loop: large JSON, or pictures."""
    size = len(body)
    if headers.json_length.isdigit():
        size = min(size, int(headers.json_length[:10]))
    if size >= LARGE_BODY:
        return True
    # To search for one byte takes a fraction of the time of a word; the word may be spelled with escapes.
    return (body.find(b"Y", 0, size) >= 0 and b'"BYTES"' in body[:size]) or body.find(b"\\", 0, size) >= 0


def decode(body: bytes, manifest: AnyManifest, headers: RequestHeaders, limits: ReadLimits = NO_LIMITS) -> InferCall:
    """Decode an infer body.

    Raises:
        InvalidRequestError: the body, a field or a value cannot be used; the sentence says which and why.
        TooLargeError: it has too many instances or values.
    """
    if not headers.json_length:
        call = _decode_plain(body, manifest, limits)
        if call is not None:
            return call
        header, binary = body, b""
    else:
        length = _read_json_length(headers.json_length, len(body))
        if length == 0:
            return InferCall(_read_raw(body, manifest, limits), None, all_outputs(manifest, binary=True), None)
        header, binary = body[:length], body[length:]
    is_repeated = binary and len(header) <= MAX_CACHED_BYTES
    request = parse_cached(header, manifest) if is_repeated else parse_request(header, manifest)
    if isinstance(manifest, Manifest) and request.inputs[0].shape:
        limits.check_rows(request.inputs[0].shape[0])
    tensors = _read_tensors(request.inputs, binary, request.by_column)
    inputs = choose_inputs(tensors, manifest, limits, request.by_column)
    return InferCall(inputs, request.id, request.outputs, request.timeout)


def _decode_plain(body: bytes, manifest: AnyManifest, limits: ReadLimits) -> InferCall | None:
    """Decode JSON whose tensors are plain FP32 data; return None for anything else.

    The lists of numbers are cut out and parsed on their own. What is left is short, often repeated, and cached.
    """
    header, lists = _cut_numbers(body)
    if not lists:
        return None
    try:
        request = parse_cached(header, manifest)
    except InvalidRequestError:
        return None  # decoding the whole body tells what is wrong and where
    if len(request.inputs) != len(lists):  # else each tensor has one: none does without
        return None
    tensors: dict[str, Array] = {}
    for (name, datatype, shape, size, _), text in zip(request.inputs, lists, strict=True):
        if size is not None or datatype != "FP32":
            return None
        if len(text) < LARGE_BODY:
            numbers = parse_numbers(text, shape)
        else:
            if isinstance(manifest, Manifest):
                limits.check_rows(shape[0])
            numbers = parse_long_numbers(text, shape, limits.check)
        if numbers is None:
            return None
        tensors[name] = numbers
    is_input = isinstance(manifest, Manifest) and manifest.input.kind != "columns" and not request.by_column
    inputs = tensors[name] if is_input else choose_inputs(dict(tensors), manifest, limits, request.by_column)
    return InferCall(inputs, request.id, request.outputs, request.timeout)


def _cut_numbers(body: bytes) -> tuple[bytes, list[bytes]]:
    """Return a body with `[]` for each "data", and the bytes of those lists; no lists if they cannot be cut out.

    If the first is valid JSON, and the others are lists of numbers, the body is valid: each list began at a key's
    value, and ended before the first brace or quote, of which numbers have none.
    """
    parts: list[bytes] = []
    lists: list[bytes] = []
    position = 0
    while found := _DATA.search(body, position, position + MAX_CACHED_BYTES):
        start = found.end()
        brace = body.find(b"}", start)
        quote = body.find(b'"', start, brace)
        end = body.rfind(b"]", start, brace if quote < 0 else quote) + 1
        if not end:
            return b"", []
        parts.append(body[position:start])
        lists.append(body[start:end])
        position = end
    if len(body) - position > MAX_CACHED_BYTES:
        return b"", []
    header = b"[]".join([*parts, body[position:]])
    # Without escapes, quotes only delimit strings, so what was found are keys.
    return (b"", []) if b"\\" in header or len(header) > MAX_CACHED_BYTES else (header, lists)


def _read_json_length(value: bytes, total: int) -> int:
    if not value.isdigit() or len(value) > 10 or int(value) > total:  # noqa: PLR2004 - digits
        shown = value[:20].decode("latin-1")
        raise InvalidRequestError(f"Inference-Header-Content-Length is {shown}, expected 0 to the body's {total} bytes")
    return int(value)


def _read_raw(body: bytes, manifest: AnyManifest, limits: ReadLimits) -> Array | Tensors:
    """Read a body without JSON: the data of the one input, as a batch of one."""
    specs = input_specs(manifest)
    if len(specs) != 1:
        raise InvalidRequestError(f"a raw binary request has one input, the model has {len(specs)}")
    ((name, (datatype, shape)),) = specs.items()
    if datatype == "BYTES":
        tensor = np.empty([1] * len(shape), dtype=object)
        tensor[...] = body
        check_shape(name, tensor.shape, shape)
    else:
        sizes = [1, *shape[1:]] if isinstance(manifest, Manifest) else _fill_shape(name, datatype, shape, len(body))
        tensor = read_binary(body, datatype, tuple(sizes), "the body")
    return choose_inputs({name: tensor}, manifest, limits)


def _fill_shape(name: str, datatype: str, shape: list[int], length: int) -> list[int]:
    """Return a shape with its open dimension as large as `length` bytes of data make it."""
    if sum(size < 0 for size in shape) > 1:
        raise InvalidRequestError(f"a raw binary request needs an input with one open dimension, {name!r} has {shape}")
    rest = DATATYPES[datatype].itemsize * math.prod(size for size in shape if size >= 0)
    return [length // max(rest, 1) if size < 0 else size for size in shape]


def _read_tensors(inputs: tuple[InputTensor, ...], binary: bytes, by_column: bool) -> dict[str, Tensor]:
    """Return the tensors of a request by name; `binary` is the data after the JSON, whose columns may have nulls."""
    tensors: dict[str, Tensor] = {}
    position = 0
    for index, (name, datatype, shape, size, data) in enumerate(inputs):
        where = f"inputs[{index}]"
        if size is None:
            tensors[name] = read_values(data, shape, where) if by_column else read_json(data, datatype, shape, where)
            continue
        if position + size > len(binary):
            left = len(binary) - position
            raise InvalidRequestError(f"{where} has {size} bytes of binary data, {left} are left")
        content = binary if size == len(binary) else binary[position : position + size]
        tensors[name] = read_binary(content, datatype, shape, where)
        position += size
    if position != len(binary):
        raise InvalidRequestError(f"the body has {len(binary) - position} bytes after the last tensor")
    return tensors


def choose_inputs(
    tensors: dict[str, Tensor], manifest: AnyManifest, limits: ReadLimits, by_column: bool = False
) -> Array | Tensors:
    """Return what the model takes: its input float32 (N, *shape), rows of columns, or all tensors if it has no task.

    Args:
        tensors: by name.
        manifest: of the model.
        limits: for pictures.
        by_column: whether the tensors are the model's columns or features; see `service.api.v2.columns`.

    Raises:
        InvalidRequestError: a number is not finite, or a picture cannot be read.
    """
    if not isinstance(manifest, Manifest):
        return Tensors(tensors)
    if by_column:
        return read_rows(tensors, manifest)
    if isinstance(manifest.input, ColumnsInput):
        return _join_columns(tensors, manifest.input)
    ((name, tensor),) = tensors.items()
    if tensor.dtype == object:
        assert isinstance(manifest.input, ImageInput)
        return _read_pictures(tensor, manifest.input, limits)
    if tensor.dtype != np.float32:
        tensor = _convert(tensor, name)
    finite = np.isfinite(tensor)
    if not finite.all():
        index = int(np.flatnonzero(~finite)[0])
        raise InvalidRequestError(f"input {name!r} has an element that is not finite, at {index}")
    return tensor


def _convert(tensor: Tensor, name: str) -> Array:
    """Return numbers as float32. Whole ones must stay the same; a fraction may lose digits, and not become infinite."""
    if tensor.dtype.kind in "iu" and (np.abs(tensor.astype(np.float64)) > _LARGEST_EXACT).any():
        raise InvalidRequestError(f"input {name!r} has a whole number beyond 2^24, which FP32 may not hold exactly")
    with np.errstate(over="ignore"):
        return tensor.astype(np.float32)


def _join_columns(tensors: dict[str, Tensor], spec: ColumnsInput) -> Rows:
    """Return the rows of columns that were sent as tensors. NaN is null, so only columns that take null may have it."""
    for tensor in spec.tensors:
        given = tensors[tensor.name]
        if given.dtype == object:
            tensors[tensor.name] = as_text(given, tensor.name)
        if given.dtype.kind == "f":
            nulls = [column.nullable for column in tensor.columns]
            if not (np.isfinite(given) | (np.isnan(given) & nulls)).all():
                raise InvalidRequestError(f"input {tensor.name!r} has an element that is not finite")
    try:
        return join_tensors(tensors, spec.row_dtype)
    except ValueError as error:
        raise InvalidRequestError(f"the inputs are not equally many rows: {error}") from error


def _read_pictures(tensor: Tensor, spec: ImageInput, limits: ReadLimits) -> Array:
    from service.model.preprocess import read_images  # noqa: PLC0415 - imports Pillow only when pictures are sent

    if tensor.shape[1:] not in ((), (1,)) or not tensor.size:
        raise InvalidRequestError(f"pictures as BYTES have shape [N] with N from 1, not {list(tensor.shape)}")
    pictures = [_decode_base64(element) for element in tensor.reshape(-1)]
    return read_images(pictures, spec, [f"picture {index}" for index in range(len(pictures))], limits.check)


def _decode_base64(element: bytes) -> bytes:
    """Return a picture's file; in JSON it is base64, whose alphabet no file of a picture keeps to."""
    try:
        return base64.b64decode(element, validate=True)
    except ValueError:
        return element
