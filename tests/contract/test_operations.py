"""What the service says of itself over real HTTP: health, models, the API description, request ids."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
from openapi_spec_validator import validate

from service.api.schemas import build_example
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


def _fill(path: str, operation: dict[str, Any]) -> str:
    """Return a path with the examples of its parameters."""
    for parameter in operation.get("parameters", []):
        schema = parameter["schema"]
        path = path.replace(f"{{{parameter['name']}}}", str((schema.get("examples") or schema["enum"])[0]))
    return path


def _check_promise(document: dict[str, Any], answer: requests.Response, response: dict[str, Any]) -> None:
    """Hold an answer against the response that is described, and against its example."""
    if "$ref" in response:
        response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
    kind = answer.headers["Content-Type"].partition(";")[0]
    promised = response["content"][kind]
    if kind == "application/json":
        jsonschema.validate(answer.json(), _resolve(document, promised["schema"]))
        if "example" in promised:
            assert flatten(answer.json()) == [
                pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
                for value in flatten(promised["example"])
            ]


def flatten(value: Any) -> list[Any]:
    """Return what stands in decoded JSON, in order, names and all."""
    if isinstance(value, dict):
        return [each for name, inner in value.items() for each in (name, *flatten(inner))]
    return [each for inner in value for each in flatten(inner)] if isinstance(value, list) else [value]


def call_every_operation(server: Server, **headers: str) -> dict[str, Any]:
    """Send every example of the document, and see that what comes is as promised; return the document."""
    document: dict[str, Any] = server.get("/openapi.json", headers=headers).json()
    validate(document)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            url = _fill(path, operation)
            if method == "post":
                content = operation["requestBody"]["content"]["application/json"]
                if "example" not in content:  # all numbers of a picture
                    assert path.endswith("/infer")
                    continue
                jsonschema.validate(content["example"], _resolve(document, content["schema"]))
                answer = server.post(url, json=content["example"], headers=headers)
            else:
                answer = server.get(url, headers=headers)
            assert answer.status_code == 200, (path, answer.text)
            _check_promise(document, answer, operation["responses"]["200"])
    return document


def test_openapi_validates_and_every_example_works(server: Server) -> None:
    """The document is valid; every example in it, pasted, matches its schema and is answered 200 as promised."""
    document = call_every_operation(server)
    posts = [path for path, operations in document["paths"].items() if "post" in operations]
    assert len(posts) == 25  # predict and preview twice, infer once
    assert {"/metrics", "/v2", "/v2/models", "/v2/models/{model}"} < set(document["paths"])


def test_golden_outputs_are_the_example_of_an_answer(published: Path) -> None:
    """What the document shows as an answer to its example is what comes, for every model that is shipped."""
    with Server(published, "--workers", "1", "--device", "cpu") as server:
        document = call_every_operation(server)
    for path, operations in document["paths"].items():
        if path.endswith((":predict", "/infer")) and "mnist" not in path:  # pictures' examples are fitted first
            assert "example" in operations["post"]["responses"]["200"]["content"]["application/json"]


def test_description_is_small_compressed_and_can_be_of_one_model(empty_dir: Path) -> None:
    """A model takes under 20 kB, pictures and 1,000 labels included; `?model=` leaves the others out."""
    light = fakes.traffic_light()
    sides = {"width": 224, "height": 224}
    large = replace(light, input=light.input | {"shape": [3, 224, 224], "image": light.input["image"] | sides})
    for index in range(4):
        fakes.write_version(empty_dir, replace(fakes.canvas(), name=f"canvas-{index}"))
    fakes.write_version(empty_dir, large)
    with Server(empty_dir, "--workers", "1", "--device", "cpu") as server:
        answer = server.get("/openapi.json")
        assert answer.headers["Content-Encoding"] == "gzip"
        assert "Content-Encoding" not in server.get("/openapi.json", headers={"Accept-Encoding": "identity"}).headers
        assert len(answer.content) < 16_000 + 5 * 20_000
        one = server.get("/openapi.json?model=canvas-1").json()
        validate(one)
        assert {path for path in one["paths"] if "canvas" in path} == {
            path for path in answer.json()["paths"] if "canvas-1" in path
        }
        assert server.get("/openapi.json?model=none").status_code == 404


def test_versions_of_other_inputs_have_operations_of_their_own(empty_dir: Path) -> None:
    """Where a version takes other features, each version is described as it is; where not, one description does."""
    fakes.write_version(empty_dir, fakes.doubler())
    fakes.write_version(empty_dir, fakes.doubler(version=2))
    fakes.write_version(empty_dir, fakes.coin())
    newer = {"kind": "tabular", "shape": [2], "features": [{"name": "u"}, {"name": "v"}]}
    fakes.write_version(empty_dir, replace(fakes.coin(), version=2, input=newer))
    with Server(empty_dir, "--workers", "1") as server:
        document = call_every_operation(server)
    predicts = [path for path in document["paths"] if path.endswith(":predict")]
    assert predicts == [
        "/v1/models/coin:predict",
        "/v1/models/coin/versions/1:predict",
        "/v1/models/coin/versions/2:predict",
        "/v1/models/doubler:predict",
        "/v1/models/doubler/versions/{version}:predict",
    ]
    for version, names in ((1, ["a", "b"]), (2, ["u", "v"])):
        post = document["paths"][f"/v1/models/coin/versions/{version}:predict"]["post"]
        assert list(post["requestBody"]["content"]["application/json"]["example"]["instances"][0]) == names


def test_models_are_described_with_types(server: Server) -> None:
    """The answers of /v1/models have a schema that knows every field, and would find a wrong one."""
    document = server.get("/openapi.json").json()
    check = jsonschema.Draft202012Validator(_resolve(document, {"$ref": "#/components/schemas/Model"})).is_valid
    for model in server.get("/v1/models").json()["models"]:
        assert set(model) <= set(document["components"]["schemas"]["Model"]["properties"])
        assert check(model)
        wrongs: list[Any] = [{"versions": ["1"]}, {"task": "guess"}, {"input": {}}, {"labels": "a"}, {"other": 1}]
        for wrong in wrongs:
            assert not check(model | wrong)


def test_answer_that_not_all_is_ready_is_as_described(empty_dir: Path) -> None:
    """The 503 of /health/ready, and what is said of a model that does not serve, match their schemas."""
    fakes.write_version(empty_dir, fakes.liar())
    with Server(empty_dir, "--workers", "1") as server:
        document, answer = server.get("/openapi.json").json(), server.get("/health/ready")
        assert answer.status_code == 503
        _check_promise(document, answer, document["paths"]["/health/ready"]["get"]["responses"]["503"])
        listed = server.get("/v1/models")
        _check_promise(document, listed, document["paths"]["/v1/models"]["get"]["responses"]["200"])


def test_more_instances_than_the_queue_takes_do_not_match(models_dir: Path) -> None:
    """The schema has as its limit what is refused with 413 beyond."""
    with Server(models_dir, "--workers", "1", "--queue-size", "3") as server:
        schemas = server.get("/openapi.json").json()["components"]["schemas"]
        assert schemas["DoublerRequest"]["properties"]["instances"]["maxItems"] == 3
        assert [server.predict("doubler", [[1]] * count).status_code for count in (3, 4)] == [200, 413]


def test_need_for_a_key_is_described(server: Server, models_dir: Path) -> None:
    """With keys, every operation but the probes says that it needs one and is refused without; else none does."""
    for operations in server.get("/openapi.json").json()["paths"].values():
        assert not [each for each in operations.values() if "security" in each or "401" in each["responses"]]
    with Server(models_dir, "--workers", "1", "--api-key", "right") as locked:
        document = call_every_operation(locked, **{"X-API-Key": "right"})
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                answer = requests.request(method, locked.url + _fill(path, operation), json={}, timeout=30)
                if path.startswith("/health/"):
                    assert (answer.status_code, "security" in operation) == (200, False)
                    continue
                assert (answer.status_code, operation["security"]) == (401, [{"key": []}]), path
                _check_promise(document, answer, operation["responses"]["401"])


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
