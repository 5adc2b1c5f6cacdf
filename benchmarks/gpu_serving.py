"""The steps of `benchmarks.gpu` over HTTP: what `/v1/models` says, throughput, and what the service survives."""

import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.clients import OK, Pool, build_request, run_closed
from benchmarks.contenders import JSON, build_body, load_model, pack_tensor
from benchmarks.gpu_steps import FailedError, SkipError, Step, build_inputs
from benchmarks.load import Wrk
from benchmarks.processes import Started, start
from service.model.backends import list_accelerators
from service.settings import count_cores

WORKERS = (1, 2, 4, 8)
DIGIT_CLIENTS, MEDIUM_CLIENTS = 64, 32
PROCESSES = 4  # of clients: a large body costs a client as much as the service
START_SECONDS, RECOVERY_SECONDS = 120.0, 30.0
TOO_MUCH = 1e7  # MiB, that `hungry` is asked for
PUBLISHED = ("mnist", "mnist-cnn", "logistic-hours")


@contextmanager
def serve(step: Step, names: tuple[str, ...], *flags: str, device: str = "") -> Iterator[Started]:
    """Serve published or made models, and stop in the end.

    Raises:
        FailedError: The service did not start; the end of its log says why.
    """
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryFile() as log:
        for name in names:
            home = step.made if (step.made / name).exists() else step.models
            (Path(root) / name).symlink_to((home / name).absolute())
        command = [sys.executable, "-m", "service", "serve", "--port", "{port}", "--models-dir", root]
        command += ["--access-log", "no", "--device", device or step.device, *flags]
        try:
            server = start(command, {}, "/health/ready", within=START_SECONDS, log=log)
        except RuntimeError as error:
            log.seek(0)
            raise FailedError(f"{error}: {log.read().decode(errors='replace')[-800:]}") from error
        try:
            yield server
        finally:
            server.stop()


def show_devices(step: Step) -> None:
    """Serve every model and show where each says that it runs; with `auto`, too.

    Raises:
        FailedError: One runs elsewhere than was asked for.
    """
    published = [path.name for path in step.models.iterdir() if path.is_dir() and not path.name.startswith(".")]
    names = tuple(sorted(published[:2] if step.quick else [*published, *step.medium]))
    elsewhere = []
    for device in dict.fromkeys((step.device, "auto")):
        with serve(step, names, device=device) as server:
            for model in requests.get(_url(server, "/v1/models"), timeout=30).json()["models"]:
                shown = {key: model.get(key) for key in ("backend", "device", "provider", "placement")}
                step.add(asked=device, model=model["name"], **shown)
                is_right = device == "auto" or str(shown["device"]).startswith(device)
                elsewhere += [] if is_right else [f"{model['name']} on {shown['device']}"]
            step.add(asked=device, model="(ready after s)", device=server.cold_start)
    if elsewhere:
        raise FailedError(f"not on {step.device}: {', '.join(elsewhere)}")


def measure_digits(step: Step) -> None:
    """Measure single digits as JSON on the device and on the CPU, with one worker and more."""
    _, manifest = load_model(step.models, "mnist")
    request = build_request("/v1/models/mnist:predict", build_body(manifest, 1), JSON)
    seconds = 1.0 if step.quick else 3.0  # whole ones, for wrk
    for workers in WORKERS[: 1 if step.quick else None]:
        for device in dict.fromkeys((step.device, "cpu")):
            if workers <= count_cores():
                with serve(step, ("mnist",), "--workers", str(workers), device=device) as server:
                    url = _url(server, "/v1/models/mnist:predict")
                    load = _load if shutil.which("wrk") is None else partial(_load_by_wrk, url, build_body(manifest, 1))
                    rate = load(server.port, request, DIGIT_CLIENTS, seconds)
                    step.add(model="mnist", device=device, workers=workers, **rate)


def measure_medium(step: Step) -> None:
    """Measure the large models as binary tensors: on the device with one worker and more, and on the CPU.

    Raises:
        SkipError: They were not made.
    """
    if not step.medium:
        raise SkipError("there are no large models")
    most = min(WORKERS[-1], count_cores())
    for device, workers in dict.fromkeys([(step.device, most), ("cpu", most), (step.device, 1)]):
        for name in step.medium:
            body, headers = pack_tensor(build_inputs(name, 1), "FP32")
            request = build_request(f"/v2/models/{name}/infer", body, headers)
            with serve(step, (name,), "--workers", str(workers), device=device) as server:
                one = _load(server.port, request, 1, 1.0, processes=1)
                many = _load(server.port, request, MEDIUM_CLIENTS, 4.0)
                step.add(model=name, device=device, workers=workers, **many, **{"one client, p50 ms": one["p50 ms"]})


def _load(port: int, request: bytes, clients: int, seconds: float, processes: int = PROCESSES) -> dict[str, Any]:
    """Return what clients in a closed loop see, in several processes."""
    share = max(1, clients // processes)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as executor:
        jobs = [executor.submit(_load_alone, port, request, share, seconds) for _ in range(processes)]
        pools = [job.result() for job in jobs]
    every = Pool([each for pool in pools for each in pool.latencies])
    failed = sum(pool.failed for pool in pools)
    rate = sum(pool.rate for pool in pools if pool.completed)
    return {"requests/s": rate, "p50 ms": every.percentile(50), "p99 ms": every.percentile(99), "failed": failed}


def _load_alone(port: int, request: bytes, clients: int, seconds: float) -> Pool:
    pool = Pool()
    run_closed(port, request, clients, seconds, 0.5, pool)
    return pool


def _load_by_wrk(url: str, body: bytes, port: int, request: bytes, clients: int, seconds: float) -> dict[str, Any]:
    del port, request
    Wrk(url, body, clients, 1.0, JSON).finish()
    load = Wrk(url, body, clients, seconds, JSON).finish()
    return {"requests/s": load.rate, "p50 ms": load.p50, "p99 ms": load.p99, "failed": load.failed}


def kill_engine(step: Step) -> None:
    """Kill the engine with SIGKILL while a client asks, and wait for its successor.

    Raises:
        FailedError: There is no engine, a wrong answer, or none in time.
    """
    with serve(step, PUBLISHED, "--placement", "engine") as server:
        engines = [process for process in server.tree() if _is_engine(process)]
        if not engines:
            raise FailedError("there is no engine")
        ask = _ask_digit(step, server)
        for process in engines:
            process.kill()
        step.add(killed="engine", **_recover(ask))


def poison_device(step: Step) -> None:
    """Make a kernel fail an assertion, after which the process can use the GPU no more, and wait for right answers.

    Raises:
        SkipError: PyTorch reaches no GPU here.
        FailedError: No right answer in time, or the failing request was not answered.
    """
    if step.device != "cpu" and not list_accelerators("torchscript"):
        raise SkipError("PyTorch, whose kernels assert, reaches no GPU")
    with serve(step, (*PUBLISHED, "lookup"), "--placement", "engine") as server:
        ask = _ask_digit(step, server)
        answer = _predict(server, "lookup", [[100]])
        step.add(request="row 100 of 8", status=answer.status_code, says=answer.json().get("error"))
        step.add(request="a digit, afterwards", **_recover(ask))
        step.add(request="row 1 of 8, afterwards", **_recover(partial(_ask_number, server, "lookup", 1.0)))


def exhaust_memory(step: Step) -> None:
    """Ask for more memory than there is: one clean failure, and right answers at once.

    Raises:
        FailedError: The request was answered otherwise, or the service had to recover.
    """
    with serve(step, (*PUBLISHED, "hungry"), "--placement", "engine") as server:
        ask = _ask_digit(step, server)
        answer = _predict(server, "hungry", [[TOO_MUCH]])
        step.add(request=f"{TOO_MUCH:,.0f} MiB", status=answer.status_code, says=answer.json().get("error"))
        if answer.status_code == OK:
            raise FailedError("it was answered")
        recovered = {"a digit": _recover(ask), "1 MiB": _recover(partial(_ask_number, server, "hungry", 1.0))}
        for request, figures in recovered.items():
            step.add(request=f"{request}, afterwards", **figures)
        if any(figures["failed meanwhile"] for figures in recovered.values()):
            raise FailedError("a request after it failed")


def _ask_digit(step: Step, server: Started) -> Callable[[], bool]:
    """Return what asks for a golden digit and tells whether it was answered as now."""
    _, manifest = load_model(step.models, "mnist")
    body, url = build_body(manifest, 4), _url(server, "/v1/models/mnist:predict")
    expected = [each["label"] for each in requests.post(url, body, headers=JSON, timeout=30).json()["predictions"]]

    def ask() -> bool:
        answer = requests.post(url, body, headers=JSON, timeout=10)
        if answer.status_code != OK:
            return False
        if [each["label"] for each in answer.json()["predictions"]] != expected:
            raise FailedError("a digit was answered otherwise than before")
        return True

    return ask


def _ask_number(server: Started, model: str, number: float) -> bool:
    answer = _predict(server, model, [[number]])
    return answer.status_code == OK and answer.json()["predictions"] == [{"prediction": 2 * number}]


def _predict(server: Started, model: str, instances: list[list[float]]) -> requests.Response:
    return requests.post(_url(server, f"/v1/models/{model}:predict"), json={"instances": instances}, timeout=30)


def _recover(ask: Callable[[], bool]) -> dict[str, float]:
    """Return seconds until the first right answer, and how many requests failed before.

    Raises:
        FailedError: There is none in time.
    """
    began, failed = time.perf_counter(), 0
    pause = threading.Event()
    while time.perf_counter() - began < RECOVERY_SECONDS:
        if ask():
            return {"recovered after s": time.perf_counter() - began, "failed meanwhile": failed}
        failed += 1
        pause.wait(0.02)
    raise FailedError(f"no right answer within {RECOVERY_SECONDS:.0f} s")


def _is_engine(process: psutil.Process) -> bool:
    """Return whether a process is an engine, by the name that its supervisor has given it."""
    try:
        return process.name().startswith("engine")
    except psutil.Error:
        return False


def _url(server: Started, path: str) -> str:
    return f"http://127.0.0.1:{server.port}{path}"
