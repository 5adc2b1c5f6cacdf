"""Adaptive batching without waiting: while one backend call runs, requests gather; the next call takes them all.

A cheap request, by the cost measured when the model was loaded, runs on the event loop together with all others that
arrived in the same turn of the loop: no thread is woken, and a lone request goes straight through. One that would hold
the loop longer than `INLINE_SECONDS`, or whose single rows take longer than `LONE_SECONDS`, goes to the model's own
thread, which takes whatever has gathered and gives way to the loop when both want the processor. Results,
errors and deadlines reach the request through its `Waiter`. One that the thread cannot answer by its deadline, by the
cost of what is ahead of it, is refused at once. This module knows arrays, not models or HTTP.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from service.errors import DeadlineExceededError, InferenceError, ServiceError, TooLargeError, UnavailableError
from service.model.backends import Array
from service.model.cost import Cost

logger = logging.getLogger("service")

INLINE_SECONDS = 0.002
LONE_SECONDS = 0.00075  # of a row; a model of dearer rows, saturated, would hold the loop all the time
NICENESS = 5  # of the thread
SWEEP_SECONDS = 0.02
SLOW_SECONDS = 0.05  # an inline call that takes so long has a cost that its rows do not tell
SHORTEST_BAN, LONGEST_BAN = 1.0, 600.0  # seconds for which its requests then all go to the thread; doubled each time
MARGIN = 0.8  # of the time to its deadline that a request may have to wait: calls may become slower meanwhile
WEIGHT = 0.1  # of the last call in the estimate of the next

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
        """Count a request that was not run: "full", "overload" or "expired"."""
        ...


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
        cost: of one `predict`; a call has no more rows than pay.
        max_batch_size: rows in one call; 1 where requests cannot share one, and each is answered as its call ends.
        queue_size: rows that may wait or run, but for those that run and that nobody waits for; a request beyond it is
            refused with 503.
        metrics: where backend calls and dropped requests are counted.
        niceness: of the thread beside the process's other threads. Linux.
    """

    def __init__(
        self,
        predict: Callable[[Any], Any],
        cost: Cost,
        max_batch_size: int,
        queue_size: int,
        metrics: Metrics,
        niceness: int = NICENESS,
    ) -> None:
        self._metrics = metrics
        self._predict = predict
        self._max_batch_size = min(max_batch_size, cost.batch)
        self._cost = replace(cost, batch=self._max_batch_size)
        self._slowdown = 1.0  # what calls in the thread take, over what was measured
        self._queue_size = queue_size
        self._inline_rows = count_inline_rows(self._cost)
        self._inline: deque[_Entry] = deque()
        self._threaded: deque[_Entry] = deque()
        self._running: list[_Entry] = []
        self._running_rows = 0
        self._began = 0.0
        self._rows = 0
        self._flushing = False
        self._sweeping = False
        self._loop: asyncio.AbstractEventLoop = _NO_LOOP
        self._ban = SHORTEST_BAN
        self._executor = ThreadPoolExecutor(1, "batch", partial(_give_way, niceness))

    @property
    def rows(self) -> int:
        """Rows that wait or run now."""
        return self._rows

    @property
    def running(self) -> float:
        """Seconds for which the call in the thread has been running; 0 when there is none."""
        return time.perf_counter() - self._began if self._running else 0.0

    @property
    def backlog(self) -> float:
        """Estimated seconds until all rows that wait or run now are answered."""
        return self._estimate(0)

    def _estimate(self, more: int) -> float:
        """Return in how many seconds `more` rows that came now would be answered."""
        started = self._cost.seconds(self._running_rows) * self._slowdown - self.running
        waiting = self._cost.seconds(self._rows - self._running_rows + more) * self._slowdown
        return max(started, 0.0) + waiting

    def submit(self, inputs: Any, deadline: float, waiter: Waiter) -> None:  # noqa: ANN401
        """Queue checked inputs float32 (N, *shape); the waiter is given a result or a failure, once, by `deadline`.

        Args:
            inputs: rows of one request.
            deadline: on the event loop's clock.
            waiter: who is told.

        Raises:
            TooLargeError: the request alone has more rows than the queue.
            UnavailableError: the queue is full, or too long to answer by `deadline`.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._move_to(loop)
        count = len(inputs)
        if self._rows + count > self._queue_size:
            if count > self._queue_size:
                raise TooLargeError(f"the request has {count} instances; at most {self._queue_size} are taken at once")
            if self._rows - self._count_abandoned() + count > self._queue_size:
                self._metrics.dropped("full")
                raise UnavailableError("the model's queue is full; try again in a moment")
        if count > self._inline_rows and self._running:
            self._check_wait(count, deadline)
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

    def _count_abandoned(self) -> int:
        """Return the rows in the thread's call that nobody waits for any more; `_sweep` drops those that wait."""
        return sum(entry.rows for entry in self._running if entry.waiter.answered)

    def _check_wait(self, count: int, deadline: float) -> None:
        """Raise UnavailableError if rows could not be answered by their deadline because of those ahead of them."""
        left = deadline - self._loop.time()
        late = self._estimate(count) - MARGIN * left
        if late > 0 and left > 0:
            self._metrics.dropped("overload")
            # In a variable here, the error and this frame would hold one another, and the request with its inputs.
            raise _build_overload(late)

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to another event loop; whoever waited on the one before, which has ended, waits no more."""
        self._loop = loop
        self._inline.clear()
        self._threaded.clear()
        self._running, self._running_rows, self._rows = [], 0, 0
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
            try:  # as in `give_answer`, less a call
                if isinstance(outcome, ServiceError):
                    entry.waiter.set_exception(outcome)
                else:
                    entry.waiter.set_result(outcome)
            except Exception:
                logger.exception("a request could not be given its answer")

    def _leave_to_thread(self) -> None:
        """Run nothing on the event loop for a while: everybody waits while something slow runs there."""
        rows, self._inline_rows = self._inline_rows, 0
        self._loop.call_later(self._ban, setattr, self, "_inline_rows", rows)
        self._ban = min(2 * self._ban, LONGEST_BAN)
        self._threaded += self._inline
        self._inline.clear()
        self._keep_thread_going()

    def _start_thread(self) -> None:
        self._running, self._running_rows = self._take(self._threaded, self._choose_limit())
        if self._running:
            self._began = time.perf_counter()
            job = self._executor.submit(_run, self._predict, self._running, self._running_rows, self._max_batch_size)
            loop = self._loop
            job.add_done_callback(lambda done: _call_loop(loop, self._finish_thread, done.result()))

    def _choose_limit(self) -> int:
        """Return how many rows the next call may have so that none who can be answered in time is made late by it.

        Those who came later would otherwise fill up the call of one who was told that it can be answered.
        """
        now, least = self._loop.time(), self._cost.seconds(1) * self._slowdown
        first = itertools.islice(self._threaded, self._max_batch_size)
        left = min((left for entry in first if (left := entry.deadline - now) > least), default=math.inf)
        longest = self._cost.seconds(self._max_batch_size) * self._slowdown
        return self._max_batch_size if left >= longest else max(1, self._cost.rows_within(left / self._slowdown))

    def _finish_thread(self, outcomes: "list[Array | ServiceError]") -> None:
        batch, rows, began, ran = self._running, self._running_rows, self._began, self.running
        # A geometric mean: one request that takes a hundred times as long does not make the next ones be refused.
        if not any(isinstance(outcome, ServiceError) for outcome in outcomes):  # a call that fails ends early
            self._slowdown *= (ran / self._cost.seconds(rows) / self._slowdown) ** WEIGHT
        self._metrics.batches.append((rows, began - batch[0].queued_at, ran))
        self._start_thread()  # first, so that the thread works while responses are written
        self._rows -= rows
        for entry, outcome in zip(batch, outcomes, strict=True):
            give_answer(entry.waiter, outcome)

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
        give_answer(entry.waiter, DeadlineExceededError("no answer was ready by the request's deadline"))


def count_inline_rows(cost: Cost) -> int:
    """Return up to how many rows of a request, and of those it shares a call with, run on the event loop."""
    return min(cost.batch, cost.rows_within(INLINE_SECONDS)) if cost.seconds(1) <= LONE_SECONDS else 0


def _build_overload(late: float) -> UnavailableError:
    error = UnavailableError("the model's queue is too long for the request's deadline; try again in a moment")
    error.retry_after = math.ceil(late)
    return error


def give_answer(waiter: Waiter, outcome: "Array | ServiceError") -> None:
    """Give a request its outcome; if that fails, log it: the others of its batch are to be answered."""
    try:
        if isinstance(outcome, ServiceError):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)
    except Exception:
        logger.exception("a request could not be given its answer")


def _give_way(niceness: int) -> None:
    """Let this thread give way to the process's others. Linux, where a thread has a priority of its own."""
    if sys.platform == "linux" and niceness:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + niceness)


def _call_loop(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object) -> None:
    """Have an event loop call back from another thread; on a loop that has ended nobody waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *arguments)


def _run(predict: Callable[[Any], Any], batch: list[_Entry], rows: int, size: int) -> "list[Array | ServiceError]":
    """Return each entry's outcome; when a batch of several fails, each is run alone, so that only a bad one fails."""
    try:
        # The inputs and outputs of a lone entry may be anything that `predict` takes and gives.
        inputs = batch[0].inputs if len(batch) == 1 else np.concatenate([entry.inputs for entry in batch])
        if rows <= size:
            outputs = predict(inputs)
        else:
            outputs = np.concatenate([predict(inputs[start : start + size]) for start in range(0, rows, size)])
        if len(batch) == 1:
            return [outputs]
        outcomes: list[Array | ServiceError] = []
        start = 0
        for entry in batch:
            outcomes.append(outputs[start : start + entry.rows])
            start += entry.rows
        return outcomes
    except BaseException as error:  # the waiters must hear of anything, also of a panic in an extension
        if len(batch) > 1:
            return [_run(predict, [entry], entry.rows, size)[0] for entry in batch]
        if isinstance(error, ServiceError):
            return [error]
        sentence = "".join(traceback.format_exception_only(error)).strip()  # also of one whose repr() fails
        return [InferenceError(sentence)]
