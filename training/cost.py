"""Cost: the size of an artifact and the time it takes per instance."""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from service.model.backends import Array, Backend, open_backend
from service.model.manifest import BackendName, Manifest

BATCHES = (1, 64)
_SECONDS = 0.2  # spent measuring each batch size
_LEAST_CALLS = 5


@dataclass(frozen=True)
class Cost:
    """The bytes of an artifact, and its microseconds per instance by batch size, on one CPU thread."""

    bytes: int
    microseconds: dict[int, float]


def measure_costs(manifest: Manifest, contents: dict[BackendName, bytes]) -> dict[BackendName, Cost]:
    """Return the cost of each artifact."""
    threads = torch.get_num_threads()
    try:
        return {name: _measure(name, content, manifest) for name, content in contents.items()}
    finally:
        torch.set_num_threads(threads)  # the TorchScript backend sets it for the whole process


def _measure(name: BackendName, content: bytes, manifest: Manifest) -> Cost:
    backend = open_backend(name, content, manifest, "cpu", threads=1)
    generator = np.random.default_rng(0)
    rows = {size: generator.random((size, *manifest.input.shape), np.float32) for size in BATCHES}
    return Cost(len(content), {size: time_calls(backend, inputs) / size * 1e6 for size, inputs in rows.items()})


def time_calls(backend: Backend, inputs: Array) -> float:
    """Return the 10th percentile of the seconds of a call: it is hardly disturbed by other load."""
    for _ in range(2):
        backend.run(inputs)
    seconds: list[float] = []
    while len(seconds) < _LEAST_CALLS or sum(seconds) < _SECONDS:
        started = time.perf_counter()
        backend.run(inputs)
        seconds.append(time.perf_counter() - started)
    return statistics.quantiles(seconds, n=10)[0]
