"""The supervisor, while its workers and engines start slowly, die, hang, ask for engines and ignore signals."""

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from service.errors import StartError
from service.hosts import supervisor
from service.hosts.supervisor import LONGEST_PAUSE, MAX_FAILURES, SETTLED_SECONDS, Supervisor, Timeouts, WorkerContext
from tests.simulation.world import START, Condition, Dead, Process, Thread, World

ENGINE = "engine-cpu"
BEAT_SECONDS, HEARTBEAT_SECONDS = 0.5, 5.0
SLACK = 0.25  # seconds that the supervisor may take for anything


class Connection:
    """Both ends of a pipe."""

    def __init__(self, scenario: "Scenario") -> None:
        self._scenario = scenario
        self.messages: list[Any] = []
        self.is_over = False

    def send(self, message: Any) -> None:
        """Send."""
        self.messages.append(message)
        self._scenario.changed.notify_all()

    def poll(self) -> bool:
        """Tell whether there is a message, or the end."""
        return bool(self.messages) or self.is_over

    def recv(self) -> Any:
        """Return the next message.

        Raises:
            EOFError: there is none.
        """
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def close(self) -> None:
        """Close this end."""


class Child:
    """In place of `multiprocessing.Process`: a worker or an engine that runs in the world."""

    def __init__(self, scenario: "Scenario", name: str, run: Callable[..., None], context: WorkerContext) -> None:
        self._scenario, self._world = scenario, scenario.world
        self.name, self.context = name, context
        self._run = run
        self.pipe: Connection = context.report_ready.func.__self__  # type: ignore[attr-defined]
        self.is_terminated = False
        self.was_killed = False
        self.ready_at = 0.0
        self.beat_at = 0.0
        self.sentinel = self

    def start(self) -> None:
        """Begin."""
        self._process = Process(self._world, self.name)
        self._process.at_end.append(self._end)
        Thread(self._process, lambda: self._run(self))
        self._scenario.record_start(self)

    def _end(self) -> None:
        self.pipe.is_over = True
        self._scenario.record_end(self)
        self._scenario.changed.notify_all()

    def poll(self) -> bool:
        """Tell whether it has ended; it is its own sentinel."""
        return not self._process.alive

    def is_alive(self) -> bool:
        """Tell whether it runs."""
        return self._process.alive

    @property
    def exitcode(self) -> int | None:
        """How it ended."""
        return None if self._process.alive else self._process.exit_code

    def exit(self, code: int) -> None:
        """End itself.

        Raises:
            Dead: always.
        """
        self._process.end(f"exits with {code}", code)
        raise Dead

    def terminate(self) -> None:
        """Have it drain."""
        self.is_terminated = True

    def kill(self) -> None:
        """End it at once."""
        self.was_killed = True
        self._process.end("is killed")

    def join(self) -> None:
        """Not wait: it has been killed."""

    close = join


class Scenario:
    """A supervisor and its children."""

    def __init__(self, world: World) -> None:
        draw = self.random = world.random
        self.world = world
        self.changed = Condition(world)
        self.children: dict[str, Child] = {}
        self.ended_at: dict[str, float] = {}
        self.exits: dict[str, int] = {}
        self.failures: dict[str, int] = {}
        self.announced = self.ended_listening = self.waits = 0
        self.outcome: Any = None
        self.is_over = False
        self.signalled_at = self.requested_at = 0.0
        self.may_give_up = False  # whether there is a reason to end the service
        self.is_impatient = False  # whether a second signal was sent
        self.hostility = draw.choice((0.0, 0.1, 0.5))  # how often a child misbehaves
        self.stubborn = draw.random() < 0.3  # children ignore SIGTERM
        self.timeouts = Timeouts(drain_delay=draw.choice((0.0, 2.0)), grace=3.0, heartbeat=HEARTBEAT_SECONDS)
        self.handlers: dict[int, Any] = {}
        self._patch()
        self.devices = ["cpu"] * draw.randrange(1, 4)
        self.process = Process(world, "supervisor")
        Thread(self.process, self._supervise)

    def _patch(self) -> None:
        world = self.world
        fork = SimpleNamespace(RawArray=lambda _, count: [0] * count, Process=self._build_child)
        signals = SimpleNamespace(
            **{name: getattr(signal, name) for name in ("SIG_BLOCK", "SIG_UNBLOCK", "SIG_IGN", "Signals")},
            signal=self.handlers.__setitem__,
            pthread_sigmask=lambda *_: None,
        )
        quiet = SimpleNamespace(share=lambda *_: None, forget_live=lambda *_: None, record_restart=lambda: None)
        for name, value in {
            "_fork": fork,
            "mp": SimpleNamespace(Pipe=lambda duplex: (Connection(self),) * 2),
            "wait": self._wait,
            "time": world.time,
            "signal": signals,
            "os": SimpleNamespace(pipe=lambda: (0, 0), fork=lambda: 1, waitpid=lambda *_: None),
            "metrics": quiet,
            "shared_metrics": quiet,
        }.items():
            if hasattr(supervisor, name):
                world.patch(supervisor, name, value)
        world.patch(supervisor.logger, "disabled", True)

    def _build_child(self, target: Any, args: tuple[Any, ...], name: str) -> Child:
        del target
        return Child(self, name, args[0], args[1])

    def _wait(self, waited: list[Any], timeout: float) -> None:
        self.waits += 1
        self.world.sleep(0.0001)  # else one that is busy would stop the clock
        if not any(each.poll() for each in waited):
            self.changed.wait(timeout)

    def _supervise(self) -> None:
        runs = Supervisor(self.run_worker, self.devices, {ENGINE: self.run_engine})
        try:
            runs.run(self._announce, self._end_listening, self.timeouts)
        except StartError as error:
            self.outcome = error
        self.is_over = True
        alive = [child.name for child in self.children.values() if child.is_alive()]
        self.world.check(not alive, f"{alive} go on without the supervisor")

    def _announce(self) -> None:
        workers = [child for name, child in self.children.items() if name != ENGINE]
        self.world.check(all(child.ready_at for child in workers), "announced before all were ready")
        self.announced += 1

    def _end_listening(self) -> None:
        self.ended_listening += 1
        drained = self.world.now >= self.signalled_at + self.timeouts.drain_delay
        alive = any(child.is_alive() for child in self.children.values())
        self.world.check(drained or not alive or self.is_impatient, "listening ended too early")

    def record_start(self, child: Child) -> None:
        """Check that a child is started when it should be."""
        check, now, name = self.world.check, self.world.now, child.name
        before = self.children.get(name)
        check(before is None or not before.is_alive(), f"two processes run as {name}")
        check(not self.signalled_at, f"{name} is started after the signal to end")
        check(child.context.previous_exit == self.exits.get(name, 0), f"{name} is told a wrong exit")
        if before is not None and self.exits[name]:
            pause = LONGEST_PAUSE if self.failures[name] else 0.0
            late = now - self.ended_at[name] - pause
            check(late <= SLACK, f"{name} is started {late:.1f} s late")
            soonest = min(supervisor.FIRST_PAUSE * 2 ** (self.failures[name] - 1), LONGEST_PAUSE)
            early = self.failures[name] and now - self.ended_at[name] < soonest
            check(not early, f"{name} is started again without a pause")
        if name == ENGINE and (before is None or not self.exits[name]):
            check(self.requested_at > self.ended_at.get(name, 0.0) - SLACK, "an engine is started that nobody needs")
        self.children[name] = child

    def record_end(self, child: Child) -> None:
        """Check that a child was not killed without a reason, and note what follows from its end."""
        now, may_kill = self.world.now, self.is_impatient or self.may_give_up
        if child.was_killed and not may_kill:
            hangs = now - child.beat_at > HEARTBEAT_SECONDS - 2
            drained = self.signalled_at and now - self.signalled_at >= self.timeouts.grace
            self.world.check(hangs or drained, f"{child.name} is killed without a reason")
        settled = child.ready_at and (child.name == ENGINE or now - child.ready_at > SETTLED_SECONDS)
        failures = self.failures[child.name] = 0 if settled else self.failures.get(child.name, 0) + 1
        if child.name != ENGINE and not self.signalled_at:
            others = [each for each in self.children.values() if each.name != ENGINE and each.ready_at]
            is_last = not any(each.is_alive() for each in others)
            self.may_give_up |= (failures >= MAX_FAILURES and is_last) or not (self.announced or child.ready_at)
        self.ended_at[child.name], self.exits[child.name] = now, child.exitcode or 0

    def run_worker(self, child: Any) -> None:
        """Be a worker: start, work, ask for the engine, hang or die."""
        draw, sleep = self.random, self.world.sleep
        sleep(draw.random() * 2)
        if draw.random() < self.hostility * (0.6 if self.announced else 0.1):
            child.exit(draw.choice((1, -9, -11)))
        self._be_ready(child)
        while not child.is_terminated:
            self._beat(child)
            if draw.random() < self.hostility * 0.1:
                child.exit(draw.choice((0, 1, -9)))
            if draw.random() < self.hostility * 0.1:  # until it is killed
                sleep(1000)
            if draw.random() < 0.05:
                self.requested_at = self.world.now
                child.context.request_engine(ENGINE)
        self._drain(child)

    def run_engine(self, child: Any) -> None:
        """Be an engine: start, work, hang, die, or have nothing left to do."""
        draw, sleep = self.random, self.world.sleep
        sleep(draw.random() * 0.5)
        if draw.random() < self.hostility:
            child.exit(-11)
        self._be_ready(child)
        for _ in range(draw.randrange(20)):
            if child.is_terminated:
                self._drain(child)
            self._beat(child)
        child.exit(draw.choice((0, 0, -9)))

    def _be_ready(self, child: Child) -> None:
        child.ready_at = child.beat_at = self.world.now
        child.context.report_ready()

    def _beat(self, child: Child) -> None:
        child.beat_at = self.world.now
        child.context.heartbeat()
        self.world.sleep(self.random.random() * BEAT_SECONDS)

    def _drain(self, child: Child) -> None:
        self.world.sleep(1000 if self.stubborn else self.random.random() * 3)
        child.exit(0)

    def stop(self) -> None:
        """Send the supervisor a signal."""
        if self.signalled_at and self.world.now - self.signalled_at >= supervisor.ECHO_SECONDS:
            self.is_impatient = True
        self.signalled_at = self.signalled_at or self.world.now
        self.handlers[signal.SIGTERM](signal.SIGTERM, None)

    def check_running(self) -> None:
        """Check that whoever should run does."""
        check, now = self.world.check, self.world.now
        if self.is_over:
            check(self.may_give_up, f"the supervisor ends without a reason: {self.outcome}")
            return
        for name, child in self.children.items():
            gone = not child.is_alive() and (self.exits[name] or name != ENGINE)
            late = now - self.ended_at.get(name, now) - LONGEST_PAUSE
            check(not gone or late < SLACK, f"{name} is not started again")
            silence = now - child.beat_at if child.is_alive() and child.ready_at else 0.0
            check(silence < 2 * HEARTBEAT_SECONDS + 3, f"{name} hangs, and is not killed")  # checks may be 2 s apart
        engine = self.children.get(ENGINE)
        is_needed = self.requested_at > self.ended_at.get(ENGINE, 0.0) + SLACK and now > self.requested_at + SLACK
        is_started = engine is not None and (engine.is_alive() or self.exits[ENGINE])
        check(is_started or not is_needed, "an engine is needed, and not started")
        check(self.waits < 20 * (now - START) + 100, "the supervisor is busy doing nothing")


def simulate(world: World) -> None:
    """Run a supervisor through the deaths of its children, then have it end."""
    scenario, draw = Scenario(world), world.random
    for _ in range(draw.randrange(1, 40)):
        world.run(draw.random() * 2)
        scenario.check_running()
    if scenario.is_over:
        return
    scenario.stop()
    if draw.random() < 0.5:  # a copy of the signal, which must not count, or a second one, which must
        world.run(draw.choice((0.1, 1.0)))
        if not scenario.is_over:
            scenario.stop()
    longest = SLACK if scenario.is_impatient else scenario.timeouts.drain_delay + scenario.timeouts.grace + 1 + SLACK
    world.run(longest, lambda: scenario.is_over)
    world.check(scenario.is_over, "the supervisor does not end")
    world.check(scenario.ended_listening == 1, f"listening was ended {scenario.ended_listening} times")
