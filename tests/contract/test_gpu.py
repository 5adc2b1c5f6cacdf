"""Engines on GPUs, over real HTTP, with GPUs that are made up (see `tests.fake_gpu`)."""

from pathlib import Path
from typing import Any

import pytest

from tests import fakes
from tests.fake_gpu import POISON
from tests.servers import Server
from tests.wire import wait_until

SLOW_CPU = {"FAKE_CPU_MS": "6"}  # no model is inline then, and every GPU is faster
RIGHT = [{"prediction": 4.0}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one model, y = 2·x."""
    fakes.write_version(tmp_path, fakes.doubler())
    return tmp_path


class GpuServer(Server):
    """A server on two made-up GPUs."""

    module = "tests.fake_gpu"


def serve(root: Path, *flags: str, **environment: str) -> Server:
    """Return one with two workers."""
    return GpuServer(root, "--workers", "2", *flags, environment=environment)


def shown(server: Server, model: str) -> tuple[Any, ...]:
    """Return where a model runs, as the service tells."""
    answer = server.get(f"/v1/models/{model}").json()
    return answer["device"], answer["provider"], answer["placement"]


def test_model_runs_where_a_row_costs_less(root: Path) -> None:
    """With `auto`: on a GPU if that is faster, on the CPU if not, and in the workers if it is quick there."""
    for environment, device, placement in (
        (SLOW_CPU, "cuda", "engine"),
        ({"FAKE_CPU_MS": "6", "FAKE_GPU_MS": "60"}, "cpu", "engine"),
        ({}, "cpu", "inline"),
    ):
        with serve(root, **environment) as server:
            where, _, place = shown(server, "doubler")
            assert (where.partition(":")[0], place) == (device, placement)
            assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
            assert len(server.workers()) == 2
            assert "cannot run" not in server.log()


def test_gpu_asked_for_runs_everything_in_an_engine_per_gpu(root: Path) -> None:
    """With `cuda` even small models are on GPUs; each worker uses its own, and says so truthfully."""
    fakes.write_version(root, fakes.compass())
    with serve(root, "--device", "cuda") as server:
        for model in ("doubler", "compass"):
            device, provider, placement = shown(server, model)
            assert device in ("cuda:0", "cuda:1")
            assert (provider, placement) == ("CUDAExecutionProvider", "engine")
        assert server.engine("cuda:0") is not None
        assert server.engine("cuda:1") is not None
        assert server.engine("cpu") is None
        assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
    with serve(root, "--device", "cuda:1") as server:
        assert shown(server, "doubler")[0] == "cuda:1"
        assert server.engine("cuda:0") is None


def test_version_that_fails_on_the_gpu_runs_on_the_cpu(root: Path) -> None:
    """It is told once for each GPU; without a way back, the version is refused."""
    with serve(root, FAKE_WRONG="cuda", **SLOW_CPU) as server:
        assert shown(server, "doubler") == ("cpu", "CPUExecutionProvider", "engine")
        assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
        for gpu in ("cuda:0", "cuda:1"):
            assert (
                server.log().count(f"model doubler version 1 cannot run on {gpu}: its onnx graph on {gpu} misses") == 1
            )
    with serve(root, "--device", "cuda", FAKE_WRONG="cuda") as server:
        assert "misses a golden output" in server.get("/health/ready").json()["error"]


def test_version_that_crashes_on_the_gpu_runs_on_the_cpu(root: Path) -> None:
    """After two crashes of its engine it is not tried there again."""
    with serve(root, FAKE_CRASH="cuda", **SLOW_CPU) as server:
        assert shown(server, "doubler") == ("cpu", "CPUExecutionProvider", "engine")
        for gpu in ("cuda:0", "cuda:1"):
            assert server.log().count(f"engine-{gpu} ended with code -11") == 2
            assert (
                server.log().count(f"model doubler version 1 cannot run on {gpu}: killed by SIGSEGV while opening") == 1
            )


def test_version_is_refused_only_if_it_fails_on_both(root: Path) -> None:
    """One that only a GPU runs right is served there; one that neither does is refused with the CPU's reason."""
    with serve(root, FAKE_WRONG="cpu") as server:
        assert shown(server, "doubler")[0].startswith("cuda:")
        assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
    with serve(root, FAKE_WRONG="cpu cuda") as server:
        assert "its onnx graph on cpu misses a golden output" in server.get("/health/ready").json()["error"]


def test_lost_gpu_ends_its_engine_alone(root: Path) -> None:
    """Another engine takes over, workers and connections go on, and what broke the GPU twice is refused."""
    with serve(root, "--device", "cuda:0", "--workers", "1") as server:
        engines, workers = {server.engine("cuda:0")}, {worker.pid for worker in server.workers()}
        for crashes in (1, 2):
            assert server.predict("doubler", [[POISON]]).status_code == 503
            wait_until(lambda: server.predict("doubler", [[2.0]]).status_code == 200)
            assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
            engines.add(server.engine("cuda:0"))
            assert len(engines) == crashes + 1
        answer = server.predict("doubler", [[POISON]])
        assert (answer.status_code, "crashed twice" in answer.json()["error"]) == (400, True)
        assert {worker.pid for worker in server.workers()} == workers
        assert server.log().count("cuda:0 works no more (onnxruntime: CUDA failure 700: an illegal memory access)") == 2
        assert server.log().count("engine-cuda:0 ended with code -6; starting another") == 2
