"""The cost is that of the artifact's graph alone, on one thread."""

import numpy as np
import pytest
import torch

from service.model.backends import Array
from service.model.manifest import BackendName
from tests import fakes
from training import card as module
from training.card import BATCHES, measure_costs, time_calls


class SleepingBackend:
    """Takes a fixed time, and now and then longer."""

    name: BackendName = "onnx"
    device = provider = "cpu"
    is_tf32 = False

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.calls = 0

    def run(self, inputs: Array) -> Array:
        """Advance the clock by 10 ms; by 500 ms in every third call."""
        self.calls += 1
        self.clock[0] += 0.5 if self.calls % 3 == 0 else 0.01
        return inputs


def test_disturbed_calls_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single slow calls are not counted."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert time_calls(SleepingBackend(clock), np.zeros((1, 1), np.float32)) == pytest.approx(0.01)


def test_each_artifact_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its bytes and a time per batch size; the process's threads are restored."""
    monkeypatch.setattr(module, "_SECONDS", 0.001)
    threads = torch.get_num_threads()
    fake = fakes.doubler()
    costs = measure_costs(fake.manifest(), fake.contents)
    assert set(costs) == {"onnx", "torchscript"}
    for name, cost in costs.items():
        assert cost.bytes == len(fake.contents[name])
        assert set(cost.microseconds) == set(BATCHES)
        assert all(each > 0 for each in cost.microseconds.values())
    assert torch.get_num_threads() == threads
