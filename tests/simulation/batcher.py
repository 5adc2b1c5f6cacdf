"""The batcher under bursts, bad rows, slow calls, callers that go away and clocks that are against it."""

import asyncio
import weakref
from functools import partial
from math import inf
from typing import Any

import numpy as np

from service.errors import DeadlineExceededError, InferenceError, TooLargeError, UnavailableError
from service.model import batching
from service.model.batching import Batcher
from service.model.cost import Cost
from tests.simulation.world import Executor, Process, World

BAD, PANIC = -13.0, -14.0  # rows that a call fails on
SLACK = 0.01  # seconds for the world's latencies
SLOWEST = 40  # times as long as expected that a call takes, and once more


class Panic(BaseException):
    """What an extension raises that panics."""


class Request:
    """A caller, as a waiter: what it sent, and what it was given."""

    def __init__(self, world: World, inputs: Any, seconds: float, breaks: bool) -> None:
        self.answered = self.is_promised = False
        self.inputs = inputs
        self.deadline = world.now + seconds
        self.outcome: Any = None
        self.reason = ""
        self.lost_at = inf  # when the process that had it ended
        self.answered_at = 0.0
        self._world, self._breaks = world, breaks

    def set_result(self, outputs: Any, /) -> None:
        """Take outputs."""
        self._take(outputs)

    def set_exception(self, error: BaseException, /) -> None:
        """Take a failure."""
        self._take(error)

    def give_up(self) -> None:
        """Go away."""
        self.answered = True

    def _take(self, outcome: Any) -> None:
        if self.answered:
            return
        self.answered, self.answered_at = True, self._world.now
        # The class of an error only: by its traceback, it keeps the request.
        is_error = isinstance(outcome, BaseException)
        self.outcome, self.reason = type(outcome) if is_error else outcome, str(outcome) if is_error else ""
        self._world.log(f"answered {self}: {type(outcome).__name__}")
        if self._breaks:
            raise ConnectionResetError("while the answer was written")

    def __str__(self) -> str:
        return f"request {self.inputs[0, 1]:.0f} ({len(self.inputs)} rows)"


class Metrics:
    """Counts what the batcher counts."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, float, float]] = []
        self.dropped_by: dict[str, int] = {"full": 0, "overload": 0, "expired": 0}

    def dropped(self, reason: str) -> None:
        """Count."""
        self.dropped_by[reason] += 1


class Model:
    """Doubles rows in simulated time; checks how it is called."""

    def __init__(self, world: World, cost: Cost, limit: int, noise: float) -> None:
        self._world, self._cost, self._limit, self._noise = world, cost, limit, noise
        self._busy: set[int] = set()
        self.slow = 0.0  # seconds in calls

    def __call__(self, inputs: Any) -> Any:
        """Return 2 * inputs."""
        world = self._world
        world.check(len(inputs) <= self._limit, f"a call has {len(inputs)} rows, not at most {self._limit}")
        thread = id(world.current)
        world.check(len(self._busy) < 2, "two calls run in threads")
        self._busy.add(thread)
        seconds = self._cost.seconds(len(inputs))
        if self._noise:
            seconds *= world.random.choice((0.5, 1.0, 1.0, 1.0, 2.0, 1.0 + SLOWEST * self._noise))
        world.log(f"call of {len(inputs)} rows takes {seconds:.4f} s")
        self.slow += seconds
        world.sleep(seconds)
        self._busy.discard(thread)
        if (inputs[:, 0] == BAD).any():
            raise InferenceError("a bad row")
        if (inputs[:, 0] == PANIC).any():
            raise Panic("a panic")
        return inputs * 2


class Scenario:
    """One worker's batcher, and those who call it."""

    def __init__(self, world: World) -> None:
        draw = world.random
        self.world = world
        world.patch(batching, "time", world.time)
        world.patch(batching, "ThreadPoolExecutor", partial(Executor, world))
        world.patch(batching.logger, "disabled", True)
        self.limit = draw.choice((1, 4, 16, 64))
        self.queue_size = draw.choice((self.limit, 20, 100))
        each = draw.choice((1e-6, 1e-4, 1e-3, 1e-2))
        self.cost = Cost(draw.choice((0.0, each, 5 * each)), each, min(self.limit, draw.choice((8, 1000))))
        self.noise = draw.choice((0.0, 0.0, 1.0))
        self.bad_rows = draw.choice((0.0, 0.05))
        self.requests: list[Request] = []
        self.sent = self.refused = 0
        self.inline_rows = batching.count_inline_rows(self.cost)
        self.late = 0.0  # how late answers may be
        self.metrics = Metrics()
        self.model = Model(world, self.cost, self.cost.batch, self.noise)
        self.batcher: Batcher
        Process(world, "worker").start_loop(self.run())

    async def run(self) -> None:
        """Send requests in bursts."""
        draw = self.world.random
        self.batcher = Batcher(self.model, self.cost, self.limit, self.queue_size, self.metrics)
        pause = draw.choice((0.2, 1.0, 3.0)) * self.cost.seconds(self.limit)
        for _ in range(draw.randrange(2, 10)):
            for _ in range(draw.choice((1, 1, 2, 8))):
                self.send(draw.choice((1, 1, 1, 2, 3, self.limit, draw.randrange(1, self.queue_size + 2))))
            await asyncio.sleep(draw.random() * pause)

    def send(self, rows: int) -> None:
        """Send one request."""
        world, draw = self.world, self.world.random
        inputs = np.empty((rows, 2), np.float32)
        inputs[:, 0] = np.arange(rows)
        inputs[:, 1] = self.sent = self.sent + 1
        if draw.random() < self.bad_rows:
            inputs[draw.randrange(rows), 0] = draw.choice((BAD, PANIC))
        patience = draw.choice((0.5, 3.0, 20.0, 200.0)) * self.cost.seconds(self.limit)
        request = Request(world, inputs, patience, breaks=draw.random() < 0.05)
        world.log(f"{request} comes, with {patience:.4f} s")
        before = self.batcher.rows - sum(each.rows for each in self.batcher._running if each.waiter.answered)
        is_behind = self.batcher.running > 0 and rows > self.inline_rows
        soonest = self.batcher.backlog + self.cost.each * rows
        world.check(0 <= before <= self.queue_size, f"{before} rows are queued, of {self.queue_size}")
        try:
            self.batcher.submit(inputs, request.deadline, request)
        except TooLargeError:
            world.check(rows > self.queue_size, f"{rows} rows are too many for {self.queue_size}")
        except UnavailableError as error:
            self.refused += 1
            is_full = before + rows > self.queue_size
            is_late = self.batcher.backlog + self.cost.seconds(rows) > 0.5 * patience
            is_late = is_late or bool(self.noise or self.bad_rows or patience < SLACK)
            world.check(is_full or (self.batcher.rows and is_late), f"{request} is refused without a reason: {error}")
        else:
            world.check(rows + before <= self.queue_size, f"{request} is accepted by a full queue")
            self.requests.append(request)
            # Requests that come later may fill up its call.
            latest = soonest + self.cost.seconds(self.cost.batch) + SLACK
            request.is_promised = is_behind and latest < patience
            world.check(self.noise or not is_behind or soonest < patience, f"{request} is accepted, and must expire")
            if draw.random() < 0.1:
                world.at(draw.random() * patience, request.give_up)

    def check_request(self, request: Request) -> None:
        """Check what a request was given."""
        check, outcome = self.world.check, request.outcome
        check(request.answered, f"{request} has no answer")
        if outcome is None:
            return  # it went away
        on_time = request.answered_at <= request.deadline + batching.SWEEP_SECONDS + SLACK + self.late
        check(on_time, f"{request} is answered {request.answered_at - request.deadline:.3f} s late")
        bad = bool((request.inputs[:, 0] < 0).any())
        if outcome is DeadlineExceededError:
            check(request.answered_at > request.deadline, f"{request} expires too early")
            check(
                self.noise or self.bad_rows or not request.is_promised,
                f"{request} was accepted behind others, and expires",
            )
        elif isinstance(outcome, type):
            check(bad and outcome is InferenceError, f"{request} fails with {outcome.__name__}")
        else:
            right = outcome.shape == request.inputs.shape and (outcome == request.inputs * 2).all()
            check(right and not bad, f"{request} is given the outputs of another")

    def check_end(self) -> None:
        """Check what is left when all requests must have been answered."""
        check, batcher = self.world.check, self.batcher
        for index in range(len(self.requests)):
            self.check_request(self.requests[index])
        check(batcher.rows == 0, f"{batcher.rows} rows are counted after the last request")
        check(batcher.running == 0 and batcher.backlog == 0, "a call counts as running after the last one")
        sizes = {len(request.inputs) for request in self.requests}
        for rows, _, _ in self.metrics.batches:
            check(rows <= self.cost.batch or rows in sizes, f"a batch has {rows} rows, not {self.cost.batch} at most")
        expired = sum(each.outcome is DeadlineExceededError for each in self.requests)
        check(self.metrics.dropped_by["expired"] == expired, "expired requests are miscounted")
        refused = self.metrics.dropped_by["full"] + self.metrics.dropped_by["overload"]
        check(refused == self.refused, "refused requests are miscounted")
        left = [weakref.ref(request) for request in self.requests]
        self.requests.clear()
        if self.bad_rows:
            return  # the frames of an error keep them until the garbage is collected
        check(not any(ref() for ref in left), "a request is kept")


def simulate(world: World) -> None:
    """Run a batcher until all its requests are answered."""
    scenario = Scenario(world)
    world.run(1000 * scenario.cost.seconds(scenario.limit) * (1 + SLOWEST * scenario.noise) + 5)
    # Whoever runs a call on the event loop makes everybody wait; the batcher promises no more than to stop soon.
    scenario.late = scenario.model.slow if scenario.noise else 0.01
    scenario.check_end()
