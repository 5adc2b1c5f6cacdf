"""Engines, over real HTTP: heavy models run in a process of their own, and what happens there hurts nobody else."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import fakes
from tests.hostile import divide, write_divider
from tests.servers import Server
from tests.wire import Wire, build_predict, exchange, napper, rounds_for, wait_until

RIGHT = [{"prediction": 4.0}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a heavy model and a light one."""
    folder = tmp_path_factory.mktemp("engines") / "models"
    fakes.write_version(folder, fakes.heavy())
    fakes.write_version(folder, fakes.doubler())
    return folder


@pytest.fixture(scope="module")
def mixed(root: Path) -> Iterator[Server]:
    """A server of two workers, whose engine has the heavy model."""
    with Server(root, "--workers", "2", "--request-timeout", "5") as server:
        yield server


@pytest.fixture(scope="module")
def engines(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose engine has every model."""
    with Server(models_dir, "--workers", "1", "--placement", "engine") as server:
        yield server


def place(server: Server, model: str) -> object:
    """Return where a model runs, as /v1 says."""
    return server.get(f"/v1/models/{model}").json()["placement"]


def test_heavy_weights_are_in_memory_once(mixed: Server) -> None:
    """A model with large weights is in the engine, and a small one in every worker; both answer right."""
    assert (place(mixed, "heavy"), place(mixed, "doubler")) == ("engine", "inline")
    for model in ("heavy", "doubler"):
        assert mixed.predict(model, [[2.0]]).json()["predictions"] == RIGHT
    engine = mixed.engine()
    assert engine is not None
    assert engine.memory_info().rss > fakes.HEAVY_BYTES
    assert Path(f"/proc/{engine.pid}/oom_score_adj").read_text() == "500\n"


@pytest.mark.parametrize("build", fakes.GOOD)
def test_answers_are_those_of_a_worker(build: object, engines: Server, server: Server) -> None:
    """Whatever the task, by /v1 and by /v2, an engine's answers are byte for byte a worker's."""
    assert callable(build)
    fake = build()
    shape = fake.manifest().input.shape
    rows = np.random.default_rng(0).random((3, int(np.prod(shape))), dtype=np.float32)
    tensor = {"name": fake.manifest().input.tensor or "inputs", "datatype": "FP32", "shape": [3, *shape]}
    bodies = {
        f"/v1/models/{fake.name}/versions/1:predict": {"instances": rows.tolist()},
        f"/v2/models/{fake.name}/versions/1/infer": {"inputs": [tensor | {"data": rows.reshape(-1).tolist()}]},
    }
    for path, body in bodies.items():
        theirs, ours = server.post(path, body), engines.post(path, body)
        assert (ours.status_code, ours.content) == (200, theirs.content)
        assert place(engines, fake.name) == "engine"


def test_bad_input_is_refused_as_ever(engines: Server) -> None:
    """What a worker refuses never reaches the engine; a graph without a finite answer is a 400 from there, too."""
    assert engines.predict("doubler", [["2"]]).status_code == 400
    answer = engines.predict("doubler", [[3e38]])
    assert (answer.status_code, "no finite answer" in answer.json()["error"]) == (400, True)


def test_engine_that_is_killed_ends_alone(mixed: Server) -> None:
    """Its requests are answered 503 at once, connections stay open, inline models go on, and another engine starts."""
    engine = mixed.engine()
    assert engine is not None
    with Wire(mixed.url) as wire:
        assert wire.send(build_predict("heavy", [2.0])).read().status == 200
        engine.send_signal(signal.SIGSTOP)  # so that the next request is in its hands
        wire.send(build_predict("heavy", [2.0]))
        time.sleep(0.2)
        assert mixed.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
        killed_at = time.monotonic()
        engine.kill()
        reply = wire.read()
        assert (reply.status, time.monotonic() - killed_at < 1.0) == (503, True)
        assert reply.headers is not None
        assert reply.headers["retry-after"] == "1"
        assert wire.send(build_predict("doubler", [2.0])).read().status == 200
        assert "engine" in mixed.get("/health/ready").json().get("error", "engine")
        wait_until(lambda: wire.send(build_predict("heavy", [2.0])).read().status == 200, 15)
    assert mixed.engine() != engine
    wait_until(lambda: mixed.get("/health/ready").status_code == 200, 5)


def test_engine_that_stands_still_is_answered_504(mixed: Server) -> None:
    """A request whose engine does nothing is answered by its deadline, by the worker."""
    engine = mixed.engine()
    assert engine is not None
    engine.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        reply = exchange(mixed.url, build_predict("heavy", [2.0], fields=("X-Request-Timeout: 0.5",)))
        assert (reply.status, time.monotonic() - began < 2) == (504, True)
    finally:
        engine.send_signal(signal.SIGCONT)
    wait_until(lambda: exchange(mixed.url, build_predict("heavy", [2.0])).status == 200, 5)


def test_call_that_outlives_a_short_timeout_does_not_end_its_engine(tmp_path: Path) -> None:
    """Only a call that takes seconds counts as one that never ends, however short `--request-timeout` is."""
    fakes.write_version(tmp_path, napper(least=rounds_for(0.02)))
    with Server(tmp_path, "--workers", "1", "--placement", "engine", "--request-timeout", "0.2") as server:
        engine = server.engine()
        assert exchange(server.url, build_predict("napper", [float(rounds_for(1.0))])).status == 504
        wait_until(lambda: exchange(server.url, build_predict("napper", [1.0])).status == 200, 10)
        assert server.engine() == engine
        assert "ended with code" not in server.log()


def test_worker_that_is_killed_takes_no_engine_along(mixed: Server) -> None:
    """The engine goes on for the other workers, and the new worker finds it."""
    engine = mixed.engine()
    worker = mixed.workers()[0]
    worker.kill()
    wait_until(lambda: len(mixed.workers()) == 2 and worker not in mixed.workers())
    for _ in range(20):
        wait_until(lambda: exchange(mixed.url, build_predict("heavy", [2.0])).status == 200, 5)
    assert mixed.engine() == engine


def test_memory_comes_back_when_the_last_version_is_unloaded(tmp_path: Path) -> None:
    """An engine without a version ends, and a load starts another."""
    models = tmp_path / "models"
    fakes.write_version(models, fakes.heavy())
    with Server(models, "--workers", "1") as server:
        assert server.engine() is not None
        assert server.post("/v2/repository/models/heavy/unload").status_code == 200
        wait_until(lambda: server.engine() is None, 20)
        assert server.post("/v2/repository/models/heavy/load").status_code == 200
        wait_until(lambda: server.predict("heavy", [[2.0]]).status_code == 200, 5)
        assert "ended with code" not in server.log()


def test_version_loaded_again_outlives_its_last_use(tmp_path: Path) -> None:
    """A model that is unloaded and loaded again while a request of its first life runs goes on answering after that."""
    models = tmp_path / "models"
    fakes.write_version(models, napper())
    with Server(models, "--workers", "1", "--placement", "engine") as server, Wire(server.url) as wire:
        wire.send(build_predict("napper", [float(rounds_for(1.5))]))
        time.sleep(0.2)
        for action in ("unload", "load"):
            assert server.post(f"/v2/repository/models/napper/{action}").status_code == 200
        assert wire.read().status == 200
        time.sleep(0.3)  # by now the first life is over
        for _ in range(3):
            assert server.predict("napper", [[1.0]]).status_code == 200


def test_request_in_an_engine_is_finished_on_sigterm(tmp_path: Path) -> None:
    """What is in flight in an engine when SIGTERM arrives is answered before anything ends."""
    models = tmp_path / "models"
    fakes.write_version(models, replace(napper(), name="napper"))
    with Server(models, "--workers", "1", "--placement", "engine") as server:
        with Wire(server.url) as wire:
            wire.send(build_predict("napper", [float(rounds_for(0.5))]))
            time.sleep(0.1)
            os.kill(server.process.pid, signal.SIGTERM)
            reply = wire.read()
        assert reply.status == 200
        assert json.loads(reply.body)["model"] == "napper"
        assert server.process.wait(10) == 0
        server.kill()  # closes its log


def test_request_that_crashes_an_engine_twice_is_refused(tmp_path: Path) -> None:
    """A model without a task runs in the engine. Numbers that crash it are answered 503 twice, then 400."""
    write_divider(tmp_path)
    fakes.write_version(tmp_path, fakes.doubler())
    with Server(tmp_path, "--workers", "1", "--request-timeout", "10") as server:
        assert place(server, "divider") == "engine"
        worker = server.workers()
        for _ in range(2):
            assert divide(server, 6, 3).json()["outputs"][0]["data"] == [2]
            assert divide(server, -(2**31), -1).status_code == 503
            assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
            wait_until(lambda: divide(server, 6, 3).status_code == 200)
        refused = divide(server, -(2**31), -1)
        assert (refused.status_code, "crashed twice" in refused.json()["error"]) == (400, True)
        assert divide(server, -(2**31), 1).json()["outputs"][0]["data"] == [-(2**31)]
        assert server.log().count("engine-cpu ended with code -8") == 2
        assert server.workers() == worker


def test_socket_may_be_in_a_folder_with_a_long_name(tmp_path: Path) -> None:
    """A socket's path has at most 108 bytes; the folder that it is in may have a longer one."""
    fakes.write_version(tmp_path / "models", fakes.doubler())
    long = tmp_path / ("a" * 60) / ("b" * 60)
    long.mkdir(parents=True)
    places = {"XDG_RUNTIME_DIR": str(long), "TMPDIR": str(long)}
    with Server(tmp_path / "models", "--workers", "1", "--placement", "engine", environment=places) as server:
        assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
        assert list(long.glob("*/engine-cpu.sock"))
