"""Adaptive batching without waiting: while one backend call runs, requests gather; the next call takes them all.

A request that is cheap (by the cost measured when the model was loaded) is run on the event loop, together with all
others that arrived in the same turn of the loop: no thread is woken and a lone request goes straight through. One that
would hold the loop longer than `INLINE_SECONDS` goes to the model's own thread, which takes whatever has gathered.
Answers, errors and deadlines reach the request through its `Waiter`. This module knows arrays, not models or HTTP.
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
    """Who waits for a result: an `asyncio.Future`, or anything with these methods. `done()` also means gone."""

    def done(self) -> bool:
        """Tell whether an answer was given or nobody waits any more."""
        ...

    def set_result(self, result: Array, /) -> None:
        """Deliver float32 (rows of the request, K)."""
        ...

    def set_exception(self, exception: BaseException, /) -> None:
        """Deliver a failure."""
        ...


class Figures(Protocol):
    """Who is told what happens; `service.telemetry.metrics.ModelMetrics` is."""

    def batch(self, rows: int, waited: float, ran: float) -> None:
        """Note one backend call: its rows, the seconds its oldest request waited, the seconds it took."""
        ...

    def dropped(self, reason: str) -> None:
        """Note a request that was not run: "full", "expired" or "gone"."""
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
    inputs: Any  # float32 (rows, *shape), or what else has a length in rows
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
        metrics: told of every backend call, and of requests that were not run.
    """

    def __init__(
        self,
        predict: Callable[[Any], Any],
        cost: Cost,
        max_batch_size: int,
        queue_size: int,
        metrics: Figures,
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
        """Queue checked inputs float32 (N, *shape); the waiter hears of a result or a failure, once, by `deadline`.

        Args:
            inputs: rows of one request.
            deadline: on the event loop's clock.
            waiter: who is told.

        Raises:
            TooLargeError: the request alone has more rows than the queue.
            UnavailableError: the queue is full.
        """
        self._follow_loop()
        count = len(inputs)
        if self._rows + count > self._queue_size:
            if count > self._queue_size:
                raise TooLargeError(f"the request has {count} instances; at most {self._queue_size} are taken at once")
            self._metrics.dropped("full")
            raise UnavailableError("the model's queue is full; try again in a moment")
        self._rows += count
        entry = _Entry(inputs, deadline, waiter, time.perf_counter())
        if count <= self._inline_rows:
            self._inline.append(entry)
            if not self._flushing:
                self._flushing = True
                self._loop.call_soon(self._flush)
        else:
            self._threaded.append(entry)
            self._keep_thread_going()

    def _follow_loop(self) -> None:
        """Belong to the running event loop; what waited on one that has ended has nobody left to answer."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
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
        batch = self._take(self._inline, self._inline_rows)
        if self._inline:  # the rest in the loop's next turn, so that other work gets a share
            self._loop.call_soon(self._flush)
        else:
            self._flushing = False
        if batch:
            began = time.perf_counter()
            outcomes = _run(self._predict, batch, self._max_batch_size)
            if time.perf_counter() - began > SLOW_SECONDS:
                self._leave_to_thread()
            self._observe(batch, began)
            self._deliver(batch, outcomes)

    def _leave_to_thread(self) -> None:
        """Run nothing on the event loop for a while, for everybody waits while something slow does."""
        rows, self._inline_rows = self._inline_rows, 0
        self._loop.call_later(self._ban, setattr, self, "_inline_rows", rows)
        self._ban = min(2 * self._ban, LONGEST_BAN)
        self._threaded += self._inline
        self._inline.clear()
        self._keep_thread_going()

    def _start_thread(self) -> None:
        self._running = self._take(self._threaded, self._max_batch_size)
        if self._running:
            self._began = began = time.perf_counter()
            job = self._executor.submit(_run, self._predict, self._running, self._max_batch_size)
            job.add_done_callback(lambda done: self._call_loop(self._finish_thread, done.result(), began))

    def _call_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        """Have the event loop call back from another thread; a loop that has ended has nobody left to answer."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _finish_thread(self, outcomes: "list[Array | ServiceError]", began: float) -> None:
        batch, self._running = self._running, []
        self._observe(batch, began)
        self._start_thread()  # first, so that the thread works while answers are written
        self._deliver(batch, outcomes)

    def _take(self, queue: deque[_Entry], rows: int) -> list[_Entry]:
        """Take entries up to `rows` rows (at least one entry), dropping those gone or expired."""
        batch: list[_Entry] = []
        now = self._loop.time()
        taken = 0
        while queue:
            count = len(queue[0].inputs)
            if batch and taken + count > rows:
                break
            entry = queue.popleft()
            if entry.waiter.done():
                self._rows -= count
                self._note_gone(entry, now)
            elif entry.deadline < now:
                self._rows -= count
                self._expire(entry)
            else:
                batch.append(entry)
                taken += count
        return batch

    def _deliver(self, batch: list[_Entry], outcomes: "list[Array | ServiceError]") -> None:
        for entry, outcome in zip(batch, outcomes, strict=True):
            self._rows -= len(entry.inputs)
            if entry.waiter.done():
                continue
            if isinstance(outcome, ServiceError):
                entry.waiter.set_exception(outcome)
            else:
                entry.waiter.set_result(outcome)

    def _sweep(self) -> None:
        """Answer the expired, also those whose batch is still running."""
        now = self._loop.time()
        for entry in (*self._running, *self._threaded):
            if entry.deadline < now and not entry.waiter.done():
                self._expire(entry)
        if any(entry.waiter.done() for entry in self._threaded):  # make room at once
            for entry in self._threaded:
                if entry.waiter.done():
                    self._rows -= len(entry.inputs)
                    self._note_gone(entry, now)
            self._threaded = deque(entry for entry in self._threaded if not entry.waiter.done())
        self._sweeping = bool(self._running or self._threaded)
        if self._sweeping:
            self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def _note_gone(self, entry: _Entry, now: float) -> None:
        if entry.deadline >= now:  # else it has expired, and was counted as that
            self._metrics.dropped("gone")

    def _expire(self, entry: _Entry) -> None:
        self._metrics.dropped("expired")
        entry.waiter.set_exception(DeadlineExceededError("no answer was ready by the request's deadline"))

    def _observe(self, batch: list[_Entry], began: float) -> None:
        rows = sum(len(entry.inputs) for entry in batch)
        self._metrics.batch(rows, began - batch[0].queued_at, time.perf_counter() - began)


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


def _run(predict: Callable[[Any], Any], batch: list[_Entry], size: int) -> "list[Array | ServiceError]":
    """Return each entry's outcome; when a batch of several fails, each is run alone, so that a bad one fails alone."""
    try:
        if len(batch) == 1:  # its inputs and results may be anything that `predict` takes and gives
            return [_predict_in_parts(predict, batch[0].inputs, size)]
        results = _predict_in_parts(predict, np.concatenate([entry.inputs for entry in batch]), size)
    except Exception as error:  # the waiters must hear of anything that goes wrong
        if len(batch) > 1:
            return [_run(predict, [entry], size)[0] for entry in batch]
        return [error if isinstance(error, ServiceError) else InferenceError(repr(error))]
    outcomes: list[Array | ServiceError] = []
    start = 0
    for entry in batch:
        outcomes.append(results[start : start + len(entry.inputs)])
        start += len(entry.inputs)
    return outcomes


def _predict_in_parts(predict: Callable[[Array], Array], inputs: Array, size: int) -> Array:
    if len(inputs) <= size:
        return predict(inputs)
    return np.concatenate([predict(inputs[start : start + size]) for start in range(0, len(inputs), size)])
