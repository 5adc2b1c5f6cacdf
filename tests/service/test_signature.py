"""Tests of service.signature: models without a task, in a repository."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from service.batching import Batcher, Cost
from service.repository import Repository
from service.settings import Settings
from service.signature import SignaturePredictor, Tensors
from tests import fakes

REQUEST = Tensors(x=np.zeros(1, np.float32))


def load_echo(root: Path) -> Repository:
    """Return a repository with one model, `echo`, from x to y."""
    about = ("FP32", [-1])
    fakes.write_signature(root, "echo", {"x": about}, {"y": about}, helper.make_node("Identity", ["x"], ["y"]))
    repository = Repository(Settings(models_dir=root, device="cpu", backend="onnx"))
    repository.load()
    return repository


def run_three(batcher: Batcher, note: Callable[[], object]) -> None:
    """Submit three requests, and call `note` after each answer."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        waiters: list[asyncio.Future[Any]] = [loop.create_future() for _ in range(3)]
        for waiter in waiters:
            batcher.submit(REQUEST, loop.time() + 10, waiter)
        for waiter in waiters:
            await waiter
            note()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_call_in_the_thread_is_answered_when_it_ends(empty_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that wait for the thread do not wait for each other's calls."""
    gate = threading.Semaphore(1)

    def predict(self: SignaturePredictor, inputs: Tensors) -> Tensors:
        del self
        assert gate.acquire(timeout=5), "the answer of the call before this one was not given"
        return inputs

    monkeypatch.setattr(SignaturePredictor, "measure_cost", lambda self, rows: Cost(1.0, 1.0))
    monkeypatch.setattr(SignaturePredictor, "predict", predict)
    run_three(load_echo(empty_dir).get("echo").batcher, gate.release)


def test_calls_on_the_loop_take_a_turn_each(empty_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests wait, the event loop stands still for one call, not for them all."""
    calls: list[Tensors] = []

    def predict(self: SignaturePredictor, inputs: Tensors) -> Tensors:
        del self
        calls.append(inputs)
        return inputs

    monkeypatch.setattr(SignaturePredictor, "measure_cost", lambda self, rows: Cost(0.0, 1e-6))
    monkeypatch.setattr(SignaturePredictor, "predict", predict)
    made: list[int] = []  # calls by each answer
    run_three(load_echo(empty_dir).get("echo").batcher, lambda: made.append(len(calls)))
    assert made[0] < 3
    assert made[-1] == 3


def test_cost_grows_with_the_requests(empty_dir: Path) -> None:
    """Every request is a call of its own, so ten of them cost ten times as much as one."""
    cost = load_echo(empty_dir).get("echo").predictor.measure_cost(64)
    assert cost.fixed == 0
    assert 0 < cost.each < 1
