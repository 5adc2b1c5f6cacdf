"""Versions and hot reload over real HTTP with two workers: what is served changes, and no request notices."""

import io
import itertools
import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import tritonclient.http as triton
from onnx import helper
from PIL import Image

from service.__main__ import main
from tests import fakes
from tests.fakes import FakeModel
from tests.servers import Server, run_service

INTERVAL = 0.2
WORKERS = 2
SECONDS = 15  # until what should happen has failed to
FLAGS = ("--workers", str(WORKERS), "--device", "cpu", "--backend", "onnx")
_numbers = itertools.count()


@dataclass(frozen=True)
class Live:
    """A running server that looks at its folder all the time."""

    root: Path
    server: Server


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that looks at its folder every fifth of a second, for tests that bring models of their own."""
    root = tmp_path_factory.mktemp("live") / "models"
    publish(root, build("resident"))
    with Server(root, *FLAGS, "--reload-interval", str(INTERVAL)) as server:
        yield Live(root, server)


@pytest.fixture
def name(live: Live) -> Iterator[str]:
    """A model name of the test's own; its folder is gone afterwards."""
    own = f"model-{next(_numbers)}"
    yield own
    shutil.rmtree(live.root / own, ignore_errors=True)
    wait_for(lambda: live.server.get(f"/v1/models/{own}").status_code == 404)


def build(name: str, version: int = 1) -> FakeModel:
    """Return a model that gives version times its input, exactly."""
    return replace(fakes.doubler(version, float(version)).only("onnx"), name=name)


def publish(root: Path, fake: FakeModel) -> None:
    """Put a version into the folder in one step, as the publisher does."""
    staging = root.parent / f".staging-{next(_numbers)}"
    folder = fakes.write_version(staging, fake)
    (root / fake.name).mkdir(parents=True, exist_ok=True)
    folder.rename(root / fake.name / str(fake.version))
    shutil.rmtree(staging)


def wait_for(holds: Callable[[], bool]) -> float:
    """Wait until something holds and return how long it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < SECONDS, "it does not come true"
        time.sleep(0.01)
    return time.monotonic() - began


def ask_all(server: Server, path: str, times: int = 3, json: object = None) -> list[requests.Response]:
    """Ask on fresh connections until every worker has answered several times; their ids start with their own prefix."""
    answers: dict[str, list[requests.Response]] = {}
    until = time.monotonic() + SECONDS
    while len(answers) < WORKERS or min(map(len, answers.values())) < times:
        assert time.monotonic() < until, "a worker gets no connection"
        answer = server.get(path) if json is None else server.post(path, json=json)
        answers.setdefault(answer.headers["X-Request-ID"].split("-")[0], []).append(answer)
    return list(itertools.chain(*answers.values()))


def serves(server: Server, name: str, version: int | str | None = None) -> set[int | None]:
    """Return which versions the workers answer with, None for not at all; check that each is what it says."""
    path = f"/v1/models/{name}:predict" if version is None else f"/v1/models/{name}/versions/{version}:predict"
    found: set[int | None] = set()
    for answer in ask_all(server, path, json={"instances": [[3]]}):
        assert answer.status_code in (200, 404, 503), answer.text
        body = answer.json()
        if answer.status_code == 200:
            assert body["predictions"] == [{"prediction": 3.0 * body["version"]}]
        found.add(body.get("version"))
    return found


def index(server: Server, name: str) -> dict[str, tuple[str, str]]:
    """Return state and reason of each version of a model."""
    rows = server.post("/v2/repository/index").json()
    return {row["version"]: (row["state"], row["reason"]) for row in rows if row["name"] == name}


def change(server: Server, name: str, action: str, **parameters: object) -> requests.Response:
    """Load, unload or roll back."""
    return server.post(f"/v2/repository/models/{name}/{action}", json={"parameters": parameters})


@dataclass
class Load:
    """Clients that ask one model all the time, each on a connection it keeps; a context manager."""

    server: Server
    name: str
    clients: int = 4
    failures: list[str] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    answered: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        """Begin."""
        for number in range(self.clients):
            ask = self._ask_typed if number % 2 else self._ask_binary
            self._threads.append(threading.Thread(target=self._run, args=(ask,)))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, ask: Callable[[HTTPConnection, float], tuple[int, float]]) -> None:
        address = self.server.url.removeprefix("http://")
        connection = HTTPConnection(address, timeout=20)
        try:
            while not self._ended.is_set():
                number = float(random.randrange(1, 1000))
                version, result = ask(connection, number)
                if result != number * version:
                    self.failures.append(f"version {version} gave {result} for {number}")
                self.versions.add(version)
                self.answered += 1
                time.sleep(0.001)
        except Exception as error:
            self.failures.append(repr(error))
        finally:
            connection.close()

    def _ask_typed(self, connection: HTTPConnection, number: float) -> tuple[int, float]:
        body = json.dumps({"instances": [[number]]})
        connection.request("POST", f"/v1/models/{self.name}:predict", body, {"Content-Type": "application/json"})
        answer = json.loads(self._read(connection))
        return answer["version"], answer["predictions"][0]["prediction"]

    def _ask_binary(self, connection: HTTPConnection, number: float) -> tuple[int, float]:
        about = {"name": "inputs", "shape": [1, 1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}
        header = json.dumps({"inputs": [about], "outputs": [{"name": "outputs"}]}).encode()
        body = header + np.array([number], "<f4").tobytes()
        fields = {"Inference-Header-Content-Length": str(len(header))}
        connection.request("POST", f"/v2/models/{self.name}/infer", body, fields)
        answer = json.loads(self._read(connection))
        return int(answer["model_version"]), answer["outputs"][0]["data"][0]

    def _read(self, connection: HTTPConnection) -> bytes:
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, (answer.status, body)
        return body


def test_twenty_versions_under_load(live: Live, name: str) -> None:
    """Twenty versions published and the old ones removed under load: no request fails, each answer is one version's."""
    publish(live.root, build(name))
    wait_for(lambda: serves(live.server, name) == {1})
    slowest = 0.0
    with Load(live.server, name) as load:
        for version in range(2, 22):
            publish(live.root, build(name, version))
            slowest = max(slowest, wait_for(lambda version=version: serves(live.server, name) == {version}))  # type: ignore[misc]
            shutil.rmtree(live.root / name / str(version - 1))
        wait_for(lambda: list(index(live.server, name)) == ["21"])
    assert load.failures == []
    assert load.versions == set(range(1, 22))
    assert load.answered > 1000
    print(f"{load.answered} answers; the slowest of 20 versions was everywhere after {slowest:.2f} s")
    assert slowest < INTERVAL + 3  # generous: two cores run all of this


def test_memory_comes_back(tmp_path: Path) -> None:
    """After twenty versions of 4 MB each under load, and their removal, the workers are as large as before.

    Each version has also answered a connection that then stays open and idle.
    """

    def build_wide(version: int) -> FakeModel:
        first, last = np.zeros((1, 1000), np.float32), np.zeros((1000, 1), np.float32)
        first[0, 0], last[0, 0] = 1, version
        nodes = [helper.make_node("MatMul", pair, [out]) for *pair, out in (("inputs", "a", "x"), ("x", "b", "y"))]
        nodes.append(helper.make_node("MatMul", ["y", "c"], ["outputs"]))
        weights = {"a": first, "b": np.eye(1000, dtype=np.float32), "c": last}
        return replace(
            build("wide", version), contents={"onnx": fakes.build_onnx(*nodes, weights=weights, wide=1, out=1)}
        )

    def measure() -> int:
        return sum(worker.memory_info().rss for worker in server.workers())

    root = tmp_path / "models"
    publish(root, build_wide(1))
    idle: list[HTTPConnection] = []
    with Server(root, *FLAGS, "--reload-interval", str(INTERVAL)) as server, Load(server, "wide", 2) as load:
        time.sleep(1.5)
        before = measure()
        for version in range(2, 22):
            publish(root, build_wide(version))
            wait_for(lambda version=version: version in load.versions)  # type: ignore[misc]
            idle.append(HTTPConnection(server.url.removeprefix("http://")))
            idle[-1].request("POST", "/v1/models/wide:predict", '{"instances": [[1]]}')
            idle[-1].getresponse().read()
        wait_for(lambda: serves(server, "wide") == {21})
        at_most = measure()
        for version in range(1, 21):
            shutil.rmtree(root / "wide" / str(version))
        wait_for(lambda: list(index(server, "wide")) == ["21"] and serves(server, "wide", 20) == {None})
        time.sleep(1)
        after = measure()
        for connection in idle:
            connection.close()
        print(f"RSS of {WORKERS} workers: {before >> 20} MB, {at_most >> 20} with 21 versions, {after >> 20} after")
    assert load.failures == []
    assert at_most > before + 20 * 4 * 2**20 * WORKERS * 0.8
    assert after < 1.1 * before


def test_bad_version_never_serves(live: Live, name: str) -> None:
    """A version that fails its golden samples is not served; the old one goes on, and the reason is told everywhere."""
    publish(live.root, build(name))
    wait_for(lambda: serves(live.server, name) == {1})
    with Load(live.server, name, 2) as load:
        publish(live.root, replace(build(name, 2), contents=build(name, 3).contents))
        wait_for(lambda: all("2" in answer.json()["refused"] for answer in ask_all(live.server, f"/v1/models/{name}")))
        wait_for(
            lambda: f'service_model_refused{{model="{name}",version="2"}} {WORKERS}' in live.server.get("/metrics").text
        )
        assert serves(live.server, name) == {1}
        assert serves(live.server, name, 2) == {None}
    assert (load.failures, load.versions) == ([], {1})
    state, reason = index(live.server, name)["2"]
    assert (state, index(live.server, name)["1"]) == ("UNAVAILABLE", ("READY", ""))
    assert "misses a golden output" in reason
    assert live.server.get(f"/v2/models/{name}").json()["properties"]["refused_2"] == reason
    assert f"model {name} version 2 is not served: {reason}; keeping the loaded versions" in live.server.log()
    answer = live.server.get(f"/v2/models/{name}/versions/2/ready")
    assert (answer.status_code, reason in answer.json()["error"]) == (503, True)
    assert {answer.status_code for answer in ask_all(live.server, "/v2/health/ready")} == {200}
    shutil.rmtree(live.root / name / "2")
    publish(live.root, build(name, 2))
    wait_for(lambda: serves(live.server, name) == {2})
    wait_for(lambda: f'service_model_refused{{model="{name}",version="2"}} 0' in live.server.get("/metrics").text)


def test_version_replaced_in_place(live: Live, name: str) -> None:
    """Files that change under a served version are taken as a whole or not at all."""
    publish(live.root, build(name))
    wait_for(lambda: serves(live.server, name) == {1})
    folder = live.root / name / "1"
    good = (folder / "model.onnx").read_bytes()
    with Load(live.server, name, 2) as load:
        (folder / "model.onnx").write_bytes(good[:-1])
        wait_for(lambda: index(live.server, name)["1"][1].startswith("model.onnx has "))
        assert serves(live.server, name) == {1}
        (folder / "model.onnx").write_bytes(good)
        wait_for(lambda: index(live.server, name) == {"1": ("READY", "")})
    assert load.failures == []


def test_half_copied_folder_is_ignored(tmp_path: Path) -> None:
    """While a folder is being copied, manifest first, it is not there; when it is whole, it is served everywhere."""
    root = tmp_path / "models"
    publish(root, build("resident"))
    whole = fakes.write_version(tmp_path / "copy", build("copied"))
    content = (whole / "model.onnx").read_bytes()
    pieces = [content[start : start + 8] for start in range(0, len(content), 8)]

    def copy(folder: Path) -> None:
        shutil.copy(whole / "manifest.json", folder)
        with (folder / "model.onnx").open("wb", buffering=0) as file:
            for piece in pieces:
                time.sleep(3 / len(pieces))
                file.write(piece)

    # A second between looks, and a thread that only copies: a pause as long as that would make the half look whole.
    with Server(root, *FLAGS, "--reload-interval", "2") as server, ThreadPoolExecutor(1) as pool:
        folder = root / "copied" / "1"
        folder.mkdir(parents=True)
        copying = pool.submit(copy, folder)
        while not copying.done():
            status = server.get("/v2/models/copied").status_code
            assert status == 404 or copying.done()
            assert server.get("/v2/health/ready").status_code == 200
        copying.result()
        wait_for(lambda: serves(server, "copied") == {1})
        assert "model copied version 1 is not served" not in server.log()


def test_removal_unloads(live: Live, name: str) -> None:
    """A version whose folder is removed is not served any more, a model without versions is not known any more."""
    for version in (1, 2):
        publish(live.root, build(name, version))
    wait_for(lambda: serves(live.server, name) == {2})
    shutil.rmtree(live.root / name / "2")
    wait_for(lambda: serves(live.server, name) == {1})
    assert live.server.get(f"/v1/models/{name}/versions/2").status_code == 404
    shutil.rmtree(live.root / name)
    wait_for(lambda: serves(live.server, name) == {None})
    assert name not in live.server.get("/v2/models").json()["models"]


def test_settings_choose_versions_and_labels(live: Live, name: str) -> None:
    """settings.json chooses the versions, pins the latest and names some; a change needs no restart."""
    for version in (1, 2, 3, 4):
        publish(live.root, build(name, version))
    wait_for(lambda: serves(live.server, name) == {4})
    settings = live.root / name / "settings.json"
    settings.write_text('{"versions": [1, 2, 3], "latest": 2, "labels": {"stable": 2, "canary": 3}}')
    wait_for(lambda: serves(live.server, name) == {2})
    wait_for(lambda: serves(live.server, name, 4) == {None})
    for path, expected in (("1", 1), ("3", 3), ("stable", 2), ("canary", 3)):
        assert serves(live.server, name, path) == {expected}
    body = {"inputs": [{"name": "inputs", "shape": [1, 1], "datatype": "FP32", "data": [3]}]}
    for path, expected in (("labels/canary", 3), ("versions/canary", 3), ("versions/1", 1)):
        answer = live.server.post(f"/v2/models/{name}/{path}/infer", json=body).json()
        assert (answer["model_version"], answer["outputs"][0]["data"]) == (str(expected), [3.0 * expected])
    assert live.server.get(f"/v2/models/{name}").json()["versions"] == ["1", "2", "3"]
    settings.write_text('{"latest": "newest"}')
    wait_for(lambda: "keeping the previous settings" in live.server.log())
    assert serves(live.server, name) == {2}
    settings.unlink()
    wait_for(lambda: serves(live.server, name) == {4})


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that looks at its folder only when it is told to."""
    root = tmp_path_factory.mktemp("told") / "models"
    publish(root, build("resident"))
    with Server(root, *FLAGS, "--reload-interval", "0") as server:
        yield Live(root, server)


def test_load_and_unload_return_when_all_have_followed(told: Live) -> None:
    """As soon as a load or unload is answered, every worker does as it says; Triton's client has the same calls."""
    model = f"model-{next(_numbers)}"
    publish(told.root, build(model))
    with triton.InferenceServerClient(told.server.url.removeprefix("http://")) as client:
        for version in range(1, 6):
            client.load_model(model, headers=told.server.token_headers())
            assert serves(told.server, model) == {version}
            client.unload_model(model, headers=told.server.token_headers())
            assert serves(told.server, model) == {None}
            assert {row["state"] for row in client.get_model_repository_index() if row["name"] == model} == {
                "UNAVAILABLE"
            }
            publish(told.root, build(model, version + 1))
        with pytest.raises(triton.InferenceServerException, match="not taken over the network"):
            client.load_model(model, told.server.token_headers(), config="{}", files={"file:1/model.onnx": b"x"})
    shutil.rmtree(told.root / model)


def test_new_worker_keeps_to_what_was_agreed(told: Live) -> None:
    """A worker that takes another's place does not serve what has been unloaded."""
    model = f"model-{next(_numbers)}"
    publish(told.root, build(model))
    assert change(told.server, model, "load").json()["latest"] == "1"
    assert change(told.server, model, "unload").json()["versions"] == []
    victim = told.server.workers()[0]
    victim.kill()
    wait_for(lambda: len(told.server.workers()) == WORKERS and victim.pid not in map(_pid, told.server.workers()))
    assert serves(told.server, model) == {None}
    assert change(told.server, model, "load").status_code == 200
    assert serves(told.server, model) == {1}
    shutil.rmtree(told.root / model)


def _pid(process: psutil.Process) -> int:
    return process.pid


def test_rollback_by_call_and_by_command(told: Live, capsys: pytest.CaptureFixture[str]) -> None:
    """One call or one command makes an earlier version the latest, everywhere at once; the newer ones stay."""
    model = f"model-{next(_numbers)}"
    for version in (1, 2, 3):
        publish(told.root, build(model, version))

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["models", *arguments, "--url", told.server.url])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    assert run("load", model) == (0, f"{model}: serving 1, 2, 3; latest 3\n")
    assert change(told.server, model, "rollback").json()["latest"] == "2"
    assert serves(told.server, model) == {2}
    done = run_service("models", "rollback", model, "--url", told.server.url)
    assert (done.returncode, done.stdout) == (0, f"{model}: serving 1, 2, 3; latest 1\n")
    assert serves(told.server, model) == {1}
    assert serves(told.server, model, 3) == {3}
    assert run("rollback", model) == (1, f"error: '{model}' has no served version before 1\n")
    assert run("rollback", model, "--to", "3") == (0, f"{model}: serving 1, 2, 3; latest 3\n")
    assert serves(told.server, model) == {3}
    code, listed = run("list")
    assert code == 0
    rows = [line.split() for line in listed.splitlines() if line.startswith(model)]
    assert rows == [[model, "1", "READY"], [model, "2", "READY"], [model, "3", "READY", "latest"]]
    (told.root / model / "settings.json").write_text('{"latest": 9, "labels": {"stable": 1, "canary": 3}}')
    assert run("load", model) == (0, f"{model}: serving 1, 2, 3; latest 3\n")
    assert [line for line in run("list")[1].splitlines() if line.startswith(model)] == [
        f"{model}  1  READY  stable",
        f"{model}  2  READY",
        f"{model}  3  READY  latest, canary",
        f"{model}  settings  UNAVAILABLE  latest is 9, which is not served; using the newest, 3",
    ]
    assert f"WARNING service: settings of model {model}: latest is 9, which is not served" in told.server.log()
    assert run("unload", model) == (0, f"{model}: serving nothing; latest none\n")
    for answer in (told.server.predict(model, [[3]]), told.server.get(f"/v2/models/{model}/ready")):
        assert answer.status_code == 503
        sentence = f"model '{model}' has been unloaded; `python -m service models load {model}` loads it"
        assert answer.json() == {"error": sentence}
    assert f"{model}  1  UNAVAILABLE  unloaded" in run("list")[1]
    code, text = run("load", "nosuch")
    assert (code, text.startswith("error: Request for unknown model: 'nosuch'")) == (1, True)
    assert run("load")[0] == 1
    assert main(["models", "list", "--port", "1"]) == 1
    shutil.rmtree(told.root / model)


def test_this_machine_may_change_what_listens_on_both_families(empty_dir: Path) -> None:
    """With `--host ::`, the command on the same machine, which comes by IPv4, is this machine's own."""
    try:
        socket.create_server(("::", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("there is no IPv6 here")
    publish(empty_dir, build("resident"))
    with Server(empty_dir, *FLAGS, "--host", "::") as server:
        done = run_service("models", "unload", "resident", "--port", server.url.rpartition(":")[2])
        assert (done.returncode, done.stdout) == (0, "resident: serving nothing; latest none\n"), done.stderr


def test_admin_key_guards_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With keys set, only the admin key loads and unloads; the command sends it."""
    root = tmp_path / "models"
    publish(root, build("resident"))
    keys = {"SERVICE_API_KEY": "caller", "SERVICE_ADMIN_KEY": "admin"}
    with Server(root, "--workers", "1", "--reload-interval", "0", environment=keys) as server:
        path = "/v2/repository/models/resident/unload"
        for key, status in (("caller", 401), ("wrong", 401), ("", 401)):
            assert server.post(path, headers={"X-API-Key": key}).status_code == status
        assert server.get("/v2/models/resident/ready").status_code == 200
        assert server.get("/v2/models/resident").status_code == 401
        flags = ["--url", server.url, "--api-key", "caller"]
        assert main(["models", "load", "resident", *flags]) == 1
        assert "needs the admin key" in capsys.readouterr().err
        assert main(["models", "unload", "resident", *flags, "--admin-key", "admin"]) == 0
        assert capsys.readouterr().out == "resident: serving nothing; latest none\n"


def test_model_in_the_wrong_place_is_told_of_once(live: Live, name: str) -> None:
    """Files without a version folder are warned of once, by one worker; moved to where the line says, they serve."""
    staged = fakes.write_version(live.root.parent / "staged", build(name))
    flat = live.root / name
    staged.rename(flat)
    warning = f"WARNING service: {flat} holds a manifest but no version folder; move it to {flat}/1"
    wait_for(lambda: warning in live.server.log())
    publish(live.root, build(f"{name}-x"))  # whatever else changes says nothing new of it
    wait_for(lambda: serves(live.server, f"{name}-x") == {1})
    time.sleep(3 * INTERVAL)
    assert live.server.log().count(f"{flat} ") == 1
    flat.rename(live.root.parent / "moved")
    flat.mkdir()
    (live.root.parent / "moved").rename(flat / "1")
    wait_for(lambda: serves(live.server, name) == {1})
    shutil.rmtree(live.root / f"{name}-x")


@pytest.mark.parametrize("interval", ["0", "2"])
def test_model_in_the_wrong_place_is_told_of_at_the_start(interval: str, tmp_path: Path) -> None:
    """What stands wrong when the service starts is warned of once, also where nobody looks at the folder later."""
    root = tmp_path / "models"
    fakes.write_version(root, fakes.doubler()).rename(root / "doubler" / "v1")
    with Server(root, *FLAGS, "--reload-interval", interval) as server:
        wait_for(lambda: "doubler/v1 holds a manifest, but its name is no version" in server.log())
        assert server.get("/health/ready").status_code == 503
        time.sleep(1.5)
        assert server.log().count("doubler/v1 ") == 1


def test_folder_of_one_model_that_nobody_writes(tmp_path: Path) -> None:
    """KServe's layout, a version's files alone in a read-only folder, is served under the name given."""
    folder = fakes.write_version(tmp_path, replace(fakes.canvas().only("onnx"), version=3))
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    flags = ("--model-name", "digits", "--workers", "1", "--reload-interval", str(INTERVAL))
    with Server(folder, *flags) as server:
        assert server.get("/v2/models").json() == {"models": ["digits"]}
        metadata = server.get("/v2/models/digits").json()
        assert (metadata["name"], metadata["versions"]) == ("digits", ["3"])
        with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
            picture = Image.new("L", (56, 56), 255)
            picture.paste(0, (20, 8, 32, 48))
            file = io.BytesIO()
            picture.save(file, "PNG")
            tensor = triton.InferInput("inputs", [2], "BYTES")
            tensor.set_data_from_numpy(np.array([file.getvalue()] * 2, object))
            result = client.infer("digits", [tensor], model_version="3")
            answer = server.post(
                "/v1/models/digits:predict", data=file.getvalue(), headers={"Content-Type": "image/png"}
            )
            probabilities = answer.json()["predictions"][0]["probabilities"]
            np.testing.assert_allclose(result.as_numpy("probabilities"), [probabilities] * 2, rtol=1e-6)
            client.unload_model("digits", headers=server.token_headers())
            assert not client.is_model_ready("digits")
            client.load_model("digits", headers=server.token_headers())
            assert client.is_model_ready("digits")
        time.sleep(2 * INTERVAL)
    assert {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before
    os.chmod(folder, 0o755)
