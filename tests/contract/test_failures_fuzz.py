"""A bounded, seeded run of the fuzzer over real HTTP; `make fuzz` is the long one."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api.headers import read_headers
from service.api.v2 import datatypes
from service.api.v2 import decode as v2_decode
from service.api.v2.encode import write_binary
from service.errors import RequestError
from tests import fakes
from tests.fuzz.api import fuzz
from tests.servers import Server
from tests.wire import Wire

COIN = fakes.coin().only("onnx").manifest()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one worker on a model of each task."""
    root: Path = tmp_path_factory.mktemp("fuzzed")
    for build in (fakes.doubler, fakes.coin, fakes.compass):
        fakes.write_version(root, build())
    with Server(root, "--workers", "1", "--header-timeout", "1") as server:
        yield server


def test_every_answer_to_drawn_requests_is_documented(fuzzed: Server) -> None:
    """Requests drawn from the description, valid and not, get documented statuses and bodies, and never a 5xx."""
    answered = fuzz(fuzzed.url, examples=6, seed=4)
    assert answered[200] > 10
    assert answered[400] > 10
    assert max(answered) < 500
    assert "Traceback" not in fuzzed.log()


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=1, max_size=400))
def test_any_bytes_are_answered_or_closed(fuzzed: Server, data: bytes) -> None:
    """Whatever comes as the first bytes of a connection, it is answered below 500 or closed, and in time."""
    with Wire(fuzzed.url, 20) as wire:
        reply = wire.send(data + b"\r\n\r\n\r\n\r\n").read()
    assert reply.status < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["inputs", "x", ""]) | JSON,
        "shape": st.lists(st.integers(-1, 2**40), max_size=4) | JSON,
        "datatype": st.sampled_from(["FP32", "FP16", "BYTES", "INT8", "BOOL", "fp32"]) | JSON,
        "data": st.lists(st.floats(width=32), max_size=6) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 64) | JSON}) | JSON,
        "other": JSON,
    },
)
REQUEST = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=8) | JSON,
        "inputs": st.lists(TENSOR, max_size=3) | JSON,
        "outputs": st.lists(st.fixed_dictionaries({}, optional={"name": st.just("label") | JSON}), max_size=3) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"timeout": JSON, "binary_data_output": JSON}) | JSON,
    },
)


@settings(max_examples=200, deadline=None, database=None)
@given(fields=REQUEST, tail=st.binary(max_size=64), length=st.none() | st.integers(-5, 400) | st.text(max_size=4))
def test_infer_bodies_decode_or_are_refused(fields: object, tail: bytes, length: object) -> None:
    """The protocol's decoder gives finite float32 rows of the model's shape or a refusal, for any JSON and bytes."""
    header = json.dumps(fields).encode()
    shown = len(header) if length is None else length
    head = read_headers(
        [(b"inference-header-content-length", str(shown).encode())] if tail or length is not None else []
    )
    try:
        call = v2_decode.decode(header + tail, COIN, head)
    except RequestError:
        return
    assert isinstance(call.inputs, np.ndarray)
    assert call.inputs.dtype == "float32"
    assert call.inputs.shape[1:] == (2,)
    assert abs(call.inputs).max() < float("inf")


@settings(max_examples=100, deadline=None, database=None)
@given(shape=st.lists(st.integers(0, 3), min_size=1, max_size=3), data=st.binary(max_size=80))
def test_binary_tensors_decode_or_are_refused(shape: list[int], data: bytes) -> None:
    """Bytes of every datatype and shape decode to a tensor of that shape or are refused."""
    for datatype in datatypes.DATATYPES:
        try:
            tensor = datatypes.read_binary(data, datatype, tuple(shape), "x")
        except RequestError:
            continue
        assert tensor.shape == tuple(shape)
        assert write_binary(tensor) == data
