"""A world in one thread: processes with threads and event loops, a clock, and crashes, all decided by a seed.

Each simulated thread is a greenlet. It runs until it sleeps, blocks or takes a step that the world may interrupt, so
the order of everything follows from the seed alone and a failing seed can be replayed.
"""

import asyncio
import contextlib
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from greenlet import getcurrent, greenlet

START = 1000.0  # on the simulated clock
PREEMPTION = 0.1  # of all steps are followed by a pause, in which others run
LATENCY = 0.0002  # seconds at most until a thread that was woken runs


class Dead(BaseException):
    """Raised in whatever a crashed process still tries to do; none of it takes effect."""


class ViolationError(AssertionError):
    """An invariant does not hold."""


class Process:
    """A simulated process: its threads and what ends with it.

    Attributes:
        steps: after so many more steps it crashes; negative for never.
        exit_code: once it has ended.
        at_end: called when it has ended.
    """

    def __init__(self, world: "World", name: str, steps: int = -1) -> None:
        self.world, self.name, self.steps = world, name, steps
        self.pid = next(world.pids)
        self.alive = True
        self.exit_code = 0
        self.at_end: list[Callable[[], None]] = []
        self.loops: list[Loop] = []
        world.processes[self.pid] = self

    def end(self, reason: str = "crashes", exit_code: int = -9) -> None:
        """End at once, by default as by SIGKILL."""
        if not self.alive:
            return
        self.alive, self.exit_code = False, exit_code
        self.world.log(f"{self.name} {reason}")
        for callback in self.at_end:
            callback()

    def start_loop(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run an event loop in a thread of its own, with one task to begin with."""
        Loop(self)
        return self.start_task(coroutine)

    def start_task(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run a coroutine on the event loop; an error of it fails the run."""

        async def run() -> None:
            try:
                await coroutine
            except Exception as error:
                self.world.fail(error)

        return self.loops[0].create_task(run())


class Thread:
    """A simulated thread of a process."""

    def __init__(self, process: Process, target: Callable[[], None], delay: float = 0.0) -> None:
        self.process = process
        self._target = target
        self.greenlet = greenlet(self._run, process.world.main)
        process.world.threads.append(self)
        process.world.at(delay, process.world.resume, self)

    def _run(self) -> None:
        try:
            self._target()
        except Dead:
            pass
        except BaseException as error:
            if self.process.alive:
                self.process.world.fail(error)


class World:
    """Runs what happens in the order of a simulated clock; what happens at one moment, in an order that the seed draws.

    Args:
        seed: decides everything.
        tracing: whether to keep a trace of what happens.
    """

    def __init__(self, seed: int, tracing: bool = False) -> None:
        self.random = random.Random(seed)
        self.now = START
        self.main = getcurrent()
        self.current: Thread | None = None
        self.pids = itertools.count(100)
        self.processes: dict[int, Process] = {}
        self.threads: list[Thread] = []
        self.trace: list[str] = []
        self.tracing = tracing
        self.system: Any = None  # what processes share, and how they reach each other;
        self.network: Any = None  # see the modules of these names
        self._events: list[tuple[float, float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self.failure: BaseException | None = None
        self.at_close: list[Callable[[], None]] = []
        self._patches: list[tuple[object, str, Any]] = []
        self.time = SimpleNamespace(
            monotonic=lambda: self.now, perf_counter=lambda: self.now, time=lambda: self.now, sleep=self.sleep
        )

    def log(self, text: str) -> None:
        """Add a line to the trace."""
        if self.tracing:
            who = self.current.process.name if self.current else "-"
            self.trace.append(f"{self.now - START:10.4f}  {who:<12} {text}")

    def fail(self, error: BaseException) -> None:
        """Have the run raise an error."""
        self.failure = self.failure or error

    def check(self, condition: object, sentence: str) -> None:
        """Record that an invariant does not hold, if it does not."""
        if not condition:
            self.log(f"VIOLATION: {sentence}")
            self.fail(ViolationError(sentence))

    def chance(self, probability: float) -> bool:
        """Draw whether something happens."""
        return self.random.random() < probability

    def patch(self, owner: object, name: str, value: Any) -> None:
        """Replace an attribute until the end of the world."""
        self._patches.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def at(self, delay: float, callback: Callable[..., None], *arguments: Any) -> None:
        """Call back after some seconds."""
        event = (self.now + delay, self.random.random(), next(self._numbers), callback, arguments)
        heapq.heappush(self._events, event)

    def run(self, seconds: float, is_done: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, until something is done or nothing is left to happen.

        Raises:
            ViolationError: an invariant does not hold.
        """
        until = self.now + seconds
        while self._events and self._events[0][0] <= until and not is_done():
            self.now, _, _, callback, arguments = heapq.heappop(self._events)
            callback(*arguments)
            if self.failure is not None:
                raise self.failure
        if not is_done():
            self.now = until

    def resume(self, thread: Thread) -> None:
        """Let a thread run until it blocks."""
        if thread.process.alive:
            self.current = thread
            thread.greenlet.switch()
            self.current = None
            asyncio._set_running_loop(None)

    def park(self) -> None:
        """Block the thread that runs until somebody resumes it."""
        thread = self.current
        if thread is None:
            raise RuntimeError("only a simulated thread can block")
        loop = asyncio._get_running_loop()
        task = asyncio.current_task(loop) if loop else None
        if task is not None:
            asyncio._leave_task(loop, task)  # type: ignore[arg-type]
        try:
            self.main.switch()
        finally:
            asyncio._set_running_loop(loop)
            if task is not None:
                asyncio._enter_task(loop, task)  # type: ignore[arg-type]
        if not thread.process.alive:
            raise Dead

    def sleep(self, seconds: float) -> None:
        """Block the thread that runs for some seconds."""
        self.at(seconds, self.resume, self.current)
        self.park()

    def step(self, text: str) -> None:
        """Let a process do something that others can see: it may crash before, or others may come first."""
        thread = self.current
        if thread is None:  # the scenario itself
            return
        process = thread.process
        if not process.alive:
            raise Dead
        if self.tracing:
            self.log(text)
        process.steps -= 1
        if process.steps == 0:
            process.end()
            raise Dead
        if self.random.random() < PREEMPTION:
            self.sleep(self.random.random() * LATENCY)

    def close(self) -> None:
        """End all processes, take apart what they have left, and undo the patches."""
        for process in self.processes.values():
            process.at_end.clear()
            process.alive = False
        for thread in self.threads:
            self.current = thread
            if thread.greenlet:  # it has begun and not ended
                thread.greenlet.throw(Dead)
            for loop in thread.process.loops:
                loop.discard()
        self.current = None
        asyncio._set_running_loop(None)
        for owner, name, value in reversed(self._patches):
            setattr(owner, name, value)
        for callback in self.at_close:
            callback()
        self._events.clear()


class Condition:
    """Threads that wait for something."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiting: dict[int, Thread] = {}
        self._numbers = itertools.count()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until notified, and tell whether that was in time."""
        number = next(self._numbers)
        assert self._world.current is not None
        self._waiting[number] = self._world.current
        woken = [True]

        def give_up() -> None:
            thread = self._waiting.pop(number, None)
            if thread is not None:
                woken[0] = False
                self._world.resume(thread)

        if timeout is not None:
            self._world.at(timeout, give_up)
        self._world.park()
        return woken[0]

    def notify_all(self) -> None:
        """Wake all that wait."""
        waiting, self._waiting = self._waiting, {}
        for thread in waiting.values():
            self._world.at(self._world.random.random() * LATENCY, self._world.resume, thread)


class Event:
    """In place of `threading.Event`."""

    def __init__(self, world: World) -> None:
        self._condition = Condition(world)
        self._is_set = False

    def is_set(self) -> bool:
        """Tell whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Set it."""
        self._is_set = True
        self._condition.notify_all()

    def clear(self) -> None:
        """Clear it."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is set."""
        return self._is_set or self._condition.wait(timeout)


class Lock:
    """In place of `threading.Lock`."""

    def __init__(self, world: World) -> None:
        self._condition = Condition(world)
        self._is_held = False

    def __enter__(self) -> bool:
        while self._is_held:
            self._condition.wait()
        self._is_held = True
        return True

    def __exit__(self, *_: object) -> None:
        self._is_held = False
        self._condition.notify_all()


class Executor:
    """In place of `ThreadPoolExecutor`, in the process that makes it."""

    def __init__(
        self, world: World, max_workers: int = 4, thread_name_prefix: str = "", initializer: object = None
    ) -> None:
        del thread_name_prefix, initializer
        assert world.current is not None
        self._world, self._process, self._free = world, world.current.process, max_workers
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> "Future[Any]":
        """Run a function in a thread."""
        future: Future[Any] = Future()
        self._jobs.append((future, lambda: function(*arguments)))
        if self._free:
            self._free -= 1
            Thread(self._process, self._work, self._world.random.random() * LATENCY)
        return future

    def _work(self) -> None:
        while self._jobs:
            future, job = self._jobs.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = job()
            except Exception as error:
                future.set_exception(error)
            else:
                if not self._process.alive:
                    raise Dead
                future.set_result(result)
        self._free += 1


class Handle:
    """A callback of a loop, as `asyncio.TimerHandle`."""

    def __init__(self, call: Callable[[], Any], when: float = 0.0) -> None:
        self.call, self._when, self._is_cancelled = call, when, False

    def cancel(self) -> None:
        """Not call it."""
        self.call, self._is_cancelled = lambda: None, True

    def cancelled(self) -> bool:
        """Tell whether it was cancelled."""
        return self._is_cancelled

    def when(self) -> float:
        """Return when it is to be called."""
        return self._when


class Loop:
    """An event loop of a process: callbacks in the order in which they were registered, as asyncio promises."""

    def __init__(self, process: Process) -> None:
        self.world, self.process = process.world, process
        self._ready: deque[Handle] = deque()
        self._is_idle = False  # its thread is about to begin
        self._tasks: list[asyncio.Task[Any]] = []
        self._executor: Any = None
        self._thread = Thread(process, self._main)
        self.at_signal: Callable[[], None] = lambda: None
        process.loops.append(self)

    def _main(self) -> None:
        self._executor = Executor(self.world)
        while True:
            asyncio._set_running_loop(self)  # type: ignore[arg-type]
            for _ in range(len(self._ready)):
                self._ready.popleft().call()
                if not self.process.alive:
                    raise Dead
            asyncio._set_running_loop(None)
            self._is_idle = not self._ready
            if not self._is_idle:
                self.world.at(self.world.random.random() * LATENCY, self.world.resume, self._thread)
            self.world.park()

    def _enqueue(self, handle: Handle) -> None:
        self._ready.append(handle)
        if self._is_idle:
            self._is_idle = False
            self.world.at(self.world.random.random() * LATENCY, self.world.resume, self._thread)

    def discard(self) -> None:
        """Take apart what is left when the world ends."""
        for task in self._tasks:
            with contextlib.suppress(BaseException):
                task.get_coro().close()
        self._tasks.clear()
        self._ready.clear()

    def time(self) -> float:
        """Return the time of the world."""
        return self.world.now

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        """Call back in the next turn."""
        call = (lambda: callback(*args)) if context is None else (lambda: context.run(callback, *args))
        handle = Handle(call)
        self._enqueue(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        """Call back at a time."""
        call = (lambda: callback(*args)) if context is None else (lambda: context.run(callback, *args))
        handle = Handle(call, when)
        self.world.at(max(0.0, when - self.world.now), self._enqueue, handle)
        return handle

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        """Call back after some seconds."""
        return self.call_at(self.world.now + delay, callback, *args, context=context)

    def create_future(self) -> "asyncio.Future[Any]":
        """Return a future of this loop."""
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None, **_: Any) -> "asyncio.Task[Any]":
        """Start a task."""
        task = asyncio.Task(
            coro,
            loop=self,  # type: ignore[arg-type]
            name=name,
            context=context,
        )
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Run a function in a thread of an executor."""
        return asyncio.wrap_future((executor or self._executor).submit(func, *args), loop=self)  # type: ignore[arg-type]

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        """Call back when there is something to read."""
        self.world.system.watch(fd, lambda: self.call_soon(callback, *args))

    def remove_reader(self, fd: Any) -> bool:
        """Call back no more."""
        self.world.system.watch(fd, None)
        return True

    def add_signal_handler(self, sig: int, callback: Callable[..., Any], *args: Any) -> None:
        """Have `at_signal` call back."""
        self.at_signal = lambda: self.call_soon(callback, *args) and None

    async def create_unix_connection(self, protocol_factory: Any, path: Any = None, **_: Any) -> Any:
        """Connect."""
        return await self.world.network.create_connection(self, protocol_factory, path)

    async def create_unix_server(self, protocol_factory: Any, path: Any = None, **_: Any) -> Any:
        """Listen."""
        return self.world.network.listen(self, protocol_factory, path)

    def get_debug(self) -> bool:
        """Return false."""
        return False

    def is_running(self) -> bool:
        """Return true."""
        return True

    def is_closed(self) -> bool:
        """Tell whether its process has ended."""
        return not self.process.alive

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Fail the run: a callback or a task must not let an error through unseen."""
        if self.process.alive and "exception" in context:
            self.world.fail(context["exception"])

    default_exception_handler = call_exception_handler
