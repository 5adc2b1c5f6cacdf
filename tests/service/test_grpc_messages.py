"""Tests of service.grpc.messages: infer requests to arrays and back, and the messages themselves."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2

from service.api.headers import RequestHeaders
from service.api.v2.datatypes import DATATYPES
from service.errors import InvalidRequestError, ServiceError, TooLargeError
from service.grpc import messages
from service.model.manifest import TensorManifest
from service.model.tensor_model import Tensors
from tests import columns, fakes
from tests.servers import ROOT

COMPASS = fakes.compass().manifest()
HEAD = RequestHeaders(b"id")
ROWS = np.array([[1, 2], [3, 4]], np.float32)
TYPED = {
    "BOOL": ("bool_contents", [True, False]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 65535]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(2**15), 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "FP32": ("fp32_contents", [0.5, -2.0]),
    "FP64": ("fp64_contents", [0.1, 1e300]),
    "BYTES": ("bytes_contents", [b"a", b""]),
}


def build(raw: bytes | None = ROWS.tobytes(), shape: tuple[int, ...] = (2, 2), **contents: Any) -> Any:
    """Return a request for two rows of `compass`."""
    request = messages.get_message("ModelInferRequest")(model_name="compass")
    tensor = request.inputs.add(name="inputs", datatype="FP32", shape=shape)
    for name, values in contents.items():
        getattr(tensor.contents, name).extend(values)
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


def decode(request: Any, manifest: Any = COMPASS) -> Any:
    """Decode a request."""
    return messages.decode(request.SerializeToString(), manifest, HEAD)


def test_tables_have_an_input_for_each_column() -> None:
    """As over HTTP: another datatype than the graph's, texts for dates, and NaN for what is not known."""
    request = messages.get_message("ModelInferRequest")(model_name="house")
    for name, datatype, field, values in (
        ("age", "FP64", "fp64_contents", [40.0, np.nan]),
        ("garden", "BOOL", "bool_contents", [True, False]),
        ("city", "BYTES", "bytes_contents", [b"Oslo", b"Bonn"]),
        ("remark", "BYTES", "bytes_contents", [b"fine", b"none"]),
        ("since", "BYTES", "bytes_contents", [b"1970-01-02", b"1970-01-01"]),
    ):
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[2, 1])
        getattr(tensor.contents, field).extend(values)
    rows = decode(request, columns.house().manifest()).inputs
    np.testing.assert_array_equal(rows["age"].ravel(), [40, np.nan])
    assert (rows["city"].ravel().tolist(), rows["since"].ravel().tolist()) == (["Oslo", "Bonn"], [1.0, 0.0])
    request.inputs[2].contents.bytes_contents[0] = b"\xff"
    with pytest.raises(InvalidRequestError, match="city"):
        decode(request, columns.house().manifest())


def describe_tensor(datatype: str) -> TensorManifest:
    """Return the manifest of a model that takes any number of one datatype."""
    spec = {"name": "x", "datatype": datatype, "shape": [-1]}
    artifact = {"onnx": {"file": "model.onnx", "sha256": "0" * 64, "bytes": 1}}
    fields = {"schema_version": 1, "name": "echo", "version": 1, "task": "tensors", "artifacts": artifact}
    return TensorManifest.model_validate(fields | {"inputs": [spec], "outputs": [spec | {"name": "y"}]})


def test_raw_and_typed_contents_are_the_same() -> None:
    """A request's numbers come as they were sent, raw or typed, with its id, outputs and timeout."""
    for request in (build(), build(None, fp32_contents=ROWS.reshape(-1))):
        request.id = "seven"
        request.parameters["timeout"].int64_param = 2_000_000
        request.outputs.add(name="probabilities").parameters["classification"].int64_param = 2
        call = decode(request)
        np.testing.assert_array_equal(call.inputs, ROWS)
        assert (call.id, call.timeout, call.outputs) == ("seven", 2.0, (("probabilities", False, 2),))


def test_raw_contents_are_not_copied_where_they_are_aligned() -> None:
    """Numbers are a view of the body, or one aligned copy, for not every kernel reads others."""
    is_view = set()
    for length in range(4):
        request = build()
        request.id = "x" * (length + 1)
        body = request.SerializeToString()
        inputs = messages.decode(body, COMPASS, HEAD).inputs
        assert isinstance(inputs, np.ndarray)
        assert inputs.flags.aligned
        is_view.add(np.shares_memory(inputs, np.frombuffer(body, np.uint8)))
    assert is_view == {True, False}


@pytest.mark.parametrize("datatype", TYPED)
def test_every_datatype(datatype: str) -> None:
    """Typed contents keep the extremes of each datatype; raw ones and answers are the same."""
    field, values = TYPED[datatype]
    manifest = describe_tensor(datatype)
    request = messages.get_message("ModelInferRequest")(model_name="echo")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[2])
    getattr(tensor.contents, field).extend(values)
    call = decode(request, manifest)
    assert isinstance(call.inputs, Tensors)
    assert call.inputs["x"].tolist() == values
    assert call.inputs["x"].dtype == DATATYPES[datatype]
    _, body = messages.encode(Tensors(y=call.inputs["x"]), manifest, call)
    answer = messages.get_message("ModelInferResponse").FromString(body)
    assert (answer.outputs[0].name, answer.outputs[0].datatype, list(answer.outputs[0].shape)) == ("y", datatype, [2])
    tensor.ClearField("contents")
    request.raw_input_contents.append(answer.raw_output_contents[0])
    assert decode(request, manifest).inputs["x"].tolist() == values


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (build(b"1"), "inputs[0] has 1 bytes of binary data, FP32 of shape [2, 2] has 16"),
        (build(None), "inputs[0] has 0 elements in fp32_contents, its shape [2, 2] has 4"),
        (build(None, fp64_contents=[1, 2, 3, 4]), "inputs[0] has 0 elements in fp32_contents"),
        (build(fp32_contents=[1, 2, 3, 4]), "inputs[0] has contents beside raw_input_contents"),
        (build(shape=(1, 2, 2)), "input 'inputs' has shape [1, 2, 2]"),
        (messages.get_message("ModelInferRequest")(raw_input_contents=[b""]), "the request has 0 inputs and 1 raw_"),
    ],
)
def test_what_does_not_fit_is_said(request_: Any, sentence: str) -> None:
    """A request that cannot be used is refused with one sentence."""
    with pytest.raises(InvalidRequestError) as caught:
        decode(request_)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("datatype", "value"), [("INT8", 128), ("UINT8", 256), ("INT16", -40_000)])
def test_small_integers_are_in_their_range(datatype: str, value: int) -> None:
    """8 and 16 bits travel in 32, and what they cannot hold is refused."""
    request = messages.get_message("ModelInferRequest")()
    contents = request.inputs.add(name="x", datatype=datatype, shape=[1]).contents
    getattr(contents, TYPED[datatype][0]).append(value)
    with pytest.raises(InvalidRequestError, match=f"outside {datatype}'s range"):
        decode(request, describe_tensor(datatype))


def test_fp16_has_no_typed_contents() -> None:
    """FP16 can only be raw."""
    request = messages.get_message("ModelInferRequest")()
    request.inputs.add(name="x", datatype="FP16", shape=[1])
    with pytest.raises(InvalidRequestError, match="send raw_input_contents"):
        decode(request, describe_tensor("FP16"))


def test_requests_that_would_unfold_are_refused_before_they_do() -> None:
    """Many fields, and much beside the raw contents, are refused before objects are made of them."""
    with pytest.raises(TooLargeError, match="fields"):
        messages.decode(b"\x2a\x00" * (messages.MAX_FIELDS + 1), COMPASS, HEAD)
    with pytest.raises(TooLargeError, match="beside raw_input_contents"):
        decode(build(None, (2**18, 2), fp32_contents=np.zeros(2**19 + 1, np.float32)))


@given(st.binary(max_size=60), st.integers(0, 60))
def test_no_body_raises_anything_else(noise: bytes, place: int) -> None:
    """Whatever a body is, it is read or refused."""
    good = build().SerializeToString()
    for body in (noise, good[:place] + noise + good[place:], good[: -len(noise) or None]):
        for read in (messages.read_model, lambda body: messages.decode(body, COMPASS, HEAD)):
            try:
                read(body)
            except ServiceError:
                continue
        assert messages.build_stream_error("wrong", body)


def test_answers_in_a_stream() -> None:
    """An answer is marked as final, and an error has the request's id."""
    request = build()
    request.id = "8"
    _, body = messages.encode(np.zeros((2, 4), np.float32), COMPASS, decode(request))
    stream = messages.get_message("ModelStreamInferResponse")
    answer = stream.FromString(messages.build_stream_response(body)).infer_response
    assert (answer.id, answer.parameters["triton_final_response"].bool_param) == ("8", True)
    assert len(answer.raw_output_contents) == 4
    failed = stream.FromString(messages.build_stream_error("wrong", request.SerializeToString()))
    assert (failed.error_message, failed.infer_response.id) == ("wrong", "8")


def list_fields(message: Descriptor) -> dict[str, tuple[int, int, bool]]:
    """Return number, type and repetition of each field by name."""
    return {field.name: (field.number, field.type, field.is_repeated) for field in message.fields}


def test_messages_are_those_of_tritons_client() -> None:
    """Every message that Triton's client has too has the same fields on the wire; only KServe's are added."""
    theirs = {**service_pb2.DESCRIPTOR.message_types_by_name, **model_config_pb2.DESCRIPTOR.message_types_by_name}
    ours = messages.POOL.FindFileByName("open_inference.proto")
    added = {}
    for name, message in ours.message_types_by_name.items():
        pairs = [(message, theirs[name])]
        pairs += [(nested, theirs[name].nested_types_by_name[nested.name]) for nested in message.nested_types]
        for mine, other in pairs:
            known = list_fields(other)
            for field, about in list_fields(mine).items():
                if field in known:
                    assert about == known[field], f"{mine.full_name}.{field}"
                else:
                    added[f"{name}.{field}"] = about[0]
    assert set(added) == {
        "RepositoryModelLoadResponse.model_name",
        "RepositoryModelLoadResponse.isLoaded",
        "RepositoryModelUnloadResponse.model_name",
        "RepositoryModelUnloadResponse.isUnloaded",
    }
    for name, enum in ours.enum_types_by_name.items():
        other = model_config_pb2.DESCRIPTOR.enum_types_by_name[name]
        assert enum.values_by_name.keys() == other.values_by_name.keys()
        assert all(value.number == other.values_by_name[key].number for key, value in enum.values_by_name.items())
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for name, method in messages.SERVICE.methods_by_name.items():
        assert method.full_name == methods[name].full_name
        assert method.input_type.full_name == methods[name].input_type.full_name
        assert method.output_type.full_name == methods[name].output_type.full_name


def test_compiled_messages_are_up_to_date(tmp_path: Path) -> None:
    """`make proto` gives what is committed."""
    compiled = tmp_path / "compiled"
    folder = ROOT / "service/grpc"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(folder), f"--descriptor_set_out={compiled}"]
    subprocess.run([*command, str(folder / "open_inference.proto")], check=True, timeout=60)
    assert compiled.read_bytes() == (folder / "open_inference.binpb").read_bytes()
