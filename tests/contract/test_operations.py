"""What the service says of itself over real HTTP: health, models, the API description, request ids."""

import re
from typing import Any

import jsonschema
import pytest
import requests
from openapi_spec_validator import validate

from service.api.openapi import build_example
from tests import fakes
from tests.servers import Server


def test_health(server: Server) -> None:
    """Live and ready answer 200 when every model serves."""
    assert server.get("/health/live").json() == {"live": True}
    assert server.get("/health/ready").json() == {"ready": True}


def test_models_are_listed(server: Server) -> None:
    """Every model is listed once, ready, with its versions; one alone is described as in the list."""
    listed: list[dict[str, Any]] = server.get("/v1/models").json()["models"]
    assert [model["name"] for model in listed] == ["canvas", "coin", "compass", "doubler", "switch"]
    for model in listed:
        assert model["ready"] is True
        assert server.get(f"/v1/models/{model['name']}").json() == model
    assert listed[3]["versions"] == [1, 2]


def test_model_is_described(server: Server) -> None:
    """A description has the task, features, labels, threshold and metrics of the manifest."""
    coin = server.get("/v1/models/coin").json()
    assert (coin["task"], coin["labels"], coin["threshold"]) == ("binary", ["tails", "heads"], 0.7)
    assert [feature["name"] for feature in coin["input"]["features"]] == ["a", "b"]
    doubler = server.get("/v1/models/doubler").json()
    assert (doubler["version"], doubler["metrics"], doubler["threshold"]) == (2, {"mse": 0.0}, None)
    assert server.get("/v1/models/doubler/versions/1").json()["version"] == 1
    assert server.get("/v1/models/switch").json()["threshold"] == 0.5


def test_device_and_provider_are_what_runs(server: Server, models_dir: Any) -> None:
    """Device and provider are those of the opened graph; with another backend they are another's."""
    coin = server.get("/v1/models/coin").json()
    assert (coin["backend"], coin["device"], coin["provider"]) == ("onnx", "cpu", "CPUExecutionProvider")
    with Server(models_dir, "--workers", "1", "--backend", "torchscript", "--device", "cpu") as other:
        coin = other.get("/v1/models/coin").json()
        assert (coin["backend"], coin["device"]) == ("torchscript", "cpu")
        assert re.fullmatch(r"torch \d+\..*", coin["provider"])
        assert other.predict("doubler", [[2]]).json()["predictions"] == [{"prediction": 5.0}]


@pytest.mark.parametrize("path", ["/v1/models/nosuch", "/v1/models/coin/versions/9", "/v1/models/coin/versions/x"])
def test_unknown_is_404(path: str, server: Server) -> None:
    """A model or version that is not there is a 404 with one sentence."""
    answer = server.get(path)
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]


def test_head_is_get_without_a_body(server: Server) -> None:
    """HEAD answers as GET does, without the body."""
    answer = requests.head(f"{server.url}/health/ready", timeout=10)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("path", ["/health/live", "/v1/models", "/nosuch", "/docs", "/openapi.json"])
def test_request_id_comes_back(path: str, server: Server) -> None:
    """A caller's X-Request-ID is echoed on every answer, and one is made where none, or an unusable one, was sent."""
    assert server.get(path, headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"
    made = {server.get(path, headers=headers).headers["X-Request-ID"] for headers in ({}, {}, {"X-Request-ID": "a b"})}
    assert len(made) == 3


def test_request_id_comes_back_with_predictions(server: Server) -> None:
    """Predictions and refusals carry the caller's id too."""
    for body, status in (({"instances": [[2]]}, 200), ({}, 400)):
        answer = server.post("/v1/models/doubler:predict", json=body, headers={"X-Request-ID": "abc-1"})
        assert (answer.status_code, answer.headers["X-Request-ID"]) == (status, "abc-1")


def test_docs_page_needs_no_network(server: Server) -> None:
    """The page and every file that it names come from the service itself."""
    page = server.get("/docs")
    assert page.headers["Content-Type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(files) >= 2
    for file in files:
        assert server.get(f"/{file}").status_code == 200


def _resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return {"components": document["components"], **schema}


def test_openapi_validates_and_every_example_works(server: Server) -> None:
    """The document is valid; every example in it, pasted, matches its schema and is answered 200 as promised."""
    document = server.get("/openapi.json").json()
    validate(document)
    pasted = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            url = path.replace("{version}", "1")
            promised = operation["responses"]["200"]["content"]["application/json"]["schema"]
            if method == "post":
                content = operation["requestBody"]["content"]["application/json"]
                jsonschema.validate(content["example"], _resolve(document, content["schema"]))
                answer = server.post(url, json=content["example"])
                pasted += 1
            else:
                answer = server.get(url)
            assert answer.status_code == 200, (path, answer.text)
            jsonschema.validate(answer.json(), _resolve(document, promised))
    assert pasted == 20  # predict and preview


def test_openapi_describes_parameters_and_refusals(server: Server) -> None:
    """Bodies with parameters match the schemas; bodies that are refused do not."""
    document = server.get("/openapi.json").json()

    def matches(title: str, body: Any) -> bool:
        schema = _resolve(document, {"$ref": f"#/components/schemas/{title}Request"})
        return bool(jsonschema.Draft202012Validator(schema).is_valid(body))

    assert matches("Coin", {"instances": [[1, 2], {"a": 1, "b": 2}], "parameters": {"threshold": 0.3}})
    assert matches("Compass", {"instances": [[1, 2]], "parameters": {"top_k": 4}})
    assert matches("Canvas", {"instances": [[[0.5] * 28] * 28]})
    wrong: list[Any] = [{"instances": bad} for bad in ([], [[1]], [{"a": 1}], [["1", 2]])]
    for body in [*wrong, {}]:
        assert not matches("Coin", body)
        assert server.post("/v1/models/coin:predict", json=body).status_code == 400
    assert not matches("Coin", {"instances": [[1, 2]], "parameters": {"threshold": 2}})
    assert not matches("Compass", {"instances": [[1, 2]], "parameters": {"top_k": 5}})
    answer = server.post("/v1/models/coin:predict", json={})
    jsonschema.validate(answer.json(), _resolve(document, {"$ref": "#/components/schemas/Error"}))


def test_examples_are_those_of_the_manifests(server: Server) -> None:
    """The example of a model is the one that its manifest gives."""
    document = server.get("/openapi.json").json()
    content = document["paths"]["/v1/models/coin:predict"]["post"]["requestBody"]["content"]["application/json"]
    assert content["example"] == build_example(fakes.coin().manifest())
