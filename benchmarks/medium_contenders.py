"""Who is measured by `--cases medium`: this service, FastAPI, and onnxruntime alone."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import requests
from numpy.typing import NDArray

from benchmarks.clients import Pool, build_request, run_closed
from benchmarks.contenders import pack_tensor
from benchmarks.medium_models import MediumModel, build_jpeg
from benchmarks.processes import Started, start

CLIENTS = 16
BATCHES = (1, 2, 4, 8, 16, 32)
START_SECONDS = 240.0
NAN = float("nan")


class Post(NamedTuple):
    """A request."""

    path: str
    body: bytes
    headers: dict[str, str]

    def encode(self, more: dict[str, str] | None = None) -> bytes:
        """Return its bytes, with more header fields."""
        return build_request(self.path, self.body, self.headers | (more or {}))


@dataclass
class Contender:
    """A server, its requests, and what was measured: times in seconds, memory in MB of 10^6 bytes."""

    name: str
    command: list[str]
    environment: dict[str, str]
    ready_path: str
    tensor: Post
    picture: Post | None
    ready: float = NAN
    memory: float = NAN
    memory_after: float = NAN
    one: Pool = field(default_factory=Pool)
    one_picture: Pool = field(default_factory=Pool)
    many: Pool = field(default_factory=Pool)

    @property
    def failed(self) -> int:
        """How many requests were not answered 200."""
        return self.one.failed + self.one_picture.failed + self.many.failed

    @contextmanager
    def serve(self) -> Iterator[Started]:
        """Start it, wait until it is ready, and stop it in the end."""
        server = start(self.command, self.environment, self.ready_path, within=START_SECONDS)
        try:
            yield server
        finally:
            server.stop()

    def measure_start(self, server: Started) -> None:
        """Keep how long its start took and how large it then is."""
        self.ready, self.memory = server.cold_start, server.memory_mb()

    def check(self, server: Started, expected: NDArray[Any]) -> None:
        """Refuse to measure a server that answers anything but what onnxruntime itself gives."""
        url = f"http://127.0.0.1:{server.port}{self.tensor.path}"
        answer = requests.post(url, data=self.tensor.body, headers=self.tensor.headers, timeout=60)
        answer.raise_for_status()
        head = int(answer.headers.get("Inference-Header-Content-Length", 0))
        got = np.frombuffer(answer.content, np.float32, offset=head).reshape(expected.shape)
        if not np.allclose(got, expected, rtol=1e-3, atol=1e-4):
            raise SystemExit(f"{self.name} answers otherwise than onnxruntime")

    def load_one(self, server: Started, seconds: float) -> None:
        """Ask by one client, for tensors and then for pictures."""
        run_closed(server.port, self.tensor.encode(), 1, seconds, 0.3, self.one)
        if self.picture is not None:
            run_closed(server.port, self.picture.encode(), 1, seconds, 0.3, self.one_picture)

    def load_many(self, server: Started, seconds: float, warm_up: float) -> None:
        """Ask by 16 clients."""
        run_closed(server.port, self.tensor.encode(), CLIENTS, seconds, warm_up, self.many)


class Raw:
    """onnxruntime alone on all cores, in this process."""

    def __init__(self, folder: Path, model: MediumModel) -> None:
        self._model = model
        began = time.perf_counter()
        options = ort.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self._session = ort.InferenceSession(str(folder / "1" / "model.onnx"), options)
        self.expected: NDArray[Any] = self._run(model.build_inputs(1))
        self.ready = time.perf_counter() - began
        self.one, self.many, self.batch = Pool(), Pool(), 1

    def choose_batch(self, seconds: float) -> None:
        """Find the batch size with the most rows a second."""
        pools = {batch: Pool() for batch in BATCHES}
        for batch, pool in pools.items():
            self._repeat(batch, seconds, pool)
        self.batch = max(pools, key=lambda batch: pools[batch].rate)

    def load_one(self, seconds: float) -> None:
        """Run one row at a time."""
        self._repeat(1, seconds, self.one)

    def load_many(self, seconds: float) -> None:
        """Run the best batch."""
        self._repeat(self.batch, seconds, self.many)

    def _repeat(self, batch: int, seconds: float, pool: Pool) -> None:
        inputs = self._model.build_inputs(batch)
        self._run(inputs)
        began = now = time.perf_counter()
        while now < began + seconds:
            self._run(inputs)
            before, now = now, time.perf_counter()
            pool.latencies.append((now - before) * 1e3)
            pool.completed += batch
        pool.seconds += now - began

    def _run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        outputs: NDArray[Any] = self._session.run(None, {"inputs": inputs})[0]
        return outputs


def describe_ours(model: MediumModel, models_dir: Path, workers: int) -> Contender:
    """Return this service with a folder of models."""
    picture = Post(f"/v1/models/{model.name}:predict", build_jpeg(), {"Content-Type": "image/jpeg"})
    command = [sys.executable, "-m", "service", "serve", "--port", "{port}", "--workers", str(workers)]
    return Contender(
        f"this service, {workers} workers",
        [*command, "--models-dir", str(models_dir)],
        {},
        "/health/ready",
        Post(f"/v2/models/{model.name}/infer", *pack_tensor(model.build_inputs(1), model.datatype)),
        picture if model.is_image else None,
    )


def describe_fastapi(model: MediumModel, folder: Path) -> Contender:
    """Return FastAPI's service of the model in a folder."""
    flags = ["--port", "{port}", "--log-level", "error", "--no-access-log"]
    headers = {"Content-Type": "application/octet-stream"}
    return Contender(
        "FastAPI, 1 worker",
        [sys.executable, "-m", "uvicorn", *flags, "benchmarks.servers.fastapi_tensors:app"],
        {"BENCH_MODEL": str(folder / "1")},
        "/ready",
        Post("/tensor", model.build_inputs(1).tobytes(), headers),
        Post("/picture", build_jpeg(), headers) if model.is_image else None,
    )
