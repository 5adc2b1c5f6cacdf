"""Tests of service.model.channel: messages over a real socket come out as they went in."""

import asyncio
import socket
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.errors import InferenceError, ModelRefusedError, ServiceError, UnavailableError
from service.model import channel
from service.model.tensor_model import Tensors

DTYPES = st.sampled_from(["<f4", "<f8", "<f2", "<i8", "<i4", "|i1", "|u1", "<u8", "|b1"])
NUMBERS = DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=4)))


def send_and_read(*messages: list[bytes | memoryview]) -> list[tuple[channel.Fields, Any]]:
    """Send messages over a socket pair, and return what the other end reads."""

    async def run() -> list[tuple[channel.Fields, Any]]:
        here, there = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=there)
        content = b"".join(part for message in messages for part in message)
        threading.Thread(target=here.sendall, args=(content,)).start()
        found = [await channel.read(reader) for _ in messages]
        here.close()
        with pytest.raises(channel.ChannelClosedError):
            await channel.read(reader)
        writer.close()
        return found

    return asyncio.run(run())


@given(NUMBERS)
def test_one_array_comes_back(tensor: "np.ndarray[Any, Any]") -> None:
    """An array of any datatype and shape, empty ones too, comes back bit for bit, beside its fields."""
    ((fields, found),) = send_and_read(channel.pack({"id": 7, "deadline": 1.5}, tensor))
    assert fields == {"id": 7, "deadline": 1.5}
    assert (found.dtype, found.shape, found.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())


@given(st.dictionaries(st.text(min_size=1), NUMBERS, min_size=1, max_size=3), st.lists(st.binary(), max_size=4))
def test_named_tensors_come_back(numbers: "dict[str, np.ndarray[Any, Any]]", elements: list[bytes]) -> None:
    """Several tensors come back by name, BYTES elements among them."""
    text = np.empty(len(elements), dtype=object)
    text[:] = elements
    sent = Tensors(numbers | {"text ": text})
    ((_, found),) = send_and_read(channel.pack({}, sent))
    assert isinstance(found, Tensors)
    assert set(found) == set(sent)
    assert list(found.pop("text ")) == elements
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.tobytes()) == (numbers[name].dtype, numbers[name].tobytes())


def test_messages_follow_each_other() -> None:
    """A message ends where its lengths say; one may have no tensors."""
    first, second = channel.pack({"id": 1}), channel.pack({"id": 2}, np.ones((2, 3), np.float32))
    (one, nothing), (two, tensor) = send_and_read(first, second)
    assert (one, nothing, two, tensor.shape) == ({"id": 1}, None, {"id": 2}, (2, 3))


def test_blocking_messages_come_back() -> None:
    """A message without tensors is sent and received over a blocking socket, until the other end has gone."""
    here, there = socket.socketpair()
    with here, there:
        channel.send(there, {"id": 0, "answer": "yes"})
        assert channel.receive(here) == {"id": 0, "answer": "yes"}
        there.close()
        for use in (channel.receive, lambda connection: channel.send(connection, {"id": 1})):
            with pytest.raises(channel.ChannelClosedError):
                use(here)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (ModelRefusedError("no"), ModelRefusedError),
        (UnavailableError("later"), UnavailableError),
        (KeyError("x"), InferenceError),
    ],
)
def test_failures_come_back(error: Exception, found: type[ServiceError]) -> None:
    """A failure is one of its kind at the other end, with its sentence; one that nobody expects is an inference's."""
    if isinstance(error, UnavailableError):
        error.retry_after = 7
    built = channel.build_error(channel.describe_error(error))
    assert (type(built), str(built)) == (found, str(error))
    assert getattr(built, "retry_after", 7) == 7
