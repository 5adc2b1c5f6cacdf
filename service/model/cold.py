"""Versions that are opened when they are asked for, and closed for others, within a budget of memory.

With `--memory-budget`, each process that runs models has a `Budget`, and a `ColdBatcher` stands in for the batcher of
each of its versions. Every version has been verified before; a cold one is a manifest and a few numbers. Its first
requests wait while a thread opens it. Where there is no room, the versions that were used least recently are closed,
but never one that has rows waiting or running.
"""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

from service.errors import DeadlineExceededError, ServiceError, TooLargeError, UnavailableError
from service.model.batching import Batcher, Metrics, Waiter, give_answer
from service.model.memory import return_large_blocks, trim_memory

logger = logging.getLogger("service")

TICK_SECONDS = 0.02  # between looks for expired requests and for room, while there is something to open
TRIM_SHARE = 0.125  # of the budget: when so much has been closed, its memory is returned to the system
RETRY_SECONDS = 1.0  # after which a version that could not be opened is tried again, if it is asked for
_NO_LOOP: Any = None  # until the first request


class Shares(NamedTuple):
    """Bytes of the budget that each worker may use for the versions in it, and the engine for its own."""

    worker: int
    engine: int


def divide_budget(budget: int, workers: int, inline: int, heavy: int) -> Shares:
    """Divide a budget in proportion to what the workers and the engine would use with every version open.

    Args:
        budget: bytes.
        workers: how many.
        inline: bytes of all versions that run in the workers, in each.
        heavy: bytes of all versions that run in the engine.
    """
    total = max(1, workers * inline + heavy)
    return Shares(budget * inline // total, budget * heavy // total)


class _Entry(NamedTuple):
    inputs: Any
    deadline: float
    waiter: Waiter


class ColdBatcher:
    """A version's batcher, or what stands in for it while the version is not open; the interface is `Batcher`'s.

    All methods but `open_now` belong to the event loop's thread.

    Args:
        name: of the version, for the log.
        size: bytes that it uses when it is open.
        load: opens it, in any thread.
        budget: of this process.
        queue_size: rows that may wait.
        metrics: where dropped requests are counted.
        on_change: called when it has been opened or closed, or could not be opened.
    """

    def __init__(
        self,
        name: str,
        size: int,
        load: Callable[[], Batcher],
        budget: "Budget",
        queue_size: int,
        metrics: Metrics,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.size = size
        self.load = load
        self.problem = ""  # why it could not be opened the last time, if it could not
        self.entries: deque[_Entry] = deque()  # requests that wait for it to be opened
        self.reference = ref(self, budget.forget)
        self._batcher: Batcher | None = None
        self._budget = budget
        self._queue_size = queue_size
        self._metrics = metrics
        self._on_change = on_change
        self._waiting_rows = 0
        self._retry_at = 0.0

    @property
    def is_cold(self) -> bool:
        """Whether the version is not open."""
        return self._batcher is None

    @property
    def rows(self) -> int:
        """Rows that wait or run now."""
        return self._waiting_rows + (self._batcher.rows if self._batcher is not None else 0)

    @property
    def running(self) -> float:
        """Seconds for which a call, or opening the version, has been running in a thread; 0 if neither is."""
        return self._batcher.running if self._batcher is not None else self._budget.measure_opening(self)

    @property
    def backlog(self) -> float:
        """Estimated seconds until all rows are answered; without the time that opening takes, which nobody knows."""
        return self._batcher.backlog if self._batcher is not None else 0.0

    def submit(self, inputs: Any, deadline: float, waiter: Waiter) -> None:  # noqa: ANN401 - as `Batcher.submit`
        """Queue inputs, and have the version opened if it is cold. See `Batcher.submit`.

        Raises:
            TooLargeError: the request alone has more rows than the queue.
            UnavailableError: the queue is full or too long, or the version could not be opened a moment ago.
        """
        if self._batcher is not None:
            self._budget.use(self)
            self._batcher.submit(inputs, deadline, waiter)
            return
        count = len(inputs)
        if count > self._queue_size:
            raise TooLargeError(f"the request has {count} instances; at most {self._queue_size} are taken at once")
        if self.problem and time.monotonic() < self._retry_at:
            raise UnavailableError(self.problem)
        if self._waiting_rows + count > self._queue_size:
            self._metrics.dropped("full")
            raise UnavailableError("the model's queue is full; try again in a moment")
        self._budget.move_to(asyncio.get_running_loop())
        self._waiting_rows += count
        self.entries.append(_Entry(inputs, deadline, waiter))
        self._budget.request(self)

    def open_now(self) -> None:
        """Open the version if there is room for it; called while it is prepared, in any thread.

        Raises:
            ServiceError: it cannot be opened.
        """
        if self._budget.has_room(self.size):
            self.adopt(self.load())

    def adopt(self, batcher: Batcher) -> None:
        """Be open, and hand over the requests that have waited."""
        self._batcher, self.problem = batcher, ""
        self._budget.use(self)
        self._on_change()
        for entry in self.take_entries():
            if not entry.waiter.answered:
                try:
                    batcher.submit(*entry)
                except ServiceError as error:
                    give_answer(entry.waiter, error)

    def fail(self, reason: str) -> None:
        """Tell those who wait that the version could not be opened."""
        self.problem = f"the model is not ready: {reason}"
        self._retry_at = time.monotonic() + RETRY_SECONDS
        logger.error("model %s cannot be opened: %s", self.name, reason)
        self._on_change()
        for entry in self.take_entries():
            give_answer(entry.waiter, UnavailableError(self.problem))

    def close(self) -> Batcher | None:
        """Be cold, and return the batcher, whose memory is freed with it; None if it is in use."""
        batcher = self._batcher
        if batcher is None or batcher.rows:
            return None
        self._batcher = None
        self._on_change()
        return batcher

    def expire(self, now: float, has_room: bool) -> None:
        """Answer those whose deadline has passed, and forget those who wait no more."""
        for entry in self.entries:
            if entry.deadline < now and not entry.waiter.answered:
                self._metrics.dropped("expired")
                late: ServiceError = DeadlineExceededError("the model was not open by the request's deadline")
                if not has_room:
                    late = UnavailableError("the models in use leave no room for this one in --memory-budget")
                give_answer(entry.waiter, late)
        if any(entry.waiter.answered for entry in self.entries):
            self.entries = deque(entry for entry in self.entries if not entry.waiter.answered)
            self._waiting_rows = sum(len(entry.inputs) for entry in self.entries)

    def take_entries(self) -> deque[_Entry]:
        """Return the requests that wait, and have none."""
        taken, self.entries, self._waiting_rows = self.entries, deque(), 0
        return taken


class Budget:
    """The memory that the open versions of one process may use. It belongs to the event loop's thread.

    Args:
        executor: of one thread, which opens versions.

    Attributes:
        limit: bytes. A version that is larger is opened when no other is open.
    """

    def __init__(self, executor: Executor) -> None:
        return_large_blocks()
        self.limit = 0
        self._executor = executor
        self._open: OrderedDict[ReferenceType[ColdBatcher], int] = OrderedDict()  # bytes; the last was used last
        self._requested: deque[ColdBatcher] = deque()
        self._opening: ColdBatcher | None = None
        self._began = 0.0
        self._closed = 0  # bytes, since memory was returned the last time
        self._is_ticking = False
        self._has_room = True
        self._loop: asyncio.AbstractEventLoop = _NO_LOOP

    @property
    def is_opening(self) -> bool:
        """Whether a version is being opened on request."""
        return self._opening is not None

    @property
    def used(self) -> int:
        """Bytes that open versions use."""
        return sum(list(self._open.values()))

    def has_room(self, size: int) -> bool:
        """Tell whether a version of that size can be opened and none has to be closed."""
        return self.used + size <= self.limit

    def measure_opening(self, cold: ColdBatcher) -> float:
        """Return for how many seconds a version has been being opened; 0 if it is not."""
        return time.perf_counter() - self._began if self._opening is cold else 0.0

    def use(self, cold: ColdBatcher) -> None:
        """Remember that an open version is used now."""
        self._open[cold.reference] = cold.size
        self._open.move_to_end(cold.reference)

    def forget(self, reference: ReferenceType[ColdBatcher]) -> None:
        """Forget a version that is no longer served."""
        self._open.pop(reference, None)

    def move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to an event loop; whoever waited on the one before, which has ended, waits no more."""
        if loop is not self._loop:
            for cold in (*self._requested, *filter(None, [self._opening])):
                cold.take_entries()
            self._loop, self._opening, self._is_ticking = loop, None, False
            self._requested.clear()

    def request(self, cold: ColdBatcher) -> None:
        """Have a version opened."""
        if cold is not self._opening and cold not in self._requested:
            self._requested.append(cold)
            self._advance()

    def _advance(self) -> None:
        """Open the next version, if there is room for it or can be made."""
        while self._requested and self._opening is None:
            cold = self._requested[0]
            if not cold.entries:  # nobody waits any more
                self._requested.popleft()
                continue
            closed = self._make_room(cold.size)
            if not self._has_room:
                break
            self._requested.popleft()
            self._opening, self._began = cold, time.perf_counter()
            must_trim = self._closed > TRIM_SHARE * self.limit
            self._closed = 0 if must_trim else self._closed
            job = self._executor.submit(_open, cold.load, closed, must_trim)
            job.add_done_callback(partial(_call, self._loop, self._finish, cold))
        if not self._is_ticking and (self._requested or self._opening is not None):
            self._is_ticking = True
            self._loop.call_later(TICK_SECONDS, self._tick)

    def _make_room(self, size: int) -> list[Batcher]:
        """Close unused versions until one of that size fits, or none is open, and return them."""
        closed: list[Batcher] = []
        used = self.used
        for reference, other in list(self._open.items()):
            if used + size <= self.limit:
                break
            cold = reference()
            batcher = cold.close() if cold is not None else None
            if batcher is not None:
                closed.append(batcher)
                self._open.pop(reference, None)
                used -= other
                self._closed += other
        self._has_room = used + size <= self.limit or not self._open
        return closed

    def _finish(self, cold: ColdBatcher, done: "Future[Batcher]") -> None:
        self._opening = None
        error = done.exception()
        if error is None:
            cold.adopt(done.result())
        elif isinstance(error, ServiceError):
            cold.fail(str(error))
        else:
            logger.error("model %s could not be opened", cold.name, exc_info=error)
            cold.fail(f"it could not be opened ({type(error).__name__}); see the log")
        self._advance()

    def _tick(self) -> None:
        self._is_ticking = False
        now = self._loop.time()
        for cold in self._requested:
            cold.expire(now, self._has_room)
        if self._opening is not None:
            self._opening.expire(now, has_room=True)
        self._advance()


def _open(load: Callable[[], Batcher], closed: list[Batcher], must_trim: bool) -> Batcher:
    closed.clear()  # so that their memory is free before more is taken
    if must_trim:
        trim_memory()
    return load()


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
        loop.call_soon_threadsafe(callback, *arguments)
