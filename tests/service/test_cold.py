"""Tests of service.model.cold: opening on request, closing for others, and never more memory than the budget."""

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from service.errors import DeadlineExceededError, ModelRefusedError, TooLargeError, UnavailableError
from service.model import cold
from service.model.backends import Array
from service.model.batching import Batcher
from service.model.cold import Budget, ColdBatcher, divide_budget
from service.model.cost import Cost
from service.telemetry.metrics import ModelMetrics
from tests.waiter import FutureWaiter

THREADED = Cost(fixed=0.01, each=0.001)
QUEUE = 8


class Version:
    """A version to open: counts how often it was, and can be held while it is opened or runs."""

    def __init__(self, budget: Budget, size: int = 10) -> None:
        self.opened = 0
        self.failure: Exception | None = None
        self.may_open, self.may_run = threading.Event(), threading.Event()
        self.may_open.set()
        self.may_run.set()
        self.batcher = ColdBatcher("m version 1", size, self._load, budget, QUEUE, ModelMetrics("m", 1))

    def _load(self) -> Batcher:
        assert self.may_open.wait(10)
        self.opened += 1
        if self.failure is not None:
            raise self.failure
        return Batcher(self._predict, THREADED, 4, QUEUE, ModelMetrics("m", 1))

    def _predict(self, inputs: Array) -> Array:
        assert self.may_run.wait(10)
        return inputs * 2

    def ask(self, value: float = 1.0, seconds: float = 10.0, rows: int = 1) -> FutureWaiter:
        """Submit a request."""
        waiter = FutureWaiter()
        inputs = np.full((rows, 1), value, np.float32)
        self.batcher.submit(inputs, asyncio.get_running_loop().time() + seconds, waiter)
        return waiter


@pytest.fixture
def budget() -> Iterator[Budget]:
    """A budget of 25 bytes: two versions of ten."""
    with ThreadPoolExecutor(1) as executor:
        found = Budget(executor)
        found.limit = 25
        yield found


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine, for 20 seconds at most."""
    asyncio.run(asyncio.wait_for(test(), 20))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    while not condition():
        await asyncio.sleep(0.005)


def test_first_requests_wait_until_it_is_open(budget: Budget) -> None:
    """A cold version is opened once for all who ask, and each gets its own answer."""

    async def test() -> None:
        version = Version(budget)
        version.may_open.clear()
        waiters = [version.ask(value) for value in range(5)]
        assert (version.batcher.is_cold, version.batcher.rows) == (True, 5)
        version.may_open.set()
        assert [float((await waiter)[0, 0]) for waiter in waiters] == [0, 2, 4, 6, 8]
        assert (version.batcher.is_cold, version.opened, version.batcher.rows) == (False, 1, 0)
        assert float((await version.ask(7))[0, 0]) == 14

    run(test)


def test_least_recently_used_is_closed(budget: Budget) -> None:
    """Where a third does not fit, the one that was not asked for longest goes, and comes back when it is asked for."""

    async def test() -> None:
        first, second, third = versions = [Version(budget) for _ in range(3)]
        for version in (first, second, first, third):
            await version.ask()
        assert [version.batcher.is_cold for version in versions] == [False, True, False]
        assert budget.used == 20
        await second.ask()
        assert [version.opened for version in versions] == [1, 2, 1]
        assert [version.batcher.is_cold for version in versions] == [True, False, False]

    run(test)


def test_version_in_use_is_never_closed(budget: Budget) -> None:
    """While all that are open have rows, a cold one waits: it is opened when one of them is done."""

    async def test() -> None:
        first, second, third = (Version(budget) for _ in range(3))
        for busy in (first, second):
            busy.may_run.clear()
        running = [first.ask(), second.ask()]
        await until(lambda: not second.batcher.is_cold)
        waiting = third.ask(3)
        await asyncio.sleep(0.1)
        assert third.opened == 0
        second.may_run.set()
        assert float((await waiting)[0, 0]) == 6
        assert [first.batcher.is_cold, second.batcher.is_cold, third.batcher.is_cold] == [False, True, False]
        first.may_run.set()
        for waiter in running:
            await waiter

    run(test)


def test_deadline_holds_while_it_is_cold(budget: Budget) -> None:
    """A request that waits for its version is answered at its deadline, with what it waited for."""

    async def test() -> None:
        slow = Version(budget, size=25)
        slow.may_open.clear()
        waiter = slow.ask(seconds=0.05)
        with pytest.raises(DeadlineExceededError, match="not open by the request's deadline"):
            await waiter
        slow.may_open.set()
        slow.may_run.clear()
        busy = slow.ask()
        await until(lambda: not slow.batcher.is_cold)
        with pytest.raises(UnavailableError, match="leave no room for this one in --memory-budget"):
            await Version(budget).ask(seconds=0.05)
        slow.may_run.set()
        await busy

    run(test)


def test_queue_of_a_cold_version_is_bounded(budget: Budget) -> None:
    """As many rows may wait for a cold version as for an open one."""

    async def test() -> None:
        version = Version(budget)
        version.may_open.clear()
        with pytest.raises(TooLargeError):
            version.ask(rows=QUEUE + 1)
        waiters = [version.ask() for _ in range(QUEUE)]
        with pytest.raises(UnavailableError, match="queue is full"):
            version.ask()
        version.may_open.set()
        for waiter in waiters:
            await waiter

    run(test)


def test_version_that_cannot_be_opened_says_why(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    """All who wait get 503 with the reason, and so do the next; after a moment it is tried again."""
    monkeypatch.setattr(cold, "RETRY_SECONDS", 0.5)

    async def test() -> None:
        version = Version(budget)
        version.failure = ModelRefusedError("model.onnx has sha256 1")
        for waiter in [version.ask(), version.ask()]:
            with pytest.raises(UnavailableError, match=r"the model is not ready: model\.onnx has sha256 1"):
                await waiter
        with pytest.raises(UnavailableError, match="sha256 1"):
            version.ask()
        assert (version.opened, "sha256" in version.batcher.problem, budget.used) == (1, True, 0)
        await asyncio.sleep(0.5)
        monkeypatch.setattr(cold, "RETRY_SECONDS", 0)
        version.failure = MemoryError("no")
        with pytest.raises(UnavailableError, match=r"could not be opened \(MemoryError\)"):
            await version.ask()
        version.failure = None
        await version.ask()
        assert not version.batcher.problem

    run(test)


def test_version_larger_than_the_budget_is_open_alone(budget: Budget) -> None:
    """It cannot fit, so it is opened when all others are closed."""

    async def test() -> None:
        small, large = Version(budget), Version(budget, size=100)
        await small.ask()
        await large.ask()
        assert (small.batcher.is_cold, large.batcher.is_cold) == (True, False)
        await small.ask()
        assert (small.batcher.is_cold, large.batcher.is_cold) == (False, True)

    run(test)


def test_nobody_who_waits_is_no_reason_to_open(budget: Budget) -> None:
    """A version whose requests were given up before its turn is not opened."""

    async def test() -> None:
        first, second = Version(budget), Version(budget)
        first.may_open.clear()
        kept, given_up = first.ask(), second.ask(seconds=0.03)
        with pytest.raises(DeadlineExceededError):
            await given_up
        await asyncio.sleep(0.05)
        first.may_open.set()
        await kept
        await asyncio.sleep(0.05)
        assert (first.opened, second.opened) == (1, 0)

    run(test)


def test_memory_of_a_removed_version_is_free(budget: Budget) -> None:
    """A version that is unloaded counts no more, without being closed for another."""

    async def test() -> None:
        version = Version(budget)
        await version.ask()
        assert budget.used == 10
        await asyncio.sleep(0.05)  # its batcher's last look for expired requests
        del version
        gc.collect()
        assert budget.used == 0

    run(test)


def test_versions_are_opened_at_once_while_there_is_room(budget: Budget) -> None:
    """As long as the budget lasts, versions are open from the start."""
    versions = [Version(budget) for _ in range(3)]
    for version in versions:
        version.batcher.open_now()
    assert [version.batcher.is_cold for version in versions] == [False, False, True]


def test_another_event_loop_starts_afresh(budget: Budget) -> None:
    """What was to be opened on an event loop that has ended keeps no request of the next one waiting."""
    version = Version(budget)
    version.may_open.clear()

    async def leave() -> None:
        version.ask()

    async def ask() -> None:
        assert float((await version.ask(4))[0, 0]) == 8

    run(leave)
    version.may_open.set()
    run(ask)


@pytest.mark.parametrize(
    ("inline", "heavy", "shares"),
    [(100, 0, (250, 0)), (0, 100, (0, 1000)), (100, 600, (100, 600)), (400, 400, (200, 200)), (0, 0, (0, 0))],
)
def test_budget_is_divided_by_what_everything_takes(inline: int, heavy: int, shares: tuple[int, int]) -> None:
    """Four workers and an engine share 1,000 bytes: in all, they never have more."""
    found = divide_budget(1000, 4, inline, heavy)
    assert found == shares
    assert 4 * found.worker + found.engine <= 1000
