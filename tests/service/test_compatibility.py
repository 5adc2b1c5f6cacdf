"""What clients of Triton, KServe and TensorFlow Serving rely on, on the application without a server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from service.api.openapi import build_openapi
from service.app import create_app
from service.registry.registry import Registry
from service.settings import Settings
from tests import fakes
from tests.asgi import Answer, Client

V2 = "/v2/models/{}/infer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of each task, and two without one: integers with an open first axis, and a fixed size."""
    root: Path = tmp_path_factory.mktemp("compatible") / "models"
    for build in fakes.GOOD:
        fakes.write_version(root, build())
    nodes = [helper.make_node("Identity", ["a"], ["y"])]
    fakes.write_signature(root, "whole", {"a": ("INT32", [-1, 3])}, {"y": ("INT32", [-1, 3])}, *nodes)
    fakes.write_signature(root, "fixed", {"a": ("FP32", [2])}, {"y": ("FP32", [2])}, *nodes)
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    """An application on those models."""
    made = Client(create_app(Settings(models_dir=folder, device="cpu", backend="onnx")))
    yield made
    made.close()


def post(client: Client, path: str, body: dict[str, Any], *headers: tuple[str, str]) -> Answer:
    """Send JSON."""
    return client.request("POST", path, json.dumps(body).encode(), headers)


def tensor(data: Any, name: str = "inputs", datatype: str = "FP32", shape: list[int] | None = None) -> dict[str, Any]:
    """Return an input."""
    return {"name": name, "datatype": datatype, "shape": shape or list(np.shape(data)), "data": data}


def test_statistics_count_requests(client: Client) -> None:
    """perf_analyzer aborts unless the counts of the three compute steps are equal; all are of requests, at once."""

    def read() -> dict[str, int]:
        (row,) = client.request("GET", "/v2/models/switch/stats").json()["model_stats"]
        steps = ("success", "queue", "compute_input", "compute_infer", "compute_output")
        return {step: row["inference_stats"][step]["count"] for step in steps}

    before = read()
    for _ in range(3):
        assert post(client, V2.format("switch"), {"inputs": [tensor([[1.0], [2.0]])]}).status == 200
    assert {step: count - before[step] for step, count in read().items()} == dict.fromkeys(before, 3)


def test_configuration_says_what_takes_a_batch(client: Client) -> None:
    """A first axis that is open everywhere is a batch; only a model with a task batches the requests of several."""
    config = {name: client.request("GET", f"/v2/models/{name}/config").json() for name in ("coin", "whole", "fixed")}
    assert [config[name]["max_batch_size"] for name in ("coin", "whole", "fixed")] == [64, 64, 0]
    assert [config[name]["input"][0]["dims"] for name in ("coin", "whole", "fixed")] == [[2], [3], [2]]
    assert ["dynamic_batching" in config[name] for name in ("coin", "whole", "fixed")] == [True, False, False]


def test_shared_memory_is_named(client: Client) -> None:
    """An output that is asked for in shared memory is refused, since it would not be there."""
    parameters = {"shared_memory_region": "out", "shared_memory_byte_size": 8}
    body = {"inputs": [tensor([[1.0]])], "outputs": [{"name": "outputs", "parameters": parameters}]}
    answer = post(client, V2.format("switch"), body)
    assert answer.status == 400
    assert "shared memory" in answer.json()["error"]


def test_classes_of_integers_are_integers(client: Client) -> None:
    """The values of an integer output are written without a fraction."""
    asked = {"name": "y", "parameters": {"classification": 2}}
    body = {"inputs": [tensor([[1, 16, -3]], "a", "INT32")], "outputs": [asked]}
    assert post(client, V2.format("whole"), body).json()["outputs"][0]["data"] == ["16:1", "1:0"]


def list_schemas(value: Any) -> Iterator[dict[str, Any]]:
    """Return every object in a document that has a type."""
    if isinstance(value, dict):
        if "type" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from list_schemas(part)


@pytest.mark.parametrize("key", ["", "secret"])
def test_openapi_is_complete_enough_for_generators(key: str, folder: Path) -> None:
    """Every array says of what, every tag what it is, and security is said even where there is none."""
    settings = Settings(models_dir=folder, device="cpu", backend="onnx", api_key=key)
    registry = Registry(settings, 1, "cpu")
    registry.load(frozenset())
    document = build_openapi(registry, settings)
    assert all("items" in schema for schema in list_schemas(document) if schema["type"] == "array")
    assert all(tag["description"] for tag in document["tags"])
    assert document["security"] == []
    assert ("securitySchemes" in document["components"]) == bool(key)
