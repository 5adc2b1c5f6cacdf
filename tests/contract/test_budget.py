"""More models than fit into memory, over real HTTP: every one answers, and what is open stays within the budget."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tests import fakes
from tests.fakes import FakeModel
from tests.servers import Server
from tests.wire import wait_until

COUNT = 12
BALLAST = 500_000  # bytes of weights of each
BUDGET = "2MB"  # one worker: two or three are open; two workers: one in each


def build(number: int, version: int = 1, ballast: int = BALLAST) -> FakeModel:
    """Regression y = (number + 100·version)·x, with weights that are of no use."""
    nodes = [
        helper.make_node("MatMul", ["inputs", "factor"], ["product"]),
        helper.make_node("ReduceSum", ["ballast"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["product", "nothing"], ["outputs"]),
    ]
    weights = {
        "factor": np.array([[number + 100 * version]], np.float32),
        "zero": np.array(0, np.float32),
        "ballast": np.random.default_rng(number).random(ballast // 4, dtype=np.float32),
    }
    content = fakes.build_onnx(*nodes, weights=weights, wide=1, out=1)
    name = f"model-{number}"
    return FakeModel(name, "regression", fakes.tabular("x"), {"kind": "value"}, {"onnx": content}, version)


def ask(server: Server, number: int, version: int = 1) -> None:
    """Ask a model, and check its answer."""
    response = server.predict(f"model-{number}", [[1.0]])
    expected = {"model": f"model-{number}", "version": version, "predictions": [{"prediction": number + 100 * version}]}
    assert (response.status_code, response.json()) == (200, expected)


def list_cold(server: Server) -> list[bool]:
    """Return of each model whether it is cold."""
    return [model["cold"] for model in server.get("/v1/models").json()["models"]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of twelve models."""
    for number in range(COUNT):
        fakes.write_version(tmp_path / "models", build(number))
    return tmp_path / "models"


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    """A server of one worker that can have three of them open."""
    with Server(root, "--workers", "1", "--memory-budget", BUDGET, "--reload-interval", "0.5") as found:
        yield found


def test_more_models_than_fit_are_all_served(server: Server) -> None:
    """Each answers, again and again; the others are cold, which /v1/models and readiness say."""
    assert sum(list_cold(server)) >= COUNT - 3
    for number in [*range(COUNT), *range(COUNT)]:
        ask(server, number)
        cold = list_cold(server)
        assert COUNT - 3 <= sum(cold) < COUNT
    assert not server.get(f"/v1/models/model-{COUNT - 1}").json()["cold"]
    ready = server.get("/health/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "cold": sum(list_cold(server))})
    assert server.get("/v2/health/ready").json() == {"ready": True}
    assert server.get("/v2/models/model-0/ready").json() == {"name": "model-0", "ready": True}


def test_requests_that_race_with_closing_never_fail(root: Path) -> None:
    """Eight clients ask all models in different orders: every answer is right."""
    with Server(root, "--workers", "2", "--memory-budget", BUDGET) as server, ThreadPoolExecutor(8) as clients:

        def ask_all(seed: int) -> None:
            for number in np.random.default_rng(seed).integers(COUNT, size=40).tolist():
                ask(server, number)

        list(clients.map(ask_all, range(8)))


def test_cold_versions_are_swapped_and_unloaded(server: Server, root: Path) -> None:
    """A new version of a cold model is served as any other; a model that is unloaded is gone, and comes back."""
    fakes.write_version(root, build(5, version=2))
    wait_until(lambda: server.get("/v1/models/model-5").json()["versions"] == [1, 2])
    ask(server, 5, version=2)
    assert server.post("/v1/models/model-5/versions/1:predict", {"instances": [[1]]}).json()["version"] == 1
    assert server.post("/v2/repository/models/model-6/unload").status_code == 200
    assert server.predict("model-6", [[1]]).status_code == 503
    assert server.post("/v2/repository/models/model-6/load").status_code == 200
    ask(server, 6)


def test_cold_version_whose_file_was_damaged_is_refused_when_it_is_opened(root: Path) -> None:
    """A byte has changed since the check, and nothing tells: 503 with the reason, and so says readiness."""
    with Server(root, "--workers", "1", "--memory-budget", BUDGET, "--reload-interval", "0") as server:
        file, status = root / "model-7/1/model.onnx", (root / "model-7/1/model.onnx").stat()
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        for number in (0, 1, 2, 3):  # so that it is cold
            ask(server, number)
        response = server.predict("model-7", [[1]])
        assert (response.status_code, "has sha256" in response.json()["error"]) == (503, True)
        ready = server.get("/health/ready")
        assert (ready.status_code, "model-7: the model is not ready: model.onnx has" in ready.json()["error"]) == (
            503,
            True,
        )
        assert "model-7 version 1 cannot be opened: model.onnx has sha256" in server.log()
        ask(server, 0)
        file.write_bytes(content)
        wait_until(lambda: server.predict("model-7", [[1]]).status_code == 200)
        ask(server, 7)
        assert server.get("/health/ready").status_code == 200


@pytest.fixture
def engine(root: Path) -> Iterator[Server]:
    """A server whose engine has all models, and room for three."""
    flags = ("--placement", "engine", "--workers", "2", "--reload-interval", "0.5")
    with Server(root, "--memory-budget", BUDGET, *flags) as found:
        yield found


def test_engine_keeps_its_share_of_the_budget(engine: Server) -> None:
    """Heavy models are opened and closed in the engine, for all workers; which, every worker knows."""
    assert sum(list_cold(engine)) >= COUNT - 3
    for number in [*range(COUNT), *range(COUNT)]:
        ask(engine, number)
    wait_until(lambda: not engine.get(f"/v1/models/model-{COUNT - 1}").json()["cold"])
    assert COUNT - 3 <= sum(list_cold(engine)) < COUNT
    assert engine.get("/health/ready").json()["cold"] >= COUNT - 3


def test_damaged_version_is_refused_by_the_engine(engine: Server, root: Path) -> None:
    """A file that was damaged after the check is refused when it is opened, in the engine as in a worker."""
    file, status = root / "model-9/1/model.onnx", (root / "model-9/1/model.onnx").stat()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    response = engine.predict("model-9", [[1]])
    assert (response.status_code, "has sha256" in response.json()["error"]) == (503, True)
    wait_until(lambda: "model-9: the model is not ready" in engine.get("/health/ready").text)
    ask(engine, 0)
    file.write_bytes(content)
    wait_until(lambda: engine.predict("model-9", [[1]]).status_code == 200)
    wait_until(lambda: engine.get("/health/ready").status_code == 200)


def test_engine_that_dies_opens_again_what_is_asked_for(engine: Server) -> None:
    """The next engine has every model, cold."""
    dead = engine.engine()
    assert dead is not None
    dead.kill()
    wait_until(lambda: engine.predict("model-3", [[1]]).status_code == 200)
    wait_until(lambda: engine.get("/health/ready").status_code == 200)
    for number in range(COUNT):
        ask(engine, number)
