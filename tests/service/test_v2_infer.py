"""Tests of service.api.v2.decode and encode: infer bodies to arrays and back, without a server."""

import io
import json
import random
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.api.headers import RequestHeaders
from service.api.v2 import decode as v2_decode
from service.api.v2 import encode as v2_encode
from service.api.v2.infer_request import RequestedOutput, all_outputs, output_specs
from service.errors import InvalidRequestError
from service.model.backends import Array
from service.model.manifest import TensorManifest
from service.model.tensor_model import Tensors
from tests import fakes

COMPASS = fakes.compass().manifest()
_PAIR: dict[str, Any] = {
    "name": "pair",
    "version": 1,
    "task": "tensors",
    "artifacts": {"onnx": {"file": "model.onnx", "sha256": "0" * 64, "bytes": 1}},
    "inputs": [{"name": name, "datatype": "FP32", "shape": [2]} for name in ("left", "right")],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [2]}],
}
PAIR = TensorManifest.model_validate_json(orjson.dumps(_PAIR))
LOGITS = np.array([[1, 2, 3, 4]], np.float32)
PROBABILITIES = np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def build_body(**changes: Any) -> dict[str, Any]:
    """Return a good request with one tensor, changed."""
    return {"inputs": [build_input()]} | changes


def build_input(**changes: Any) -> dict[str, Any]:
    """Return a good input for two rows of `compass`, changed; a field changed to ... is left out."""
    fields = {"name": "inputs", "shape": [2, 2], "datatype": "FP32", "data": [[1, 2], [3, 4]]} | changes
    return {name: value for name, value in fields.items() if value is not ...}


def decode(body: dict[str, Any] | bytes, binary: bytes = b"", length: object = None) -> v2_decode.InferCall:
    """Decode a request for `compass`, with binary data behind it where there is any."""
    header = body if isinstance(body, bytes) else orjson.dumps(body)
    if binary and length is None:
        length = len(header)
    head = RequestHeaders(b"id", json_length=b"" if length is None else str(length).encode())
    return v2_decode.decode(header + binary, COMPASS, head)


def read(body: dict[str, Any], binary: bytes = b"", length: object = None) -> Array:
    """Return the inputs of a request."""
    inputs = decode(body, binary, length).inputs
    assert isinstance(inputs, np.ndarray)
    return inputs


def encode(body: dict[str, Any], outputs: Array = LOGITS) -> tuple[dict[str, Any], bytes]:
    """Return the answer's JSON and the binary data behind it."""
    fields, answer = v2_encode.encode(outputs, COMPASS, decode(body))
    if b"octet-stream" not in fields:
        assert fields == b"content-type: application/json\r\n"
        return orjson.loads(answer), b""
    length = int(fields.rsplit(b": ", 1)[1])
    return orjson.loads(answer[:length]), answer[length:]


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_json_data_is_flat_or_nested(data: list[Any]) -> None:
    """Both forms are the same tensor, float32."""
    inputs = read(build_body(inputs=[build_input(data=data)]))
    assert inputs.dtype == np.float32
    assert inputs.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "body",
    [
        orjson.dumps(build_body()),
        json.dumps(build_body(outputs=[{"name": "label"}]), indent=1).encode(),
        json.dumps(build_body(inputs=[build_input(data=[1.0, 2, 3, 4e0])], parameters={"timeout": 5})).encode(),
        b'{"id":"x","inputs":[{"data":[[1,2],[3,4]],"shape":[2,2],"datatype":"FP32","name":"inputs"}]}',
    ],
)
def test_plain_numbers_take_the_short_way(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 data, flat or nested and wherever it is in the body, is read without a Python object per number."""
    expected = v2_decode.decode(body, COMPASS, RequestHeaders(b"id", json_length=b"%d" % len(body)))
    monkeypatch.setattr(v2_decode, "read_json", None)
    call = decode(body)
    assert isinstance(call.inputs, np.ndarray)
    assert call.inputs.tolist() == [[1, 2], [3, 4]]
    assert call[1:] == expected[1:]


FRAGMENTS = [
    b'"data"', b'"data":', b'"data":[5,6,7,8],', b'"d\\u0061ta":[5,6,7,8],', b'"parameters":{"data":[5,6,7,8]},',
    b'"parameters":{"binary_data_size":16},', b'"id":"\\"data\\":[1,2]",', b'\\"', b"\\", b'"', b"[", b"]", b"[]", b"{",
    b"}", b",", b":", b" ", b"],[", b"},{", b"0", b"-0", b"1e39", b"1e400", b"18446744073709551616", b"NaN", b"true",
    b"null", b'"1"', b"\xff",
]  # fmt: skip
BODIES = [orjson.dumps(build_body(inputs=[build_input(data=data)])) for data in ([1, 2, 3, 4], [[1, 2], [3, 4]])]


def outcome(body: bytes, json_length: bytes) -> tuple[Any, ...]:
    """Return what a body is decoded to, or why it is refused."""
    try:
        call = v2_decode.decode(body, COMPASS, RequestHeaders(b"id", json_length=json_length))
    except InvalidRequestError as error:
        return (str(error),)
    assert isinstance(call.inputs, np.ndarray)
    return call.inputs.dtype, call.inputs.tolist(), *call[1:]


@settings(max_examples=500)
@given(
    st.sampled_from(BODIES),
    st.lists(st.tuples(st.integers(0, 130), st.integers(0, 3), st.sampled_from(FRAGMENTS)), max_size=3),
)
def test_short_way_agrees_with_the_long_way(body: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    """With or without a length in the header field, which rules out the short way, the outcome is the same."""
    for place, removed, fragment in edits:
        body = body[:place] + fragment + body[place + removed :]
    assert outcome(body, b"") == outcome(body, b"%d" % len(body))


def build_pair(left: list[Any], right: list[Any]) -> bytes:
    """Return a body with two tensors of two numbers each."""
    sent = {"left": left, "right": right}
    tensors = [{"name": name, "datatype": "FP32", "shape": [2], "data": data} for name, data in sent.items()]
    return orjson.dumps({"inputs": tensors})


def pair_outcome(body: bytes, json_length: bytes) -> object:
    """Return what a body with two tensors is decoded to, or why it is refused."""
    try:
        call = v2_decode.decode(body, PAIR, RequestHeaders(b"id", json_length=json_length))
    except InvalidRequestError as error:
        return str(error)
    assert isinstance(call.inputs, Tensors)
    return {name: (tensor.dtype, tensor.tolist()) for name, tensor in call.inputs.items()}, *call[1:]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 3), st.sampled_from(FRAGMENTS)), max_size=3))
def test_several_tensors_go_either_way_alike(edits: list[tuple[int, int, bytes]]) -> None:
    """Each tensor gets its own list of numbers, in whatever way something odd stands beside one."""
    body = build_pair([1, 2], [3, 4])
    for place, removed, fragment in edits:
        body = body[:place] + fragment + body[place + removed :]
    assert pair_outcome(body, b"") == pair_outcome(body, b"%d" % len(body))


def test_several_tensors_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number of theirs becomes a Python object either."""
    monkeypatch.setattr(v2_decode, "read_json", None)
    found = pair_outcome(build_pair([1, 2.5], [-3, 4e9]), b"")
    assert isinstance(found, tuple)
    assert found[0] == {"left": (np.float32, [1, 2.5]), "right": (np.float32, [-3, 4e9])}


@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("fragment", FRAGMENTS)
@pytest.mark.parametrize("body", BODIES)
def test_short_way_agrees_beside_the_data(body: bytes, fragment: bytes, position: str) -> None:
    """The same, with something odd right before or after the key or the list."""
    for marker in (b'"data"', b'"data":', b"[", b"1", b"4"):
        place = body.index(marker, body.index(b'"data"')) + (0 if position == "first" else len(marker))
        changed = body[:place] + fragment + body[place:]
        assert outcome(changed, b"") == outcome(changed, b"%d" % len(changed))


def test_binary_data_follows_the_json() -> None:
    """Binary data is the tensor, without a copy, also when the same JSON comes again."""
    rows = np.arange(4, dtype="<f4").reshape(2, 2)
    body = build_body(inputs=[build_input(data=..., parameters={"binary_data_size": 16})])
    for tensor in (rows, rows + 1):
        assert read(body, tensor.tobytes()).tolist() == tensor.tolist()


def test_raw_binary_is_one_row() -> None:
    """With a JSON length of 0 the body is the one input's bytes, a batch of one, and all outputs are binary."""
    call = decode(np.array([3, 4], "<f4").tobytes(), length=0)
    assert isinstance(call.inputs, np.ndarray)
    assert call.inputs.tolist() == [[3, 4]]
    assert [output.binary for output in call.outputs] == [True] * 4
    for size in (0, 4, 16):
        with pytest.raises(InvalidRequestError, match="bytes of binary data"):
            decode(b"\0" * size, length=0)


def test_ten_thousand_random_tensors_come_back() -> None:
    """10,000 random tensors decode exactly from binary data, and to the nearest float32 from JSON of doubles."""
    generator = np.random.default_rng(random.getrandbits(64))
    for rows in generator.integers(1, 5, 10_000).tolist():
        doubles = generator.normal(0, 10.0 ** generator.integers(-30, 30), (rows, 2))
        tensor = doubles.astype("<f4")
        shape = [rows, 2]
        about = build_input(shape=shape, data=..., parameters={"binary_data_size": tensor.nbytes})
        assert read(build_body(inputs=[about]), tensor.tobytes()).tobytes() == tensor.tobytes()
        about = build_input(shape=shape, data=doubles.ravel().tolist())
        assert read(build_body(inputs=[about])).tobytes() == tensor.tobytes()
        outputs = np.concatenate((tensor, tensor), axis=1)
        answer, binary = encode(build_body(outputs=[{"name": "outputs", "parameters": {"binary_data": True}}]), outputs)
        assert binary == outputs.tobytes()
        answer, binary = encode(build_body(outputs=[{"name": "outputs"}]), outputs)
        assert np.array(answer["outputs"][0]["data"], np.float32).tobytes() == outputs.tobytes()


def test_all_outputs_unless_some_are_listed() -> None:
    """Without a list, the graph's own output and the task's are given; with one, exactly those, in that order."""
    answer, _ = encode(build_body())
    assert [(output["name"], output["datatype"], output["shape"]) for output in answer["outputs"]] == [
        ("outputs", "FP32", [1, 4]),
        ("prediction", "INT64", [1]),
        ("probabilities", "FP32", [1, 4]),
        ("label", "BYTES", [1]),
    ]
    assert [output["data"] for output in answer["outputs"]] == [
        [1, 2, 3, 4],
        [3],
        pytest.approx(PROBABILITIES.tolist()),
        ["west"],
    ]
    answer, _ = encode(build_body(outputs=[{"name": "label"}, {"name": "outputs"}]))
    assert [output["name"] for output in answer["outputs"]] == ["label", "outputs"]
    assert (answer["model_name"], answer["model_version"]) == ("compass", "1")


@pytest.mark.parametrize(
    ("wide", "own", "binary"),
    [(False, None, False), (True, None, True), (True, False, False), (False, True, True), (True, True, True)],
)
def test_own_flag_of_an_output_wins(wide: bool, own: bool | None, binary: bool) -> None:
    """`binary_data` of an output wins over the request's `binary_data_output`; a binary output has no `data`."""
    parameters = {} if own is None else {"binary_data": own}
    outputs = [{"name": "prediction", "parameters": parameters}]
    answer, rest = encode(build_body(parameters={"binary_data_output": wide}, outputs=outputs))
    (output,) = answer["outputs"]
    assert ("data" not in output) == binary
    assert output.get("parameters") == ({"binary_data_size": 8} if binary else None)
    assert rest == (np.array([3], "<i8").tobytes() if binary else b"")


def test_binary_and_json_outputs_mix() -> None:
    """Binary data stands behind the JSON in the order of the outputs that have any."""
    flag = {"parameters": {"binary_data": True}}
    answer, rest = encode(
        build_body(outputs=[{"name": "label"} | flag, {"name": "prediction"}, {"name": "outputs"} | flag])
    )
    assert [output.get("parameters", {}).get("binary_data_size") for output in answer["outputs"]] == [8, None, 16]
    assert rest == b"\x04\0\0\0west" + np.array([1, 2, 3, 4], "<f4").tobytes()


def test_id_is_echoed_and_nothing_is_null() -> None:
    """The id comes back if there was one; optional keys that say nothing are left out."""
    assert encode(build_body(id="mine"))[0]["id"] == "mine"
    assert "id" not in encode(build_body())[0]
    for body in (build_body(id=None, parameters=None, outputs=None), build_body(outputs=[])):
        answer, _ = encode(body)
        assert set(answer) == {"model_name", "model_version", "outputs"}


def test_names_that_clients_repeat_are_taken() -> None:
    """KServe's client writes the model's name into the body too; the path decides."""
    assert read(build_body(model_name="other", model_version="7")).shape == (2, 2)


def test_reserved_parameters_are_taken() -> None:
    """Parameters of other servers do no harm; `timeout` is in microseconds."""
    parameters = {"sequence_id": 1, "sequence_start": True, "priority": 2, "triton_x": "y", "timeout": 1_500_000}
    assert decode(build_body(parameters=parameters)).timeout == 1.5
    assert decode(build_body(parameters={"timeout": 0})).timeout is None


def test_classification() -> None:
    """The k largest of each row as "value:index:label", all where k is larger than there are classes."""
    wanted = {"name": "probabilities", "parameters": {"classification": 2}}
    (output,) = encode(build_body(outputs=[wanted]))[0]["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 2])
    assert output["data"] == ["0.643914:3:west", "0.236883:2:south"]
    wanted["parameters"] = {"classification": 9}
    assert encode(build_body(outputs=[wanted]))[0]["outputs"][0]["shape"] == [1, 4]


def test_classes_of_integers_are_written_as_such() -> None:
    """As Triton writes them, also where a float could not hold them."""
    spec = {"name": "y", "datatype": "INT64", "shape": [-1, 3]}
    artifact = {"onnx": {"file": "model.onnx", "sha256": "0" * 64, "bytes": 1}}
    fields = {"schema_version": 1, "name": "counts", "version": 1, "task": "tensors", "artifacts": artifact}
    manifest = TensorManifest.model_validate(fields | {"inputs": [spec], "outputs": [spec]})
    tensors = Tensors({"y": np.array([[16, -(2**63), 2**62 + 1]])})
    call = v2_decode.InferCall(tensors, None, (RequestedOutput("y", False, 3),), None)
    _, body = v2_encode.encode(tensors, manifest, call)
    assert orjson.loads(body)["outputs"][0]["data"] == ["4611686018427387905:2", "16:0", "-9223372036854775808:1"]


MALFORMED: dict[str, tuple[Any, bytes]] = {
    "not JSON": (b"{", b""),
    "empty": (b"", b""),
    "a list": (b"[]", b""),
    "NaN": (b'{"inputs":[{"name":"inputs","shape":[1,2],"datatype":"FP32","data":[NaN,1]}]}', b""),
    "no inputs": ({}, b""),
    "empty inputs": (build_body(inputs=[]), b""),
    "inputs null": (build_body(inputs=None), b""),
    "input a number": (build_body(inputs=[1]), b""),
    "no name": (build_body(inputs=[build_input(name=...)]), b""),
    "one too many": (build_body(inputs=[build_input(), build_input(name="x")]), b""),
    "the same twice": (build_body(inputs=[build_input(), build_input()]), b""),
    "no datatype": (build_body(inputs=[build_input(datatype=...)]), b""),
    "unknown datatype": (build_body(inputs=[build_input(datatype="FP8")]), b""),
    "datatype a list": (build_body(inputs=[build_input(datatype=["FP32"])]), b""),
    "another datatype": (build_body(inputs=[build_input(datatype="BOOL", data=[True, False])]), b""),
    "number that FP32 cannot hold": (build_body(inputs=[build_input(datatype="INT64", data=[2**24 + 1, 0])]), b""),
    "number beyond FP32": (build_body(inputs=[build_input(datatype="FP64", data=[1e300, 0])]), b""),
    "no shape": (build_body(inputs=[build_input(shape=...)]), b""),
    "no batch": (build_body(inputs=[build_input(shape=[2], data=[1, 2])]), b""),
    "empty batch": (build_body(inputs=[build_input(shape=[0, 2], data=[])]), b""),
    "scalar": (build_body(inputs=[build_input(shape=[], data=[1])]), b""),
    "too wide": (build_body(inputs=[build_input(shape=[1, 4])]), b""),
    "count is not the shape's": (build_body(inputs=[build_input(data=[1, 2, 3])]), b""),
    "nested wrongly": (build_body(inputs=[build_input(data=[[1, 2, 3], [4]])]), b""),
    "ragged": (build_body(inputs=[build_input(data=[[1, 2], 3])]), b""),
    "data an object": (build_body(inputs=[build_input(data={"a": 1})]), b""),
    "data null": (build_body(inputs=[build_input(data=None)]), b""),
    "neither data nor size": (build_body(inputs=[build_input(data=...)]), b""),
    "both": (build_body(inputs=[build_input(parameters={"binary_data_size": 16})]), b"\0" * 16),
    "size a string": (build_body(inputs=[build_input(data=..., parameters={"binary_data_size": "16"})]), b"\0" * 16),
    "size negative": (build_body(inputs=[build_input(data=..., parameters={"binary_data_size": -1})]), b"\0" * 16),
    "size true": (build_body(inputs=[build_input(data=..., parameters={"binary_data_size": True})]), b"\0"),
    "too few bytes": (build_body(inputs=[build_input(data=..., parameters={"binary_data_size": 16})]), b"\0" * 15),
    "bytes left over": (build_body(inputs=[build_input(data=..., parameters={"binary_data_size": 16})]), b"\0" * 17),
    "size is not the shape's": (
        build_body(inputs=[build_input(data=..., parameters={"binary_data_size": 8})]),
        b"\0" * 8,
    ),
    "binary NaN": (
        build_body(inputs=[build_input(shape=[1, 2], data=..., parameters={"binary_data_size": 8})]),
        np.array([np.nan, 1], "<f4").tobytes(),
    ),
    "unknown input field": (build_body(inputs=[build_input(datas=[1])]), b""),
    "unknown field": (build_body(input=[]), b""),
    "id a number": (build_body(id=1), b""),
    "parameters a list": (build_body(parameters=[1]), b""),
    "timeout a string": (build_body(parameters={"timeout": "1"}), b""),
    "timeout negative": (build_body(parameters={"timeout": -1}), b""),
    "binary_data_output 1": (build_body(parameters={"binary_data_output": 1}), b""),
    "outputs an object": (build_body(outputs={"name": "outputs"}), b""),
    "output a string": (build_body(outputs=["outputs"]), b""),
    "output without a name": (build_body(outputs=[{}]), b""),
    "output named by a list": (build_body(outputs=[{"name": ["outputs"]}]), b""),
    "output named by an object": (build_body(outputs=[{"name": {}}]), b""),
    "unknown output": (build_body(outputs=[{"name": "x"}]), b""),
    "duplicate output": (build_body(outputs=[{"name": "label"}, {"name": "label"}]), b""),
    "misspelled output field": (build_body(outputs=[{"name": "label", "parameter": {}}]), b""),
    "misspelled field": (build_body(output=[]), b""),
    "binary_data a string": (build_body(outputs=[{"name": "label", "parameters": {"binary_data": "yes"}}]), b""),
    "classification -1": (build_body(outputs=[{"name": "outputs", "parameters": {"classification": -1}}]), b""),
    "classification true": (build_body(outputs=[{"name": "outputs", "parameters": {"classification": True}}]), b""),
    "classes of a label": (build_body(outputs=[{"name": "label", "parameters": {"classification": 1}}]), b""),
    "nested 200 deep": (build_body(inputs=[build_input(data=orjson.loads("[" * 200 + "]" * 200))]), b""),
    "nested 250 000 deep": (b'{"inputs":' + b"[" * 250_000, b""),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_request_is_refused(case: str) -> None:
    """Every malformed request is refused with one short sentence."""
    body, binary = MALFORMED[case]
    with pytest.raises(InvalidRequestError) as caught:
        decode(body, binary)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("length", ["-1", "+1", "1.0", "0x1", "abc", "²", " 1", "999", "9" * 30])
def test_json_length_that_is_none_is_refused(length: str) -> None:
    """A JSON length that is no number, negative, or beyond the body is refused."""
    with pytest.raises(InvalidRequestError, match="Inference-Header-Content-Length"):
        decode(orjson.dumps(build_body()), length=length)


@given(st.binary(max_size=60), st.integers(0, 70) | st.none())
def test_any_body_is_read_or_refused(body: bytes, length: int | None) -> None:
    """Whatever the bytes and the stated length, nothing but a refusal is ever raised."""
    try:
        decode(body, length=length)
    except InvalidRequestError:
        return


@given(
    st.sampled_from(["request", "input", "output", "parameters", "input parameters", "output parameters"]), st.data()
)
def test_any_json_is_read_or_refused(place: str, data: st.DataObject) -> None:
    """Whatever JSON stands in any place of a request, nothing but a refusal is ever raised."""
    names = {
        "request": ["id", "parameters", "inputs", "outputs", "model_name"],
        "input": ["name", "shape", "datatype", "parameters", "data"],
        "output": ["name", "parameters"],
        "parameters": ["timeout", "binary_data_output", "priority"],
        "input parameters": ["binary_data_size"],
        "output parameters": ["binary_data", "classification"],
    }[place]
    change = {data.draw(st.sampled_from(names)): data.draw(JSON)}
    body = {
        "request": build_body() | change,
        "input": build_body(inputs=[build_input() | change]),
        "output": build_body(outputs=[{"name": "label"} | change]),
        "parameters": build_body(parameters=change),
        "input parameters": build_body(inputs=[build_input(data=..., parameters=change)]),
        "output parameters": build_body(outputs=[{"name": "outputs", "parameters": change}]),
    }[place]
    try:
        encode(body)
    except InvalidRequestError:
        return


@pytest.mark.parametrize("build", fakes.GOOD)
def test_outputs_are_those_described(build: Any) -> None:
    """For every task, what is given has the datatypes and shapes that `output_specs` says."""
    manifest = build().manifest()
    outputs = np.full((3, manifest.output_width), 0.5, np.float32)
    call = v2_decode.InferCall(outputs, None, all_outputs(manifest, binary=False), None)
    _, answer = v2_encode.encode(outputs, manifest, call)
    given_ = {each["name"]: (each["datatype"], each["shape"]) for each in orjson.loads(answer)["outputs"]}
    assert given_ == {
        name: (datatype, [3 if size == -1 else size for size in shape])
        for name, (datatype, shape) in output_specs(manifest).items()
    }


def test_pictures_come_as_bytes() -> None:
    """An image model takes encoded pictures as a BYTES tensor [N], each fitted as over /v1."""
    picture = Image.new("L", (56, 56), 255)
    picture.paste(0, (20, 8, 32, 48))
    file = io.BytesIO()
    picture.save(file, "PNG")
    manifest = fakes.canvas().manifest()
    content = b"".join(len(each).to_bytes(4, "little") + each for each in [file.getvalue()] * 2)
    about = {"name": "inputs", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(content)}}
    header = orjson.dumps({"inputs": [about]})
    inputs = v2_decode.decode(header + content, manifest, RequestHeaders(b"", json_length=b"%d" % len(header))).inputs
    assert isinstance(inputs, np.ndarray)
    assert inputs.shape == (2, 784)
    assert 0 < inputs.mean() < 0.5
    about["parameters"] = {"binary_data_size": 8}
    header = orjson.dumps({"inputs": [about | {"shape": [1]}]})
    for bad in (b"\x04\0\0\0\x89PNG", b"\0\0\0\0\0\0\0\0"):
        with pytest.raises(InvalidRequestError):
            v2_decode.decode(header + bad, manifest, RequestHeaders(b"", json_length=b"%d" % len(header)))
