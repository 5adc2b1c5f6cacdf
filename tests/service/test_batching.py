"""Tests of service.model.batching."""

import asyncio
import contextlib
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY

from service.errors import DeadlineExceededError, InferenceError, ServiceError, TooLargeError, UnavailableError
from service.model import batching
from service.model.backends import Array
from service.model.batching import Batcher
from service.model.cost import Cost
from service.telemetry.metrics import ModelMetrics
from tests.waiter import FutureWaiter

Outcome = Array | BaseException
CHEAP, DEAR = Cost(fixed=1e-6, each=1e-7), Cost(fixed=0.01, each=0.001)  # run on the loop, or on the thread
BOTH = pytest.mark.parametrize("cost", [CHEAP, DEAR], ids=["on the loop", "on the thread"])


def rows(*values: float) -> Array:
    """Return inputs float32 (N, 1)."""
    return np.array(values, np.float32).reshape(-1, 1)


class UnspeakableError(Exception):
    """An error that cannot be shown."""

    def __repr__(self) -> str:
        """Fail."""
        raise ValueError("no words")

    __str__ = __repr__


class Panic(BaseException):
    """What an extension in Rust raises that panics."""


class Doubler:
    """Doubles rows, remembers the size of each call, fails on -13, and can be held."""

    def __init__(self, failure: BaseException | None = None) -> None:
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
    """Wait for all; errors are returned, and must have been given as such."""
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    for future, outcome in zip(futures, outcomes, strict=True):
        assert future.cancelled() or (future.exception() is outcome) == isinstance(outcome, BaseException)
    return list(outcomes)


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
    """What arrives in the same turn of the loop is one backend call, up to the limit; the rest have the next turns."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, CHEAP, max_batch_size=4, queue_size=100)
        waiting = [submit(batcher, rows(value)) for value in range(10)]
        for turn in (1, 2, 3):
            await asyncio.sleep(0)
            assert double.sizes == [4, 4, 2][:turn]
        await gather(waiting)

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
@pytest.mark.parametrize(
    "failure",
    [
        InferenceError("unlucky"),
        RuntimeError("a bug"),
        Panic("in Rust"),
        SystemExit(1),
        KeyboardInterrupt(),
        GeneratorExit(),
        UnspeakableError(),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_failing_request_fails_alone(cost: Cost, failure: BaseException) -> None:
    """In a batch that fails, whatever it raises, each request is run alone: the others get their answers."""

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
        before = read_dropped("full")
        with pytest.raises(UnavailableError, match="queue is full"):
            submit(batcher, rows(9))
        assert read_dropped("full") == before + 1
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
        batcher = build(double, Cost(fixed=0, each=0.0007), max_batch_size=64, queue_size=1000)  # 2 rows fit the loop
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


def test_every_failure_is_a_service_error() -> None:
    """Whatever a graph raises, the waiter hears a ServiceError."""

    async def check() -> None:
        batcher = build(Doubler(ValueError("odd")), CHEAP, max_batch_size=4, queue_size=100)
        (outcome,) = await gather([submit(batcher, rows(-13))])
        assert isinstance(outcome, ServiceError)

    run(check)


@BOTH
def test_call_has_no_more_rows_than_pay(cost: Cost) -> None:
    """Where measuring has shown that larger batches gain nothing, calls are as small, whatever the limit."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, replace(cost, batch=2), max_batch_size=64, queue_size=100)
        await gather([submit(batcher, rows(value)) for value in range(4)])
        assert (await submit(batcher, rows(*range(5)))).tolist() == [[0], [2], [4], [6], [8]]
        assert set(double.sizes) <= {1, 2}

    run(check)


def hold(batcher: Batcher, double: Doubler) -> FutureWaiter:
    """Occupy the model's thread until `double` is let go."""
    double.gate.clear()
    return submit(batcher, rows(0), seconds=1000)


def read_dropped(reason: str) -> float:
    """Return how many requests of the tests' model were dropped for a reason."""
    labels = {"model": "doubler", "version": "1", "reason": reason}
    return REGISTRY.get_sample_value("service_dropped_total", labels) or 0.0


def test_request_that_would_be_late_is_refused_at_once() -> None:
    """By the cost of what is ahead; Retry-After says when it might be taken, and one with more time is taken now."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, Cost(fixed=0.0, each=1.0), max_batch_size=1, queue_size=100)
        first = hold(batcher, double)
        waiting = [submit(batcher, rows(value), seconds=1000) for value in range(8)]
        assert batcher.backlog == pytest.approx(9, abs=0.5)
        before = read_dropped("overload")
        with pytest.raises(UnavailableError, match="too long for the request's deadline; try again") as refused:
            submit(batcher, rows(1), seconds=5)  # to wait for 10 seconds
        assert refused.value.retry_after == 6
        with pytest.raises(UnavailableError):
            submit(batcher, rows(1), seconds=11)  # may just be late
        assert read_dropped("overload") == before + 2
        assert batcher.rows == 9
        taken = submit(batcher, rows(1), seconds=14)
        double.gate.set()
        await gather([first, *waiting])
        assert (await taken).tolist() == [[2]]
        assert batcher.backlog == 0

    run(check)


@pytest.mark.parametrize("slowdown", [1.0, 4.0])
def test_later_rows_do_not_make_those_late_that_were_accepted(slowdown: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call ends by the deadline of whoever was told that it can be answered; the others are in the next.

    So it does where calls take longer than was measured.
    """
    monkeypatch.setattr(batching, "WEIGHT", 0.0)  # calls take no time here, and the estimate is to stay

    async def check() -> None:
        double = Doubler()
        batcher = build(double, Cost(fixed=0.0, each=1.0), max_batch_size=8, queue_size=100)
        batcher._slowdown = slowdown
        first = hold(batcher, double)
        urgent = submit(batcher, rows(1), seconds=5 * slowdown)
        others = [submit(batcher, rows(2), seconds=1000) for _ in range(7)]  # 8 rows would take 8 seconds, or more
        late = submit(batcher, rows(3, 3, 3, 3, 3, 3, 3, 3, 3), seconds=1000)
        double.gate.set()
        await gather([first, urgent, *others, late])
        assert 1 <= double.sizes[1] < 5  # of its 5 seconds, some may have passed
        assert sum(double.sizes) == 1 + 1 + 7 + 9

    run(check)


def test_request_that_must_be_late_makes_no_call_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be done for it, and small calls would make others late, too; calls count as long as they take."""
    monkeypatch.setattr(batching, "WEIGHT", 0.0)

    async def check() -> None:
        loop, double = asyncio.get_running_loop(), Doubler()
        batcher = build(double, Cost(fixed=0.0, each=1.0), max_batch_size=8, queue_size=100)
        batcher._slowdown = 4.0
        first = hold(batcher, double)
        late = submit(batcher, rows(1), seconds=20)
        others = [submit(batcher, rows(2), seconds=1000) for _ in range(7)]
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + 17)  # 3 are left, and a row takes 4
        double.gate.set()
        await gather([first, late, *others])
        assert double.sizes[1] > 5

    asyncio.run(check())


def test_refused_request_leaves_nothing_behind() -> None:
    """Its inputs are freed at once, not when garbage is collected: each may have megabytes."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, Cost(fixed=0.0, each=1.0), max_batch_size=1, queue_size=100)
        first = hold(batcher, double)
        inputs = rows(1)
        freed = weakref.ref(inputs)
        with contextlib.suppress(UnavailableError):
            submit(batcher, inputs, seconds=1)
        del inputs
        assert freed() is None
        double.gate.set()
        await first

    gc.disable()
    try:
        run(check)
    finally:
        gc.enable()


def test_batcher_begins_with_nothing_to_do() -> None:
    """Its first figures, which metrics show before any request, are zeros."""
    batcher = build(Doubler(), DEAR, max_batch_size=4, queue_size=100)
    assert (batcher.rows, batcher.running, batcher.backlog) == (0, 0, 0)


def test_lone_request_is_taken_whatever_the_estimate() -> None:
    """With nothing ahead of it, a request that seems to take too long is tried."""

    async def check() -> None:
        batcher = build(Doubler(), Cost(fixed=100.0, each=100.0), max_batch_size=1, queue_size=100)
        for _ in range(2):
            assert (await submit(batcher, rows(1), seconds=1)).tolist() == [[2]]

    run(check)


@pytest.mark.parametrize(("each", "is_inline"), [(0.0007, True), (0.001, False)])
def test_model_of_dear_rows_runs_on_its_thread_which_gives_way(each: float, is_inline: bool) -> None:
    """A row that takes a millisecond fits the loop, but a saturated model of such rows would leave it to nobody."""
    seen: list[tuple[int, int]] = []

    def predict(inputs: Array) -> Array:
        thread = threading.get_native_id()
        seen.append((thread, os.getpriority(os.PRIO_PROCESS, thread)))
        return inputs

    async def check() -> None:
        await submit(Batcher(predict, Cost(0.0, each), 8, 100, Recorded()), rows(1))

    run(check)
    ((thread, priority),) = seen
    assert (thread == threading.get_native_id()) == is_inline
    if sys.platform == "linux":
        assert priority - os.nice(0) == (0 if is_inline else batching.NICENESS)


def test_small_request_is_not_refused_for_large_ones() -> None:
    """What runs on the loop is taken, though the thread has work for longer than the request has time."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, Cost(fixed=0, each=0.0007), max_batch_size=64, queue_size=10_000)  # 2 rows fit the loop
        double.gate.clear()
        large = submit(batcher, rows(*range(5000)), seconds=1000)
        with pytest.raises(UnavailableError, match="too long for the request's deadline"):
            submit(batcher, rows(1, 2, 3), seconds=1)
        small = submit(batcher, rows(1), seconds=1)
        double.gate.set()
        assert (await small).tolist() == [[2]]
        await large

    run(check)


def test_deadline_that_has_passed_is_expired_not_overload() -> None:
    """A request that is late already hears so, not that it might try again."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, DEAR, max_batch_size=1, queue_size=100)
        first = hold(batcher, double)
        (outcome,) = await gather([submit(batcher, rows(1), seconds=-1)])
        assert isinstance(outcome, DeadlineExceededError)
        double.gate.set()
        await first

    run(check)


def test_estimate_follows_what_calls_take() -> None:
    """A measurement that was too high is corrected by the calls, and one call that takes long hardly counts."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, Cost(fixed=0.0, each=0.5), max_batch_size=1, queue_size=1000)
        backlogs = []
        for seconds in (0.0, 0.3, 0.0):
            first = hold(batcher, double)
            others = [submit(batcher, rows(0), seconds=1000) for _ in range(9)]
            backlogs.append(batcher.backlog)
            await asyncio.sleep(seconds)
            double.gate.set()
            await gather([first, *others])
            if not seconds:
                await gather([submit(batcher, rows(0), seconds=1000) for _ in range(60)])
        measured, corrected, after = backlogs
        assert measured == pytest.approx(5, abs=0.1)
        assert corrected < 1
        assert after < 3 * corrected

    run(check)


class Broken(FutureWaiter):
    """A waiter that raises where it should take its answer."""

    def set_result(self, result: Any, /) -> None:
        """Raise."""
        raise RuntimeError("broken")

    set_exception = set_result


@BOTH
@pytest.mark.parametrize("value", [1, -13], ids=["a result", "a failure"])
def test_waiter_that_raises_keeps_nobody_from_an_answer(
    cost: Cost, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the others of its batch are answered, and the queue goes on."""

    async def check() -> None:
        loop = asyncio.get_running_loop()
        batcher = build(Doubler(), cost, max_batch_size=8, queue_size=100)
        first = submit(batcher, rows(0))
        batcher.submit(rows(value), loop.time() + 5, Broken(loop=loop))
        others = [submit(batcher, rows(2)), submit(batcher, rows(3))]
        assert [(await waiter).tolist() for waiter in (first, *others)] == [[[0]], [[4]], [[6]]]
        assert (await submit(batcher, rows(4))).tolist() == [[8]]
        assert batcher.rows == 0

    run(check)
    (record,) = caplog.records
    assert record.getMessage() == "a request could not be given its answer"
    assert record.exc_info is not None


def test_expired_waiter_that_raises_keeps_nobody_from_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    """The deadline of one whose answer cannot be given passes, and the others are answered."""

    async def check() -> None:
        loop = asyncio.get_running_loop()
        batcher = build(Doubler(), CHEAP, max_batch_size=8, queue_size=100)
        batcher.submit(rows(1), loop.time() - 1, Broken(loop=loop))
        assert (await submit(batcher, rows(2))).tolist() == [[4]]
        assert batcher.rows == 0

    run(check)
    assert [record.getMessage() for record in caplog.records] == ["a request could not be given its answer"]


class Recorded:
    """Metrics that are kept as they come."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, float, float]] = []
        self.reasons: list[str] = []

    def dropped(self, reason: str) -> None:
        """Keep the reason."""
        self.reasons.append(reason)


def test_slow_call_sends_the_model_to_its_thread_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was thought cheap and holds the loop runs elsewhere, with all that waits; later it is tried again."""
    monkeypatch.setattr(batching, "SHORTEST_BAN", 0.2)
    monkeypatch.setattr(batching, "LONGEST_BAN", 0.3)
    threads: list[str] = []

    def predict(inputs: Array) -> Array:
        threads.append(threading.current_thread().name)
        time.sleep(0.06 if (inputs == 0).any() else 0)
        return inputs * 2

    async def check() -> None:
        batcher = Batcher(predict, CHEAP, 2, 100, Recorded())
        loop_thread = threading.current_thread().name
        slow = [submit(batcher, rows(value)) for value in (0, 1, 2, 3, 4)]
        assert [answer.tolist() for answer in await gather(slow)] == [[[2 * value]] for value in range(5)]  # type: ignore[union-attr]
        await submit(batcher, rows(5))
        assert threads[0] == loop_thread
        assert len(threads) == 4
        assert all(name.startswith("batch") for name in threads[1:])
        assert batcher.rows == 0
        until = time.monotonic() + 5
        while threads[-1] != loop_thread:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
            await submit(batcher, rows(6))

    run(check)


def test_requests_of_a_loop_that_ended_are_forgotten() -> None:
    """A batcher may move to another event loop, as in tests; it runs nothing for those who waited on the one before."""
    double = Doubler()
    batcher = build(double, CHEAP, max_batch_size=2, queue_size=1000)

    async def leave() -> None:
        for value in range(1000):
            submit(batcher, rows(value))

    async def check() -> None:
        assert (await submit(batcher, rows(8))).tolist() == [[16]]
        assert (batcher.rows, batcher.backlog) == (0, 0)

    asyncio.run(leave())
    double.sizes.clear()
    run(check)
    assert double.sizes == [1]


def test_requests_of_a_loop_that_ended_leave_the_thread_to_others() -> None:
    """Those that waited for the model's thread are not run either, but for the call that it is in."""
    double = Doubler()
    batcher = build(double, DEAR, max_batch_size=1, queue_size=1000)

    async def leave() -> None:
        hold(batcher, double)
        await double.hold()
        for value in range(9):
            submit(batcher, rows(value))

    async def check() -> None:
        double.gate.set()
        assert (await submit(batcher, rows(8))).tolist() == [[16]]
        assert batcher.rows == 0

    asyncio.run(leave())
    run(check)
    assert double.sizes == [1, 1]


def test_batcher_with_nothing_to_do_sets_no_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with a thousand models would otherwise wake fifty thousand times a second; deadlines are kept later."""
    monkeypatch.setattr(batching, "SWEEP_SECONDS", 0.001)

    async def check() -> None:
        loop, timers = asyncio.get_running_loop(), list[float]()
        call_later = loop.call_later

        def count(seconds: float, *arguments: Any) -> asyncio.TimerHandle:
            timers.append(seconds)
            return call_later(seconds, *arguments)

        monkeypatch.setattr(loop, "call_later", count)
        double = Doubler()
        batcher = build(double, DEAR, max_batch_size=1, queue_size=100)
        for _ in range(2):
            assert (await submit(batcher, rows(1))).tolist() == [[2]]
            await asyncio.sleep(0.02)
            before = timers.count(0.001)
            assert before
            await asyncio.sleep(0.02)
            assert timers.count(0.001) == before
        before = timers.count(0.001)
        first = hold(batcher, double)
        late = [submit(batcher, rows(1), seconds=seconds) for seconds in (0.2, 0.2, 0.3)]
        assert timers.count(0.001) == before + 1
        assert all(isinstance(outcome, DeadlineExceededError) for outcome in await gather(late))
        double.gate.set()
        await first

    run(check)


def test_room_of_those_who_have_gone_is_free_at_once() -> None:
    """While a call runs, the rows of waiting requests that were given up are taken from the queue."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, DEAR, max_batch_size=1, queue_size=3)
        first = hold(batcher, double)
        gone, stays = submit(batcher, rows(1)), submit(batcher, rows(2))
        gone.cancel()
        while batcher.rows == 3:
            await asyncio.sleep(0.001)
        assert batcher.rows == 2
        late = submit(batcher, rows(3))
        double.gate.set()
        assert [answer.tolist() for answer in await gather([first, stays, late])] == [[[0]], [[4]], [[6]]]  # type: ignore[union-attr]
        assert batcher.rows == 0

    run(check)


def test_room_of_those_who_are_late_is_free_while_their_call_runs() -> None:
    """Rows of a call whose requests have all been answered 504 do not make the next request be refused."""

    async def check() -> None:
        double = Doubler()
        double.gate.clear()
        batcher = build(double, DEAR, max_batch_size=4, queue_size=4)
        late = submit(batcher, rows(1, 2, 3, 4), seconds=0.05)
        await double.hold()
        assert [type(outcome) for outcome in await gather([late])] == [DeadlineExceededError]
        following = submit(batcher, rows(5, 6, 7, 8))
        with pytest.raises(UnavailableError, match="queue is full"):
            submit(batcher, rows(9))
        double.gate.set()
        assert (await following).tolist() == [[10], [12], [14], [16]]
        assert batcher.rows == 0

    run(check)


class Named:
    """Tensors by name, which count as one row and cannot be cut."""

    def __len__(self) -> int:
        """Return 1."""
        return 1


def test_lone_inputs_and_outputs_may_be_anything() -> None:
    """A model that takes tensors by name gets them as they came, and its outputs are given as they are."""

    async def check() -> None:
        named = Named()
        batcher = Batcher(lambda inputs: {"c": inputs}, CHEAP, 1, 100, Recorded())
        assert await submit(batcher, named) == {"c": named}  # type: ignore[arg-type]

    run(check)


def test_request_as_large_as_the_queue_waits_for_room() -> None:
    """It may be taken later, so it is told to try again, and not that it is too large."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, DEAR, max_batch_size=4, queue_size=4)
        first = hold(batcher, double)
        with pytest.raises(UnavailableError, match="queue is full"):
            submit(batcher, rows(1, 2, 3, 4))
        double.gate.set()
        await first
        assert (await submit(batcher, rows(1, 2, 3, 4))).shape == (4, 1)

    run(check)


def test_largest_request_for_the_loop_is_not_refused_for_large_ones() -> None:
    """The limit itself still runs on the loop."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, Cost(fixed=0, each=0.0007), max_batch_size=64, queue_size=10_000)  # 2 rows fit the loop
        first = submit(batcher, rows(*range(5000)), seconds=1000)
        largest = submit(batcher, rows(1, 2), seconds=1)
        await asyncio.sleep(0)
        assert largest.done()
        assert (await largest).tolist() == [[2], [4]]
        await first

    run(check)


def test_late_by_less_than_a_second_is_refused() -> None:
    """Retry-After is then one second."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, Cost(fixed=0.0, each=0.2), max_batch_size=1, queue_size=100)
        first = hold(batcher, double)
        with pytest.raises(UnavailableError, match="too long") as refused:
            submit(batcher, rows(1), seconds=0.1)
        assert refused.value.retry_after == 1
        double.gate.set()
        await first

    run(check)


def sleep_and_return(seconds: float) -> Callable[[Array], Array]:
    """Return a function that takes so long to return its argument."""

    def run_slowly(inputs: Array) -> Array:
        time.sleep(seconds)
        return inputs

    return run_slowly


def test_estimate_grows_where_calls_take_longer_than_measured() -> None:
    """A measurement that was too low is corrected, so that requests are refused in time."""

    async def check() -> None:
        batcher = Batcher(sleep_and_return(0.01), Cost(0.0, 0.003), 1, 100, Recorded())
        estimates = []
        for count in (40, 1):
            waiting = [submit(batcher, rows(0), seconds=1000) for _ in range(10)]
            estimates.append(batcher.backlog)
            await gather([*waiting, *(submit(batcher, rows(0), seconds=1000) for _ in range(count))])
        assert estimates[1] > 1.5 * estimates[0]

    run(check)


def test_call_that_fails_early_says_nothing_of_how_long_others_take() -> None:
    """Bad rows in a large request end its call; the next requests are not promised more than the thread can do."""

    async def check() -> None:
        double = Doubler()
        batcher = build(double, Cost(fixed=0.0, each=1.0), max_batch_size=1, queue_size=100)
        for _ in range(2):
            assert isinstance((await gather([submit(batcher, rows(-13))]))[0], InferenceError)
        first = hold(batcher, double)
        waiting = [submit(batcher, rows(value), seconds=1000) for value in range(8)]
        assert batcher.backlog == pytest.approx(9, abs=0.5)
        double.gate.set()
        await gather([first, *waiting])

    run(check)


@BOTH
def test_calls_are_recorded_with_their_times(cost: Cost) -> None:
    """Rows, the seconds from the first request to the call, and those of the call."""

    async def check() -> None:
        recorded = Recorded()
        batcher = Batcher(sleep_and_return(0.02), cost, 8, 100, recorded)
        await gather([submit(batcher, rows(1)), submit(batcher, rows(2, 3))])
        assert sum(rows for rows, _, _ in recorded.batches) == 3
        for _, waited, ran in recorded.batches:
            assert 0 <= waited < 5
            assert 0.02 <= ran < 5
        await asyncio.sleep(0)
        (outcome,) = await gather([submit(batcher, rows(1), seconds=-1)])
        assert isinstance(outcome, DeadlineExceededError)
        assert recorded.reasons == ["expired"]

    run(check)
