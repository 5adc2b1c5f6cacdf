"""Tests of service.model.batching."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from service.errors import DeadlineExceededError, InferenceError, ServiceError, TooLargeError, UnavailableError
from service.model.backends import Array
from service.model.batching import Batcher, Cost, measure_cost
from service.telemetry.metrics import ModelMetrics
from tests.waiter import FutureWaiter

Outcome = Array | BaseException
CHEAP, DEAR = Cost(fixed=1e-6, each=1e-7), Cost(fixed=1.0, each=1.0)  # run on the loop, or on the model's thread
BOTH = pytest.mark.parametrize("cost", [CHEAP, DEAR], ids=["on the loop", "on the thread"])


def rows(*values: float) -> Array:
    """Return inputs float32 (N, 1)."""
    return np.array(values, np.float32).reshape(-1, 1)


class Doubler:
    """Doubles rows, remembers the size of each call, fails on -13, and can be held."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.failure = failure or InferenceError("unlucky")

    def __call__(self, inputs: Array) -> Array:
        """Return 2 * inputs."""
        self.entered.set()
        assert self.gate.wait(10)
        self.sizes.append(len(inputs))
        if (inputs == -13).any():
            raise self.failure
        return inputs * 2

    async def hold(self) -> None:
        """Wait until a call has begun and stays."""
        while not self.entered.is_set():
            await asyncio.sleep(0.001)


def build(predict: Doubler, cost: Cost, max_batch_size: int, queue_size: int) -> Batcher:
    """Return a batcher with figures of its own."""
    return Batcher(predict, cost, max_batch_size, queue_size, ModelMetrics("doubler", 1))


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine, for ten seconds at most."""
    asyncio.run(asyncio.wait_for(test(), 10))


def submit(batcher: Batcher, inputs: Array, seconds: float = 5) -> FutureWaiter:
    """Queue a request and return its waiter."""
    loop = asyncio.get_running_loop()
    waiter = FutureWaiter(loop=loop)
    batcher.submit(inputs, loop.time() + seconds, waiter)
    return waiter


async def gather(futures: Sequence[FutureWaiter]) -> list[Outcome]:
    """Wait for all; errors are returned."""
    return list(await asyncio.gather(*futures, return_exceptions=True))


@BOTH
def test_batch_equals_its_singles_in_any_order(cost: Cost) -> None:
    """Each request gets its own rows of the batch, whatever the order and the sizes."""

    async def check() -> None:
        batcher = build(Doubler(), cost, max_batch_size=8, queue_size=1000)
        generator = np.random.default_rng(0)
        requests = [generator.normal(size=(int(size), 1)).astype(np.float32) for size in generator.integers(1, 6, 40)]
        for order in (range(40), generator.permutation(40)):
            futures = {int(index): submit(batcher, requests[int(index)]) for index in order}
            for index, future in futures.items():
                np.testing.assert_array_equal(await future, requests[index] * 2)
        assert batcher.rows == 0

    run(check)


def test_requests_of_one_turn_share_a_call() -> None:
    """What arrives in the same turn of the loop is one backend call, up to the limit."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, CHEAP, max_batch_size=4, queue_size=100)
        await gather([submit(batcher, rows(value)) for value in range(10)])
        assert double.sizes == [4, 4, 2]

    run(check)


def test_what_gathers_while_a_call_runs_is_the_next_call() -> None:
    """On the model's thread, requests that come during a call are taken together by the next one."""

    async def check() -> None:
        double = Doubler()
        double.gate.clear()
        batcher = build(double, DEAR, max_batch_size=8, queue_size=100)
        first = submit(batcher, rows(0))
        await double.hold()
        others = [submit(batcher, rows(value)) for value in range(5)]
        double.gate.set()
        await gather([first, *others])
        assert double.sizes == [1, 5]

    run(check)


@BOTH
@pytest.mark.parametrize("failure", [InferenceError("unlucky"), RuntimeError("a bug")])
def test_failing_request_fails_alone(cost: Cost, failure: Exception) -> None:
    """In a batch that fails, each request is run alone: the others get their answers."""

    async def check() -> None:
        batcher = build(Doubler(failure), cost, max_batch_size=8, queue_size=100)
        outcomes = await gather([submit(batcher, rows(value)) for value in (1, -13, 3)])
        assert isinstance(outcomes[1], InferenceError)
        assert [outcome.tolist() for outcome in (outcomes[0], outcomes[2]) if isinstance(outcome, np.ndarray)] == [
            [[2]],
            [[6]],
        ]
        assert batcher.rows == 0

    run(check)


@BOTH
def test_full_queue_refuses_and_recovers(cost: Cost) -> None:
    """Rows beyond the queue's size are refused at once with UnavailableError, and taken again once there is room."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, cost, max_batch_size=2, queue_size=4)
        if cost is DEAR:
            double.gate.clear()
        futures = [submit(batcher, rows(value)) for value in range(4)]
        assert batcher.rows == 4
        with pytest.raises(UnavailableError, match="queue is full"):
            submit(batcher, rows(9))
        double.gate.set()
        await gather(futures)
        assert (await submit(batcher, rows(9))).tolist() == [[18]]

    run(check)


def test_large_request_is_run_in_parts_and_one_beyond_the_queue_refused() -> None:
    """A request of more rows than a batch is run in parts; one of more rows than the queue can never be taken: 413."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, DEAR, max_batch_size=4, queue_size=20)
        inputs = rows(*range(20))
        np.testing.assert_array_equal(await submit(batcher, inputs), inputs * 2)
        assert double.sizes == [4, 4, 4, 4, 4]
        with pytest.raises(TooLargeError, match="the request has 21 instances; at most 20 are taken at once"):
            submit(batcher, rows(*range(21)))
        assert batcher.rows == 0

    run(check)


def test_small_request_does_not_wait_for_a_large_one() -> None:
    """A request cheap enough for the loop is answered while a large one holds the thread."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, Cost(fixed=0, each=0.001), max_batch_size=64, queue_size=1000)  # 2 rows fit the loop
        double.gate.clear()
        large = submit(batcher, rows(*range(50)))
        await double.hold()
        threading.Timer(0.1, double.gate.set).start()  # the loop itself stands in the call until then
        small = submit(batcher, rows(1))
        assert (await small).tolist() == [[2]]
        assert (await large).shape == (50, 1)

    run(check)


def test_deadline_is_answered_while_the_batch_still_runs() -> None:
    """Requests hear DeadlineExceededError at their deadline, running or waiting, and are not run after it."""

    async def check() -> None:
        double = Doubler()
        double.gate.clear()
        batcher = build(double, DEAR, max_batch_size=1, queue_size=100)
        running = submit(batcher, rows(1), seconds=0.05)
        await double.hold()
        waiting = submit(batcher, rows(2), seconds=0.05)
        patient = submit(batcher, rows(3))
        outcomes = await gather([running, waiting])
        assert [type(outcome) for outcome in outcomes] == [DeadlineExceededError] * 2
        assert not patient.done()
        double.gate.set()
        assert (await patient).tolist() == [[6]]
        assert double.sizes == [1, 1]  # the first, and the patient one
        assert batcher.rows == 0

    run(check)


@BOTH
def test_past_deadline_is_never_run(cost: Cost) -> None:
    """A request whose deadline has passed when its turn comes is answered so and costs no backend call."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, cost, max_batch_size=4, queue_size=100)
        (outcome,) = await gather([submit(batcher, rows(1), seconds=-1)])
        assert isinstance(outcome, DeadlineExceededError)
        assert (double.sizes, batcher.rows) == ([], 0)

    run(check)


@BOTH
def test_gone_waiter_is_dropped(cost: Cost) -> None:
    """A request whose caller has gone is not run, and its rows leave the queue."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, cost, max_batch_size=1, queue_size=100)
        if cost is DEAR:
            double.gate.clear()
            first = submit(batcher, rows(0))
            await double.hold()
        else:
            first = submit(batcher, rows(0))
        gone, last = submit(batcher, rows(1)), submit(batcher, rows(2))
        gone.cancel()
        double.gate.set()
        await gather([first, last])
        assert (double.sizes, batcher.rows) == ([1, 1], 0)

    run(check)


def test_waiter_gone_during_the_call_hurts_nobody() -> None:
    """A caller that leaves while its batch runs is passed over; the others of the batch are answered."""

    async def check() -> None:
        double = Doubler()
        double.gate.clear()
        batcher = build(double, DEAR, max_batch_size=8, queue_size=100)
        gone = submit(batcher, rows(1))
        await double.hold()
        gone.cancel()
        stays = submit(batcher, rows(2))
        double.gate.set()
        assert (await stays).tolist() == [[4]]
        assert batcher.rows == 0

    run(check)


def test_cost_tells_how_many_rows_fit() -> None:
    """rows_within inverts the cost of a call; nothing fits where one call is too dear."""
    assert Cost(fixed=0.5, each=0.25).rows_within(1.5) == 4
    assert Cost(fixed=1.0, each=1.0).rows_within(0.002) == 0


def test_measured_cost_is_positive() -> None:
    """Measuring warms the model up on zeros of its shape, and a model that costs nothing has a cost above zero."""
    shapes = set()

    def predict(inputs: Array) -> Array:
        shapes.add(inputs.shape)
        return inputs[:, :1]

    cost = measure_cost(predict, (3,), 16)
    assert shapes == {(1, 3), (16, 3)}
    assert cost.fixed >= 0
    assert cost.each > 0


def test_every_failure_is_a_service_error() -> None:
    """Whatever a graph raises, the waiter hears a ServiceError."""

    async def check() -> None:
        batcher = build(Doubler(ValueError("odd")), CHEAP, max_batch_size=4, queue_size=100)
        (outcome,) = await gather([submit(batcher, rows(-13))])
        assert isinstance(outcome, ServiceError)

    run(check)
