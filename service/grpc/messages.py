"""Messages of the Open Inference Protocol's gRPC form, and infer requests to arrays and back.

`open_inference.proto` describes them; `make proto` compiles it. The classes are built in a pool of their own, because
clients of Triton, KServe and MLServer register other files with the same names in protobuf's default pool.

`is_heavy`, `decode` and `encode` do what those of `service.api.v2` do, for a serialized `ModelInferRequest`.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import DecodeError

from service.api.headers import RequestHeaders
from service.api.json_values import LARGE_BODY
from service.api.limits import MAX_VALUES, NO_LIMITS, ReadLimits
from service.api.v2.datatypes import DATATYPES, Tensor, read_binary
from service.api.v2.decode import InferCall, choose_inputs
from service.api.v2.encode import DATATYPE_NAMES, build_outputs, write_binary
from service.api.v2.infer_request import InputTensor, check_request
from service.errors import InvalidRequestError, TooLargeError
from service.model.backends import Array
from service.model.manifest import AnyManifest, Manifest
from service.model.tensor_model import Tensors

MAX_FIELDS = 2**13  # of a request, which are counted before objects are made of them
MAX_HEADER_BYTES = 2**21  # of a request without its raw contents; parsed, it can take forty times that
POOL = descriptor_pool.DescriptorPool()
for _file in FileDescriptorSet.FromString(Path(__file__).with_name("open_inference.binpb").read_bytes()).file:
    POOL.Add(_file)
SERVICE = POOL.FindServiceByName("inference.GRPCInferenceService")

_MODEL_NAME, _MODEL_VERSION, _RAW_CONTENTS = (
    SERVICE.methods_by_name["ModelInfer"].input_type.fields_by_name[name].number << 3 | 2
    for name in ("model_name", "model_version", "raw_input_contents")
)  # as tags: a field's number, and 2 for a length and that many bytes
_FIXED_SIZES = {1: 8, 5: 4}  # by wire type
_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def get_message(name: str) -> Any:  # noqa: ANN401 - the class is made at run time
    """Return the class of a message of the protocol."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))


_InferRequest = get_message("ModelInferRequest")
_InferResponse = get_message("ModelInferResponse")
_StreamResponse = get_message("ModelStreamInferResponse")


def build_message(message_class: Any, fields: dict[str, Any]) -> Any:  # noqa: ANN401 - made at run time
    """Return a message from JSON values, without what it has no field for."""
    return json_format.ParseDict(fields, message_class(), ignore_unknown_fields=True, descriptor_pool=POOL)


def serialize(message: Any) -> bytes:  # noqa: ANN401 - made at run time
    """Return the bytes of a message."""
    return bytes(message.SerializeToString())


def read_model(body: bytes) -> tuple[str, str | None]:
    """Return the model that an infer request names, and its version or label; None where it names none.

    Raises:
        InvalidRequestError: the body is not an infer request.
        TooLargeError: it has too many fields.
    """
    found = {_MODEL_NAME: b"", _MODEL_VERSION: b""}
    for tag, _, start, end in _split(body):
        if tag in found:
            found[tag] = body[start:end]
    name, version = (text.decode("utf-8", "replace") for text in found.values())
    return name, version or None


def is_heavy(body: bytes, headers: RequestHeaders) -> bool:
    """Tell whether a body is decoded in a thread: a long one, or pictures, would hold up the event loop."""
    del headers
    return len(body) >= LARGE_BODY or b"BYTES" in body


def decode(body: bytes, manifest: AnyManifest, headers: RequestHeaders, limits: ReadLimits = NO_LIMITS) -> InferCall:
    """Decode an infer request; numbers in its raw contents are not copied where they are aligned.

    Raises:
        InvalidRequestError: the body, a field or a value cannot be used; the sentence says which and why.
        TooLargeError: it has too many instances, fields or values.
    """
    del headers
    message, raw = _parse(body)
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequestError(f"the request has {len(message.inputs)} inputs and {len(raw)} raw_input_contents")
    request = check_request(_describe_request(message, raw), manifest)
    if isinstance(manifest, Manifest) and request.inputs[0].shape:
        limits.check_rows(request.inputs[0].shape[0])
    tensors: dict[str, Tensor] = {}
    for index, tensor in enumerate(request.inputs):
        where, sent = f"inputs[{index}]", message.inputs[index]
        if raw and sent.contents.ByteSize():  # MLServer sends an empty one
            raise InvalidRequestError(f"{where} has contents beside raw_input_contents; send one of them")
        read = _read_raw(raw[index], tensor, where) if raw else _read_contents(sent.contents, tensor, where)
        tensors[tensor.name] = read
    inputs = choose_inputs(tensors, manifest, limits, request.by_column)
    return InferCall(inputs, request.id, request.outputs, request.timeout)


def encode(outputs: Array | Tensors, manifest: AnyManifest, call: InferCall) -> tuple[bytes, bytes]:
    """Return no header lines, and a serialized `ModelInferResponse` with raw contents."""
    answer = _InferResponse(model_name=manifest.name, model_version=str(manifest.version), id=call.id or "")
    for name, tensor in build_outputs(outputs, manifest, call):
        answer.outputs.add(name=name, datatype=DATATYPE_NAMES[tensor.dtype.str[1:]], shape=tensor.shape)
        answer.raw_output_contents.append(write_binary(tensor))
    return b"", answer.SerializeToString()


def build_stream_response(body: bytes) -> bytes:
    """Return an answer, as `encode` gives it, as a stream sends it: marked as the only one to its request."""
    answer = _StreamResponse()
    answer.infer_response.MergeFromString(body)
    answer.infer_response.parameters["triton_final_response"].bool_param = True
    return serialize(answer)


def build_stream_error(sentence: str, request: bytes) -> bytes:
    """Return a failure of one request in a stream, with the request's own id."""
    try:
        message, _ = _parse(request)
    except (InvalidRequestError, TooLargeError):
        return serialize(_StreamResponse(error_message=sentence))
    return serialize(_StreamResponse(error_message=sentence, infer_response={"id": message.id}))


def _parse(body: bytes) -> tuple[Any, list[memoryview]]:
    """Return a request without its raw contents, and those as views of the body."""
    view, position = memoryview(body), 0
    header, raw = list[bytes](), list[memoryview]()
    for tag, begin, start, end in _split(body):
        if tag == _RAW_CONTENTS:
            header.append(body[position:begin])
            raw.append(view[start:end])
            position = end
    header.append(body[position:])
    if sum(map(len, header)) > MAX_HEADER_BYTES:
        limit = f"{MAX_HEADER_BYTES} bytes beside raw_input_contents"
        raise TooLargeError(f"the request has over {limit}; send large tensors as raw_input_contents")
    try:
        return _InferRequest.FromString(b"".join(header)), raw
    except DecodeError as error:
        raise InvalidRequestError("the body is not a ModelInferRequest") from error


def _split(body: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field of a message: its tag, where it begins, and where its content starts and ends.

    Source: https://protobuf.dev/programming-guides/encoding/
    """
    position = 0
    for _ in range(MAX_FIELDS):
        if position == len(body):
            return
        begin = position
        tag, position = _read_varint(body, position)
        size, start = _FIXED_SIZES.get(tag & 7, 0), position
        if tag & 7 in (0, 2):
            number, start = _read_varint(body, position)
            size = number if tag & 7 == 2 else 0  # noqa: PLR2004 - a wire type
        elif not size:
            raise InvalidRequestError("the body is not a ModelInferRequest")
        position = start + size
        if position > len(body):
            raise InvalidRequestError("the body ends within a field of the request")
        yield tag, begin, start, position
    raise TooLargeError(f"the request has over {MAX_FIELDS} fields")


def _read_varint(body: bytes, position: int) -> tuple[int, int]:
    number = 0
    for shift, byte in enumerate(body[position : position + 10]):
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:  # noqa: PLR2004 - the last byte of a number
            return number, position + shift + 1
    raise InvalidRequestError("the body ends within a field of the request")


def _describe_request(message: Any, raw: list[memoryview]) -> dict[str, Any]:  # noqa: ANN401 - made at run time
    """Return a request as its JSON form would have it, without tensor data."""
    inputs = []
    for index, tensor in enumerate(message.inputs):
        fields = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        parameters = _read_parameters(tensor)
        parameters.pop("binary_data_size", None)
        if raw:
            parameters["binary_data_size"] = len(raw[index])
        else:
            fields["data"] = None
        inputs.append(fields | {"parameters": parameters})
    outputs = [{"name": output.name, "parameters": _read_parameters(output)} for output in message.outputs]
    parameters = _read_parameters(message)
    return {"id": message.id or None, "parameters": parameters, "inputs": inputs, "outputs": outputs}


def _read_parameters(message: Any) -> dict[str, Any]:  # noqa: ANN401 - made at run time
    found = {}
    for name, value in message.parameters.items():
        choice = value.WhichOneof("parameter_choice")
        if choice:
            found[name] = getattr(value, choice)
    return found


def _read_raw(content: memoryview, tensor: InputTensor, where: str) -> Tensor:
    read = read_binary(content, tensor.datatype, tensor.shape, where)
    return read if read.flags.aligned else read.copy()


def _read_contents(contents: Any, tensor: InputTensor, where: str) -> Tensor:  # noqa: ANN401 - made at run time
    """Return a tensor from typed contents, which hold 8 and 16 bits in 32."""
    if tensor.datatype not in _CONTENTS:
        raise InvalidRequestError(f"{where} cannot carry {tensor.datatype} as contents; send raw_input_contents")
    field = _CONTENTS[tensor.datatype]
    values, count = getattr(contents, field), math.prod(tensor.shape)
    if len(values) != count:
        shown = f"its shape {list(tensor.shape)} has {count}"
        raise InvalidRequestError(f"{where} has {len(values)} elements in {field}, {shown}")
    if count > MAX_VALUES:
        raise TooLargeError(f"{where} has {count} elements in {field}; send as many as raw_input_contents")
    dtype = DATATYPES[tensor.datatype]
    if dtype.kind not in "ui":
        return np.fromiter(values, dtype, count).reshape(tensor.shape)
    limits = np.iinfo(dtype)
    wide = np.fromiter(values, np.uint64 if dtype.kind == "u" else np.int64, count)
    if count and not (limits.min <= wide.min() and wide.max() <= limits.max):
        raise InvalidRequestError(f"{where} has an element outside {tensor.datatype}'s range in {field}")
    return wide.astype(dtype).reshape(tensor.shape)
