"""Messages between a worker and an engine: a few fields, and tensors as they lie in memory.

A message is two lengths (uint32, little-endian), JSON fields, and the bytes of its tensors, over a Unix socket. A large
tensor may be in an arena instead (see `arena`); the fields then say where.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    ModelRefusedError,
    ServiceError,
    StartError,
    TooLargeError,
    UnavailableError,
)
from service.model.arena import Borrow
from service.model.columns import join_tensors, split_rows
from service.model.tensor_model import Tensors

Fields = dict[str, Any]
_LENGTHS = struct.Struct("<II")
MAX_PATH_BYTES = 100  # of a socket, which everywhere takes 103
BUFFER_BYTES = 2**22  # that a stream reads ahead
_ERRORS: dict[str, type[ServiceError]] = {
    error.__name__: error
    for error in (
        DeadlineExceededError,
        InferenceError,
        InvalidRequestError,
        ModelRefusedError,
        StartError,
        TooLargeError,
        UnavailableError,
    )
}


@contextlib.contextmanager
def shorten(path: Path) -> Iterator[str]:
    """Give a socket's path in a form that the system takes, 108 bytes at most, however long the folder's name is."""
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        yield os.fspath(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class ChannelClosedError(ConnectionError):
    """The other end has gone."""


def pack(
    fields: Fields,
    tensors: Mapping[str, NDArray[Any]] | NDArray[Any] | None = None,
    place: Callable[[NDArray[Any]], int | None] | None = None,
) -> list[bytes | memoryview]:
    """Return a message in parts: fields, and the tensors that `read` gives back as they were.

    `place` copies a tensor into an arena and returns its offset, or None if the tensor is to be in the message.
    """
    parts: list[bytes | memoryview] = []
    if tensors is not None:
        named = tensors if isinstance(tensors, Mapping) else {"": tensors}
        if not isinstance(tensors, Mapping) and tensors.dtype.names:
            named, fields = split_rows(tensors), fields | {"rows": True}
        described: list[list[Any]] = []
        for name, tensor in named.items():
            if tensor.dtype == object:  # elements of type bytes, or text in rows
                elements = [each.encode() if isinstance(each, str) else bytes(each) for each in tensor.reshape(-1)]
                parts += elements
                kind = "T" if "rows" in fields else "O"
                described.append([name, kind, tensor.shape, [len(element) for element in elements]])
            elif place is not None and (offset := place(tensor)) is not None:
                described.append([name, tensor.dtype.str, tensor.shape, tensor.nbytes, offset])
            else:
                parts.append(np.ascontiguousarray(tensor).data.cast("B") if tensor.size else b"")
                described.append([name, tensor.dtype.str, tensor.shape, tensor.nbytes])
        fields = fields | {"tensors": described}
    header = orjson.dumps(fields)
    size = sum(len(part) for part in parts)
    return [_LENGTHS.pack(len(header), size), header, *parts]


def unpack(header: bytes, payload: bytes, borrow: Borrow | None = None) -> tuple[Fields, Any]:
    """Return fields and tensors of a message: an array, `Tensors` by name, or None.

    Numbers are a view of `payload`, or of the arena that `borrow` gives.
    """
    fields: Fields = orjson.loads(header)
    tensors = Tensors()
    position = 0
    arena: NDArray[np.uint8] | None = None
    for name, dtype, shape, size, *offset in fields.pop("tensors", ()):
        if dtype in ("O", "T"):
            tensor = np.empty(len(size), dtype=object)
            for index, length in enumerate(size):
                element = payload[position : position + length]
                tensor[index] = element.decode() if dtype == "T" else element
                position += length
        elif offset and borrow is not None:
            arena = borrow(fields["id"]) if arena is None else arena
            tensor = arena[offset[0] : offset[0] + size].view(np.dtype(dtype))
        else:
            tensor = np.frombuffer(payload, np.dtype(dtype), size // np.dtype(dtype).itemsize, position)
            position += size
        tensors[name] = tensor.reshape(shape)
    if not tensors.keys():
        return fields, None
    if fields.pop("rows", False):
        parts = [(name, tensor.dtype, tensor.shape[1:]) for name, tensor in tensors.items()]
        return fields, join_tensors(tensors, np.dtype(parts))
    return fields, tensors.get("", tensors)


async def read(reader: asyncio.StreamReader, borrow: Borrow | None = None) -> tuple[Fields, Any]:
    """Return the next message's fields and tensors; see `unpack`.

    Raises:
        ChannelClosedError: there is none.
    """
    try:
        header, payload = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
        return unpack(await reader.readexactly(header), await reader.readexactly(payload), borrow)
    except (asyncio.IncompleteReadError, OSError) as error:
        raise ChannelClosedError("the other end has gone") from error


def write(writer: asyncio.StreamWriter, fields: Fields) -> None:
    """Write a message without tensors, unless the other end has gone."""
    if not writer.is_closing():
        writer.writelines(pack(fields))


def send(connection: socket.socket, fields: Fields) -> None:
    """Send a message without tensors over a blocking socket.

    Raises:
        ChannelClosedError: the other end has gone.
    """
    try:
        connection.sendall(b"".join(pack(fields)))
    except OSError as error:
        raise ChannelClosedError("the other end has gone") from error


def receive(connection: socket.socket) -> Fields:
    """Return the fields of the next message on a blocking socket.

    Raises:
        ChannelClosedError: there is none.
    """
    try:
        header, payload = _LENGTHS.unpack(_receive(connection, _LENGTHS.size))
        return unpack(_receive(connection, header), _receive(connection, payload))[0]
    except OSError as error:
        raise ChannelClosedError("the other end has gone") from error


def _receive(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, BUFFER_BYTES))
        if not part:
            raise ChannelClosedError("the other end has gone")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def describe_error(error: BaseException) -> list[Any]:
    """Return a failure as a message has it: its class, its sentence, and when to retry, as the class says."""
    retry = error.retry_at if isinstance(error, ModelRefusedError) else getattr(error, "retry_after", 0)
    return [type(error).__name__, str(error), retry]


def build_error(described: list[Any]) -> ServiceError:
    """Return the failure that a message describes."""
    name, sentence, retry = described
    error = _ERRORS.get(name, InferenceError)(sentence)
    if isinstance(error, UnavailableError):
        error.retry_after = retry
    elif isinstance(error, ModelRefusedError):
        error.retry_at = retry
    return error
