"""Adaptive batching without waiting: while one backend call runs, requests gather; the next call takes them all.

A cheap request, by the cost measured when the model was loaded, runs on the event loop together with all others that
arrived in the same turn of the loop: no thread is woken, and a lone request goes straight through. One that would hold
the loop longer than `INLINE_SECONDS` goes to the model's own thread, which takes whatever has gathered. Results,
errors and deadlines reach the request through its `Waiter`. This module knows arrays, not models or HTTP.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from service.errors import DeadlineExceededError, InferenceError, ServiceError, TooLargeError, UnavailableError
from service.model.backends import Array

INLINE_SECONDS = 0.002
SWEEP_SECONDS = 0.02
SLOW_SECONDS = 0.05  # an inline call that takes so long has a cost that its rows do not tell
SHORTEST_BAN, LONGEST_BAN = 1.0, 600.0  # seconds for which its requests then all go to the thread; doubled each time


_NO_LOOP: Any = None  # until the first request


class Waiter(Protocol):
    """Whoever waits for a result; once `answered` is true, it ignores what else it is given."""

    @property
    def answered(self) -> bool:
        """Whether an answer was given, or nobody waits any more."""
        ...

    def set_result(self, outputs: Any, /) -> None:  # noqa: ANN401 - as `predict` gives them
        """Take the outputs of the request's own rows, float32 (rows, K)."""
        ...

    def set_exception(self, error: BaseException, /) -> None:
        """Take a failure."""
        ...


class Metrics(Protocol):
    """Where backend calls and dropped requests are counted; `service.telemetry.metrics.ModelMetrics` is one."""

    batches: list[tuple[int, float, float]]

    def dropped(self, reason: str) -> None:
        """Count a request that was not run: "full" or "expired"."""
        ...


@dataclass(frozen=True)
class Cost:
    """Seconds that one backend call takes: `fixed + each * rows`."""

    fixed: float
    each: float

    def rows_within(self, seconds: float) -> int:
        """Return how many rows one call can take in `seconds`."""
        return max(0, int((seconds - self.fixed) / self.each))


class _Entry(NamedTuple):
    inputs: Any  # float32 (rows, *shape), or the tensors of one request
    rows: int
    deadline: float
    waiter: Waiter
    queued_at: float


class Batcher:
    """The queue of one model version in one worker. All methods belong to the event loop's thread.

    Args:
        predict: float32 (N, *shape) to float32 (N, K); raises ServiceError; safe in any thread.
        cost: of one `predict`.
        max_batch_size: rows in one call; 1 where requests cannot share one, and each is answered as its call ends.
        queue_size: rows that may wait or run; a request beyond it is refused with 503.
        metrics: where backend calls and dropped requests are counted.
    """

    def __init__(
        self, predict: Callable[[Any], Any], cost: Cost, max_batch_size: int, queue_size: int, metrics: Metrics
    ) -> None:
        self._metrics = metrics
        self._predict = predict
        self._max_batch_size = max_batch_size
        self._queue_size = queue_size
        self._inline_rows = min(max_batch_size, cost.rows_within(INLINE_SECONDS))
        self._inline: deque[_Entry] = deque()
        self._threaded: deque[_Entry] = deque()
        self._running: list[_Entry] = []
        self._began = 0.0
        self._rows = 0
        self._flushing = False
        self._sweeping = False
        self._loop: asyncio.AbstractEventLoop = _NO_LOOP
        self._ban = SHORTEST_BAN
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch")

    @property
    def rows(self) -> int:
        """Rows that wait or run now."""
        return self._rows

    @property
    def running(self) -> float:
        """Seconds for which the call in the thread has been running; 0 when there is none."""
        return time.perf_counter() - self._began if self._running else 0.0

    def submit(self, inputs: Any, deadline: float, waiter: Waiter) -> None:  # noqa: ANN401
        """Queue checked inputs float32 (N, *shape); the waiter is given a result or a failure, once, by `deadline`.

        Args:
            inputs: rows of one request.
            deadline: on the event loop's clock.
            waiter: who is told.

        Raises:
            TooLargeError: the request alone has more rows than the queue.
            UnavailableError: the queue is full.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._move_to(loop)
        count = len(inputs)
        if self._rows + count > self._queue_size:
            if count > self._queue_size:
                raise TooLargeError(f"the request has {count} instances; at most {self._queue_size} are taken at once")
            self._metrics.dropped("full")
            raise UnavailableError("the model's queue is full; try again in a moment")
        self._rows += count
        entry = _Entry(inputs, count, deadline, waiter, time.perf_counter())
        if count <= self._inline_rows:
            self._inline.append(entry)
            if not self._flushing:
                self._flushing = True
                loop.call_soon(self._flush)
        else:
            self._threaded.append(entry)
            self._keep_thread_going()

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to another event loop; whoever waited on the one before, which has ended, waits no more."""
        self._loop = loop
        self._inline.clear()
        self._threaded.clear()
        self._running, self._rows = [], 0
        self._flushing = self._sweeping = False

    def _keep_thread_going(self) -> None:
        if not self._running:
            self._start_thread()
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def _flush(self) -> None:
        """Run what has gathered on the event loop, and answer it."""
        batch, rows = self._take(self._inline, self._inline_rows)
        if self._inline:  # the rest in the loop's next turn, so that other work gets a share
            self._loop.call_soon(self._flush)
        else:
            self._flushing = False
        if not batch:
            return
        began = time.perf_counter()
        outcomes = _run(self._predict, batch, rows, self._max_batch_size)
        ran = time.perf_counter() - began
        if ran > SLOW_SECONDS:
            self._leave_to_thread()
        self._metrics.batches.append((rows, began - batch[0].queued_at, ran))
        self._rows -= rows
        for entry, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, ServiceError):
                entry.waiter.set_exception(outcome)
            else:
                entry.waiter.set_result(outcome)

    def _leave_to_thread(self) -> None:
        """Run nothing on the event loop for a while: everybody waits while something slow runs there."""
        rows, self._inline_rows = self._inline_rows, 0
        self._loop.call_later(self._ban, setattr, self, "_inline_rows", rows)
        self._ban = min(2 * self._ban, LONGEST_BAN)
        self._threaded += self._inline
        self._inline.clear()
        self._keep_thread_going()

    def _start_thread(self) -> None:
        self._running, rows = self._take(self._threaded, self._max_batch_size)
        if self._running:
            self._began = began = time.perf_counter()
            job = self._executor.submit(_run, self._predict, self._running, rows, self._max_batch_size)
            job.add_done_callback(lambda done: self._call_loop(self._finish_thread, done.result(), rows, began))

    def _call_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        """Have the event loop call back from another thread; on a loop that has ended nobody waits."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _finish_thread(self, outcomes: "list[Array | ServiceError]", rows: int, began: float) -> None:
        batch, self._running = self._running, []
        self._metrics.batches.append((rows, began - batch[0].queued_at, time.perf_counter() - began))
        self._start_thread()  # first, so that the thread works while responses are written
        self._rows -= rows
        for entry, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, ServiceError):
                entry.waiter.set_exception(outcome)
            else:
                entry.waiter.set_result(outcome)

    def _take(self, queue: deque[_Entry], limit: int) -> tuple[list[_Entry], int]:
        """Take entries of up to `limit` rows, at least one, dropping those given up or expired; count their rows."""
        batch: list[_Entry] = []
        now = self._loop.time()
        rows = 0
        while queue and not (batch and rows + queue[0].rows > limit):
            entry = queue.popleft()
            if entry.waiter.answered:
                self._rows -= entry.rows
            elif entry.deadline < now:
                self._rows -= entry.rows
                self._expire(entry)
            else:
                batch.append(entry)
                rows += entry.rows
        return batch, rows

    def _sweep(self) -> None:
        """Answer the expired, including those whose batch is still running."""
        now = self._loop.time()
        for entry in (*self._running, *self._threaded):
            if entry.deadline < now and not entry.waiter.answered:
                self._expire(entry)
        if any(entry.waiter.answered for entry in self._threaded):  # make room at once
            self._rows -= sum(entry.rows for entry in self._threaded if entry.waiter.answered)
            self._threaded = deque(entry for entry in self._threaded if not entry.waiter.answered)
        self._sweeping = bool(self._running or self._threaded)
        if self._sweeping:
            self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def _expire(self, entry: _Entry) -> None:
        self._metrics.dropped("expired")
        entry.waiter.set_exception(DeadlineExceededError("no answer was ready by the request's deadline"))


def measure_cost(predict: Callable[[Array], Array], shape: tuple[int, ...], rows: int) -> Cost:
    """Warm a model up and measure it on zeros: one row and `rows` rows, the best of three each."""
    one, many = (best_of_three(predict, np.zeros((count, *shape), np.float32)) for count in (1, max(2, rows)))
    each = max((many - one) / (max(2, rows) - 1), 1e-7)
    return Cost(fixed=max(one - each, 0.0), each=each)


def best_of_three(predict: Callable[[Any], Any], inputs: Any) -> float:  # noqa: ANN401 - as `Batcher` takes them
    """Return the seconds that the fastest of three calls took."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        predict(inputs)
        best = min(best, time.perf_counter() - start)
    return best


def _run(predict: Callable[[Any], Any], batch: list[_Entry], rows: int, size: int) -> "list[Array | ServiceError]":
    """Return each entry's outcome; when a batch of several fails, each is run alone, so that only a bad one fails."""
    try:
        # The inputs and outputs of a lone entry may be anything that `predict` takes and gives.
        inputs = batch[0].inputs if len(batch) == 1 else np.concatenate([entry.inputs for entry in batch])
        if rows <= size:
            outputs = predict(inputs)
        else:
            outputs = np.concatenate([predict(inputs[start : start + size]) for start in range(0, rows, size)])
    except Exception as error:  # the waiters must hear of anything that goes wrong
        if len(batch) > 1:
            return [_run(predict, [entry], entry.rows, size)[0] for entry in batch]
        return [error if isinstance(error, ServiceError) else InferenceError(repr(error))]
    if len(batch) == 1:
        return [outputs]
    outcomes: list[Array | ServiceError] = []
    start = 0
    for entry in batch:
        outcomes.append(outputs[start : start + entry.rows])
        start += entry.rows
    return outcomes
