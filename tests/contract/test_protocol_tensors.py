"""Models without a task, tensors in and tensors out, over real HTTP: every datatype, several inputs and outputs."""

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import orjson
import pytest
import requests
import tritonclient.http as triton
from onnx import TensorProto, helper
from openapi_spec_validator import validate
from tritonclient.utils import np_to_triton_dtype

from service.api.v2.datatypes import DATATYPES, Tensor
from service.api.v2.encode import write_binary, write_json
from tests import fakes
from tests.servers import Server

LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def tensors_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an echo of each datatype, one of them all, an adder with two inputs, and a model with a task."""
    root = tmp_path_factory.mktemp("tensors") / "models"
    for datatype in fakes.TYPES:
        about = {"x": (datatype, [-1])}
        fakes.write_signature(
            root, f"echo-{datatype.lower()}", about, {"y": about["x"]}, helper.make_node("Identity", ["x"], ["y"])
        )
    nodes = [helper.make_node("Identity", [f"in_{datatype}"], [f"out_{datatype}"]) for datatype in fakes.TYPES]
    names = {
        place: {f"{place}_{datatype}": (datatype, [-1, -1]) for datatype in fakes.TYPES} for place in ("in", "out")
    }
    fakes.write_signature(root, "echo", names["in"], names["out"], *nodes)
    whole = ("INT64", [-1])
    fakes.write_signature(
        root,
        "adder",
        {"a": whole, "b": whole},
        {"sum": whole, "difference": whole},
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Sub", ["a", "b"], ["difference"]),
    )
    fakes.write_signature(
        root, "ratio", {"x": ("FP32", [-1])}, {"y": ("FP32", [-1])}, helper.make_node("Reciprocal", ["x"], ["y"])
    )
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16)
    fakes.write_signature(root, "shortener", {"x": ("FP32", [-1, 2])}, {"y": ("FP16", [-1, 2])}, cast)
    fakes.write_version(root, fakes.doubler().only("onnx"))
    with Server(root, "--workers", "1", "--device", "cpu") as server:
        yield server


@pytest.fixture(scope="module")
def client(tensors_server: Server) -> Iterator[Any]:
    """Triton's client."""
    with triton.InferenceServerClient(tensors_server.url.removeprefix("http://")) as made:
        yield made


def draw_tensor(generator: np.random.Generator, datatype: str, shape: tuple[int, ...], text: bool = False) -> Tensor:
    """Return a random tensor of a datatype, any bits; with `text`, finite numbers and UTF-8, as JSON can carry them."""
    count = int(np.prod(shape))
    if datatype == "BYTES":
        words = ["", "a", "grüße", "\x00", "漢字", "x" * 300, '"\\']
        tensor = np.empty(count, object)
        tensor[:] = [words[index].encode() for index in generator.integers(0, len(words), count)]
        return tensor.reshape(shape)
    if datatype == "BOOL":
        return generator.integers(0, 2, shape).astype(np.bool_)
    dtype = DATATYPES[datatype]
    tensor = np.frombuffer(generator.bytes(count * dtype.itemsize), dtype).reshape(shape)
    return np.nan_to_num(tensor) if text and dtype.kind == "f" else tensor


def same(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors are equal to the bit."""
    if left.dtype == object:
        return [_encode(item) for item in left.reshape(-1)] == [_encode(item) for item in right.reshape(-1)]
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def _encode(item: Any) -> bytes:
    return item.encode() if isinstance(item, str) else bytes(item)


def build_input(name: str, tensor: Tensor, binary: bool = True) -> Any:
    """Return the client's input tensor."""
    made = triton.InferInput(name, list(tensor.shape), np_to_triton_dtype(tensor.dtype))
    made.set_data_from_numpy(tensor, binary_data=binary)
    return made


def test_ten_thousand_random_tensors_come_back(tensors_server: Server) -> None:
    """10,000 random tensors of every datatype come back over HTTP: exact in binary, NaN and all, and exact by JSON."""
    generator = np.random.default_rng(random.getrandbits(64))
    sent = 0
    url = f"{tensors_server.url}/v2/models/echo/infer"
    with requests.Session() as session:
        for turn in range(770):  # of 13 tensors each
            binary = turn % 4 != 0
            drawn = {
                datatype: draw_tensor(generator, datatype, tuple(generator.integers(1, 4, 2).tolist()), not binary)
                for datatype in fakes.TYPES
            }
            parts, described = [], []
            for datatype, tensor in drawn.items():
                about: dict[str, Any] = {"name": f"in_{datatype}", "datatype": datatype, "shape": list(tensor.shape)}
                if binary or datatype == "FP16":
                    parts.append(write_binary(tensor))
                    about["parameters"] = {"binary_data_size": len(parts[-1])}
                else:
                    about["data"] = write_json(tensor)
                described.append(about)
            outputs = [
                {"name": f"out_{each}", "parameters": {"binary_data": binary or each == "FP16"}} for each in fakes.TYPES
            ]
            header = orjson.dumps({"inputs": described, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
            answer = session.post(url, data=b"".join((header, *parts)), headers={LENGTH: str(len(header))}, timeout=30)
            assert answer.status_code == 200, answer.text
            length = int(answer.headers[LENGTH])
            position = length
            for output in json.loads(answer.content[:length])["outputs"]:
                tensor = drawn[output["datatype"]]
                assert (output["name"], output["shape"]) == (f"out_{output['datatype']}", list(tensor.shape))
                if "data" in output:
                    data = [item.encode() for item in output["data"]] if tensor.dtype == object else output["data"]
                    found = np.array(data, tensor.dtype).reshape(tensor.shape)
                    assert same(found, tensor)
                else:
                    size = output["parameters"]["binary_data_size"]
                    assert answer.content[position : position + size] == write_binary(tensor)
                    position += size
                sent += 1
            assert position == len(answer.content)
    assert sent >= 10_000


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("datatype", fakes.TYPES)
def test_every_datatype_with_tritons_client(datatype: str, binary_in: bool, binary_out: bool, client: Any) -> None:
    """Every datatype goes through Triton's client each way; FP16 does not go by JSON, and that is said."""
    tensor = draw_tensor(np.random.default_rng(random.getrandbits(64)), datatype, (5,), text=True)
    outputs = [triton.InferRequestedOutput("y", binary_data=binary_out)]
    name = f"echo-{datatype.lower()}"
    if datatype == "FP16" and not (binary_in and binary_out):
        with pytest.raises(triton.InferenceServerException, match="FP16") as caught:
            client.infer(name, [build_input("x", tensor, binary_in)], outputs=outputs)
        assert caught.value.status() == "400"
        return
    assert same(client.infer(name, [build_input("x", tensor, binary_in)], outputs=outputs).as_numpy("y"), tensor)


def test_several_inputs_and_outputs(client: Any) -> None:
    """Inputs in any order, outputs in the order asked for, whole numbers to the last digit."""
    a, b = np.array([2**53, -5]), np.array([1, 7])
    for inputs in ([build_input("a", a), build_input("b", b, False)], [build_input("b", b), build_input("a", a)]):
        wanted = [triton.InferRequestedOutput("difference", binary_data=False), triton.InferRequestedOutput("sum")]
        result = client.infer("adder", inputs, outputs=wanted)
        assert [output["name"] for output in result.get_response()["outputs"]] == ["difference", "sum"]
        assert result.as_numpy("sum").tolist() == [2**53 + 1, 2]
        assert result.as_numpy("difference").tolist() == [2**53 - 1, -12]


def test_signature_is_described(client: Any) -> None:
    """Metadata and configuration have every tensor with its datatype and shape."""
    metadata = client.get_model_metadata("echo")
    assert metadata["inputs"] == [{"name": f"in_{each}", "datatype": each, "shape": [-1, -1]} for each in fakes.TYPES]
    assert [output["datatype"] for output in metadata["outputs"]] == list(fakes.TYPES)
    assert metadata["platform"] == "onnx_onnxv1"
    config = client.get_model_config("adder")
    assert "max_batch_size" in config
    assert [each["data_type"] for each in config["input"]] == ["TYPE_INT64", "TYPE_INT64"]
    assert client.is_model_ready("adder")
    assert client.get_inference_statistics("adder")["model_stats"][0]["name"] == "adder"


def test_raw_binary_of_any_datatype(tensors_server: Server) -> None:
    """A raw body fills the one open dimension; a model with two inputs has no raw form."""
    numbers = np.arange(5, dtype="<i2")
    answer = tensors_server.post("/v2/models/echo-int16/infer", data=numbers.tobytes(), headers={LENGTH: "0"})
    assert answer.content[int(answer.headers[LENGTH]) :] == numbers.tobytes()
    answer = tensors_server.post("/v2/models/echo-bytes/infer", data=b"anything", headers={LENGTH: "0"})
    assert answer.content[int(answer.headers[LENGTH]) :] == b"\x08\0\0\0anything"
    for path, body in (("adder", b"\0" * 16), ("echo-int16", b"\0" * 3)):
        answer = tensors_server.post(f"/v2/models/{path}/infer", data=body, headers={LENGTH: "0"})
        assert (answer.status_code, list(answer.json())) == (400, ["error"])


WHOLE = {"name": "a", "datatype": "INT64", "shape": [2], "data": [1, 2]}
OTHER = WHOLE | {"name": "b"}


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ("adder", [WHOLE]),
        ("adder", [WHOLE, OTHER, OTHER | {"name": "c"}]),
        ("adder", [WHOLE, WHOLE]),
        ("adder", [WHOLE, OTHER | {"datatype": "INT32"}]),
        ("adder", [WHOLE, OTHER | {"shape": [2, 1]}]),
        ("adder", [WHOLE, OTHER | {"shape": [3], "data": [1, 2, 3]}]),
        ("adder", [WHOLE, OTHER | {"data": [1.5, 2]}]),
        ("adder", [WHOLE, OTHER | {"data": [True, 2]}]),
        ("echo-uint8", [{"name": "x", "datatype": "UINT8", "shape": [1], "data": [300]}]),
        ("echo-uint8", [{"name": "x", "datatype": "UINT8", "shape": [1], "data": [-1]}]),
        ("echo-fp16", [{"name": "x", "datatype": "FP16", "shape": [1], "data": [1.0]}]),
        ("echo-bool", [{"name": "x", "datatype": "BOOL", "shape": [1], "data": [1]}]),
        ("echo-bytes", [{"name": "x", "datatype": "BYTES", "shape": [1], "data": [1]}]),
        ("echo-fp32", [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1e39]}]),
        ("echo-fp32", [{"name": "x", "datatype": "FP32", "shape": [0, 2**62], "data": []}]),
        ("ratio", [{"name": "x", "datatype": "FP32", "shape": [1], "data": [0]}]),
    ],
)
def test_tensors_that_do_not_fit_are_a_400(model: str, inputs: list[Any], tensors_server: Server) -> None:
    """Missing, extra, doubled or other tensors, elements out of range, answers that JSON cannot say: never a 500."""
    answer = tensors_server.post(f"/v2/models/{model}/infer", json={"inputs": inputs})
    assert (answer.status_code, list(answer.json())) == (400, ["error"]), answer.text


def test_bytes_that_are_not_text(tensors_server: Server) -> None:
    """Bytes that no text has are refused where the graph takes text; they are no failure of the model."""
    content = write_binary(np.array([b"\xff\xfe"], object))
    about = {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(content)}}
    header = json.dumps({"inputs": [about]}).encode()
    answer = tensors_server.post(
        "/v2/models/echo-bytes/infer", data=header + content, headers={LENGTH: str(len(header))}
    )
    assert (answer.status_code, "not UTF-8" in answer.json()["error"]) == (400, True)


def test_empty_tensors_and_infinities_travel(client: Any) -> None:
    """A tensor without elements is a tensor; binary data carries what JSON cannot."""
    assert client.infer("echo-fp32", [build_input("x", np.zeros(0, np.float32))]).as_numpy("y").shape == (0,)
    wild = np.array([np.inf, -np.inf, np.nan, -0.0], np.float32)
    assert same(client.infer("echo-fp32", [build_input("x", wild)]).as_numpy("y"), wild)


def test_typed_interface_says_where_to_go(tensors_server: Server) -> None:
    """A model without a task is not served by /v1, with a sentence; the others are."""
    answer = tensors_server.post("/v1/models/adder:predict", json={"instances": [[1]]})
    assert 400 <= answer.status_code < 500
    assert "/v2" in answer.json()["error"]
    assert tensors_server.predict("doubler", [[2]]).json()["predictions"] == [{"prediction": 4.0}]
    listed = {model["name"]: model for model in tensors_server.get("/v1/models").json()["models"]}
    assert listed["adder"]["ready"] is True


def test_every_model_can_be_called_from_its_description(tensors_server: Server) -> None:
    """Each model of tensors has an infer operation with its tensors, and what it offers is answered as described."""
    document = tensors_server.get("/openapi.json").json()
    validate(document)
    posts = {path: each["post"] for path, each in document["paths"].items() if path.endswith("/infer")}
    assert (
        len(posts) == 2 * (len(fakes.TYPES) + 4) + 1
    )  # without and with a version; the model with a task without alone
    for path, post in posts.items():
        url, content = path.replace("{version}", "1"), post["requestBody"]["content"]
        promised = post["responses"]["200"]["content"]
        if "application/json" in content:
            body = content["application/json"]
            jsonschema.validate(body["example"], body["schema"])
            answer = tensors_server.post(url, json=body["example"])
        elif "echo/" in path:
            continue  # 13 inputs, one of which no JSON can carry
        else:
            assert post["parameters"][-1]["name"] == LENGTH
            answer = tensors_server.post(url, data=b"\x00\x3c", headers={LENGTH: "0"})
        assert answer.status_code == 200, (path, answer.text)
        kind = answer.headers["Content-Type"]
        assert kind in promised
        if kind == "application/json":
            jsonschema.validate(answer.json(), promised[kind]["schema"])
    body = posts["/v2/models/adder/infer"]["requestBody"]["content"]["application/json"]
    check = jsonschema.Draft202012Validator(body["schema"]).is_valid
    for wrong in ({"datatype": "FP32"}, {"name": "c"}, {"shape": [1, 1]}, {"data": ["1"]}):
        first, second = body["example"]["inputs"]
        assert not check({"inputs": [first | wrong, second]})
