"""Requests as TensorFlow Serving's documents and tutorials have them, and its answers to them.

Its REST API has no client package: callers post JSON. Source: https://www.tensorflow.org/tfx/serving/api_rest
"""

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import columns, fakes
from tests.servers import Server

NORTH, EAST = [0.0, 3.0], [5.0, 0.0]
QUERY = "?format=tfserving"
HOME = {"age": 40, "rooms": 2, "garden": True, "city": "Oslo", "remark": "fine", "since": "1970-01-03T12:00:00Z"}
HOUSE = [40.0, 2.0, 1.0, 2.0, 1.0, 2.5]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with models of every input, and one whose second version is refused."""
    root: Path = tmp_path_factory.mktemp("tfserving") / "models"
    for fake in (fakes.doubler(), fakes.compass(), fakes.canvas(), columns.house(), columns.box()):
        fakes.write_version(root, fake)
    broken = fakes.write_version(root, fakes.doubler(version=2))
    next(broken.glob("*.onnx")).write_bytes(b"?")
    with Server(root, "--workers", "1", "--backend", "onnx") as running:
        yield running


def ask(server: Server, path: str, body: dict[str, Any]) -> Any:
    """Return the answer to a prediction."""
    answer = server.post(f"/v1/models/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_caller_switches_by_its_url(server: Server) -> None:
    """The tutorial's first request, with scalars; and classes, whose probabilities Keras' models give."""
    assert ask(server, f"doubler:predict{QUERY}", {"instances": [1.0, 2.0, 5]}) == {"predictions": [[2], [4], [10]]}
    answer = ask(server, f"compass/versions/1:predict{QUERY}", {"instances": [NORTH, EAST]})
    assert list(answer) == ["predictions"]
    assert np.argmax(answer["predictions"], axis=1).tolist() == [0, 1]
    assert np.sum(answer["predictions"], axis=1) == pytest.approx([1, 1])
    houses = ask(server, f"house:predict{QUERY}", {"instances": [HOME, list(HOME.values())]})
    assert np.array(houses["predictions"]).tolist() == [HOUSE, HOUSE]


@pytest.mark.parametrize("field", [{"signature_name": "serving_default"}, {"format": "tfserving"}])
def test_fields_of_its_requests_ask_for_its_answers(field: dict[str, str], server: Server) -> None:
    """A signature's name, or a field of our own, does what the path does; an instance may name the input."""
    for instances in ([NORTH, EAST], [{"inputs": NORTH}, {"inputs": EAST}]):
        answer = ask(server, "compass:predict", {"instances": instances, **field})
        assert np.argmax(answer["predictions"], axis=1).tolist() == [0, 1]
    many = [[float(index % 7)] for index in range(3000)]
    padded = {**field, "instances": many, "parameters": {}}
    text = repr(padded).replace("'", '"').replace(", ", "," + " " * 100)  # long enough to be read in pieces
    answer = server.post("/v1/models/doubler:predict", data=text, headers={"Content-Type": "application/json"})
    assert len(text) > 2**18
    assert answer.json() == {"predictions": [[2 * row[0]] for row in many]}


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        ("doubler", [[1.0], [2.0]], [[2.0], [4.0]]),
        ("doubler", {"inputs": [[1.0], [2.0]]}, [[2.0], [4.0]]),
        ("box", {"a": [1.0, 2.0], "b": [[3.0], [4.0]]}, [[1.0, 3.0], [2.0, 4.0]]),
        ("house", {name: [[value]] for name, value in HOME.items()}, [HOUSE]),
    ],
)
def test_column_form(model: str, inputs: Any, outputs: list[Any], server: Server) -> None:
    """`inputs` of one tensor, of features or of columns are answered by `outputs`."""
    assert ask(server, f"{model}:predict", {"inputs": inputs}) == {"outputs": outputs}


def test_pictures_as_base64(server: Server) -> None:
    """As they are everywhere."""
    file = BytesIO()
    Image.new("L", (28, 28)).save(file, "PNG")
    picture = {"b64": base64.b64encode(file.getvalue()).decode()}
    answer = ask(server, f"canvas:predict{QUERY}", {"instances": [picture, {"inputs": picture}]})
    assert answer["predictions"][0] == answer["predictions"][1]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"instances": [NORTH], "signature_name": "other"}, "signature_name is not serving_default"),
        ({"instances": [NORTH], "format": "keras"}, "format is not tfserving"),
        ({"inputs": 5}, "inputs is a number, expected a list"),
        ({"inputs": {"x": [1], "y": [1, 2]}}, "the lists of inputs have several lengths"),
        ({"inputs": {"x": 1}}, "inputs.x is a number, expected a list"),
        ({"inputs": [NORTH], "instances": [NORTH]}, "unknown field 'inputs'"),
    ],
)
def test_refusals(body: dict[str, Any], sentence: str, server: Server) -> None:
    """What it would refuse, with a sentence."""
    answer = server.post("/v1/models/compass:predict", json=body)
    assert (answer.status_code, sentence in answer.json()["error"]) == (400, True), answer.text


def test_status_and_metadata(server: Server) -> None:
    """Health checks of its callers read the state of a version, and generators of clients the signature."""
    status = server.get("/v1/models/doubler").json()["model_version_status"]
    assert [(each["version"], each["state"], each["status"]["error_code"]) for each in status] == [
        ("2", "END", "FAILED_PRECONDITION"),
        ("1", "AVAILABLE", "OK"),
    ]
    one = server.get("/v1/models/doubler/versions/1").json()["model_version_status"]
    assert one == [{"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}]
    for path in ("", "/versions/1"):
        metadata = server.get(f"/v1/models/compass{path}/metadata").json()
        assert metadata["model_spec"] == {"name": "compass", "signature_name": "", "version": "1"}
        signature = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
        dims = [each["size"] for each in signature["inputs"]["inputs"]["tensor_shape"]["dim"]]
        assert (signature["inputs"]["inputs"]["dtype"], dims) == ("DT_FLOAT", ["-1", "2"])
        assert [each["size"] for each in signature["outputs"]["outputs"]["tensor_shape"]["dim"]] == ["-1", "4"]
    assert server.get("/v1/models/nosuch/metadata").status_code == 404
    assert server.get("/v1/models/compass/labels/nosuch").status_code == 404
