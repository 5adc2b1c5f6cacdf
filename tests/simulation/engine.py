"""Workers, the checker and an engine: requests over sockets, while processes crash, versions kill and calls hang."""

import asyncio
import signal
import threading
from collections import Counter
from functools import partial
from math import inf
from types import SimpleNamespace
from typing import Any

import numpy as np

from service.errors import InferenceError, ModelRefusedError, ServiceError, UnavailableError
from service.model import batching, checker, engine, opener, openings, remote
from service.model.checker import CHECKER, CheckerClient
from service.model.engine import Engine
from service.model.remote import EngineClient, RemoteBatcher
from service.settings import Settings
from tests.simulation.batcher import Metrics, Request
from tests.simulation.disk import Disk, File
from tests.simulation.network import Network
from tests.simulation.system import System
from tests.simulation.world import Event, Executor, Lock, Process, World

ENGINE = "engine-cpu"
OPEN_SECONDS = 5.0  # after which opening a version is ended
STUCK = -15.0  # a row that a call never ends for
SLACK = 0.3  # seconds after which an answer is late
QUIET = 25.0  # seconds after the last fault, in which everything must work again


class Server:
    """The engine or the checker, across the processes that run it in turn; kept as the supervisor does."""

    def __init__(self, scenario: "Scenario", name: str) -> None:
        self.scenario, self.world, self.name = scenario, scenario.world, name
        self.process: Process | None = None
        self.previous_exit = 0
        self.is_due = False
        self.started_at = 0.0

    def request(self) -> None:
        """Have it started, unless it runs or is about to be."""
        if self.process is None and not self.is_due:
            self.is_due = True
            self.world.at(0.01, self._start)

    def _start(self) -> None:
        self.is_due = False
        steps = self.world.random.randrange(1000) if self.scenario.crashes and self.world.chance(0.5) else -1
        self.process = Process(self.world, self.name, steps)
        self.process.at_end.append(self._end)
        self.process.start_loop(self._run(self.process))

    async def _run(self, process: Process) -> None:
        self.world.sleep(self.world.random.random())  # imports
        shared: Any = File(self.scenario.disk)
        runs = Engine(self.scenario.settings, shared, self.name, 1, self.previous_exit)
        await runs.run(lambda: None, lambda: None)
        process.end("has nothing left to do", exit_code=0)

    def _end(self) -> None:
        assert self.process is not None
        self.scenario.count_end(self.name, self.process)
        self.previous_exit, self.process = self.process.exit_code, None
        for request in (request for worker in self.scenario.workers for request, _ in worker.requests):
            if self.name == ENGINE and not request.answered:
                request.lost_at = min(request.lost_at, self.world.now)
        if self.previous_exit:
            self.is_due = True
            self.world.at(self.world.random.random() * 0.2, self._start)


class Worker:
    """A worker process: it opens versions, sends requests, and opens again."""

    def __init__(self, scenario: "Scenario", number: int) -> None:
        self.scenario, self.world, self.number = scenario, scenario.world, number
        self.versions: dict[str, RemoteBatcher] = {}
        self.requests: list[tuple[Request, str]] = []
        self.refused_at, self.refusal = 0.0, ""
        self.suspected: set[str] = set()
        steps = self.world.random.randrange(3000) if scenario.crashes and self.world.chance(0.3) else -1
        self.process = Process(self.world, f"worker-{number}", steps)
        self.process.start_loop(self._run())

    async def _run(self) -> None:
        shared: Any = File(self.scenario.disk)
        servers, ending = self.scenario.servers, threading.Event()
        self.checks = CheckerClient(shared, servers[CHECKER].request, ending)
        self.client = EngineClient(shared / f"{ENGINE}.sock", 100, servers[ENGINE].request, ending)
        connected = asyncio.create_task(self.client.run())
        while True:
            name = self.world.random.choice(self.scenario.names)
            if name not in self.versions or self.world.chance(0.05):
                await self.open(name)
            for _ in range(self.world.random.choice((1, 1, 5))):
                self.send(self.world.random.choice(self.scenario.names))
            await asyncio.sleep(self.world.random.random() * 2)
            self.world.check(not connected.done(), "a worker no longer connects to its engine")

    async def open(self, name: str) -> None:
        """Have a version checked and opened; one that was open before stays so until then, as in a reload."""
        fields = {"key": name, "name": name, "version": 1, "path": name, "serve_as": None}
        fields |= {"placement": "engine", "threads": 1, "retry": self.world.chance(0.2)}
        loop = asyncio.get_running_loop()
        try:
            self.versions[name] = await loop.run_in_executor(None, self._open, fields)
        except ServiceError as error:
            self.world.log(f"{name} is refused: {error}")
            is_known = self.scenario.kinds[name] != "good" or self.scenario.disturbed
            self.world.check(is_known, f"{name} is refused: {error}")

    def _open(self, fields: dict[str, Any]) -> RemoteBatcher:
        (answer,) = self.checks.check([fields])
        if "error" in answer:
            raise ModelRefusedError(answer["error"][1])
        manifest: Any = None
        known = {"cost": answer["cost"], "verified": answer["manifest"]}
        return self.client.open(manifest, fields | known)[1]

    def send(self, name: str) -> None:
        """Send a request to a version, if it is open."""
        if name not in self.versions:
            return
        draw = self.world.random
        inputs = np.full((draw.randrange(1, 4), 2), float(len(self.requests)), np.float32)
        if self.scenario.crashes and draw.random() < 0.01:
            inputs[0, 0] = STUCK
        request = Request(self.world, inputs, draw.choice((0.05, 1.0, 3.0)), breaks=draw.random() < 0.05)
        try:
            self.versions[name].submit(inputs, request.deadline, request)
        except UnavailableError as error:
            self.world.log(f"{name}: {error}")
            if "while opening" in str(error):  # an engine was killed twice while it opened it, so it is suspected
                self.suspected.add(name)
            if name not in self.suspected:
                self.refused_at, self.refusal = self.world.now, f"{name}: {error}"
            return
        if self.scenario.servers[ENGINE].process is None:  # nobody has noticed yet
            request.lost_at = self.world.now
        self.requests.append((request, name))
        if draw.random() < 0.05:
            self.world.at(draw.random(), request.give_up)

    def check_end(self) -> None:
        """Check that every request was answered, by its own version, and that all versions that are open answer."""
        for request, name in self.requests:
            due = min(request.deadline, request.lost_at) + SLACK
            if due < self.world.now:
                self._check_request(request, name, due)
        since = self.world.now - QUIET / 2
        self.world.check(self.refused_at < since, f"requests are still refused: {self.refusal}")
        for request, name in self.requests:
            lost = request.deadline > since and "engine" in request.reason
            self.world.check(not lost, f"{name} still answers: {request.reason}")

    def _check_request(self, request: Request, name: str, due: float) -> None:
        outcome, right = request.outcome, request.inputs + self.scenario.names.index(name)
        is_right = outcome is None or isinstance(outcome, type) or bool((outcome == right).all())
        if not request.answered or request.answered_at > due:
            self.world.check(False, f"{request} to {name} is answered {request.answered_at - due:.2f} s late")
        is_lost = "engine ended" in request.reason and request.lost_at == inf
        if not is_right or outcome is InferenceError or is_lost or "is not open in" in request.reason:
            self.world.check(False, f"{request} to {name} is answered {outcome} {request.reason}")


class Scenario:
    """A host with workers, a checker and an engine."""

    def __init__(self, world: World) -> None:
        draw = self.random = world.random
        self.world = world
        self.crashes = draw.random() < 0.7
        self.seconds = draw.choice((0.01, 0.1))  # that a call takes for each row
        self.disk = Disk(world)
        self.disk.full = self.was_full = draw.choice((0.0, 0.0, 0.3))
        self.network, system = Network(world, self.disk), System(world)
        self.settings = Settings(request_timeout=2.5, open_timeout=OPEN_SECONDS, max_batch_size=8, queue_size=100)
        kinds = ("good", "good", "good", "refused", "killer", "endless")
        self.kinds = {name: draw.choice(kinds) for name in ("a", "b", "c")} | {"d": "good"}
        self.names = list(self.kinds)
        self.hostile: dict[Process, str] = {}  # what each process has opened last that ends it
        self.ended = Counter[str]()  # processes that each version has ended
        self.crashed = Counter[str]()  # how often each server was, by none of the versions
        self.disturbed = self.crashes or not {"killer", "endless"}.isdisjoint(self.kinds.values())
        self._patch(system)
        self.servers = {name: Server(self, name) for name in (CHECKER, ENGINE)}
        self.workers = [Worker(self, number) for number in range(draw.randrange(1, 4))]

    def _patch(self, system: System) -> None:
        world = self.world
        executor = partial(Executor, world)
        threads = SimpleNamespace(Lock=partial(Lock, world), Event=partial(Event, world))
        timer = SimpleNamespace(
            setitimer=self._set_timer, ITIMER_REAL=0, Signals=signal.Signals, SIGALRM=signal.SIGALRM
        )
        exits = SimpleNamespace(_exit=self._exit)
        opening = {"load_any_predictor": self._load}
        for module, names in (
            (batching, {"time": world.time, "ThreadPoolExecutor": executor}),
            (openings, {"signal": timer, "time": world.time}),
            (checker, {"time": world.time, "socket": self.network.socket, "release_memory": lambda: None}),
            (checker, {"load_named_manifest": self._load_manifest, "digest_manifest": lambda _: "digest"}),
            (checker, opening | {"choose_rows": lambda *_, **__: 8}),
            (opener, opening),
            (engine, {"time": world.time, "TICK_SECONDS": 0.5, "ThreadPoolExecutor": executor, "os": exits}),
            (engine, {"release_memory": lambda: None, "choose_rows": lambda *_: 8}),
            (engine, {"ModelMetrics": lambda name, version, **_: EngineMetrics(f"{name}/{version}")}),
            (remote, {"time": world.time, "threading": threads, "os": system.os, "create_arena": lambda: None}),
            (RemoteBatcher, {"__hash__": lambda self: self.fields["holder"]}),
            (batching.logger, {"disabled": True}),
        ):
            for name, value in names.items():
                world.patch(module, name, value)

    def _exit(self, code: int) -> None:
        assert self.world.current is not None
        self.world.current.process.end(f"exits with {code}", code)
        self.world.step("exits")

    def _set_timer(self, _: int, seconds: float) -> None:
        assert self.world.current is not None
        process = self.world.current.process
        process.timer = timer = object()  # type: ignore[attr-defined]
        if seconds:
            self.world.at(seconds, lambda: self._ring(process, timer))

    def _ring(self, process: Any, timer: object) -> None:
        if process.alive and process.timer is timer:
            process.end("is ended by SIGALRM", -signal.SIGALRM)

    def _load_manifest(self, path: Any, serve_as: Any) -> Any:
        del serve_as
        artifacts = {"onnx": SimpleNamespace(bytes=1)}
        return SimpleNamespace(name=str(path), task="regression", artifacts=artifacts)

    def _load(self, path: Any, *_: Any, **__: Any) -> Any:
        world, name = self.world, str(path)
        world.step(f"opens {name}")
        world.sleep(self.random.random() * 0.3)
        kind = self.kinds[name]
        assert world.current is not None
        if kind == "refused":
            raise ModelRefusedError("it fails a check")
        if kind in ("killer", "endless"):
            self.hostile[world.current.process] = name
        if kind == "killer":
            world.current.process.end("is ended by SIGSEGV", -signal.SIGSEGV)
            world.step("crashes")
        while kind == "endless":
            world.sleep(1000)
        number = self.names.index(name)

        def predict(inputs: Any) -> Any:
            world.sleep(self.seconds * len(inputs))
            while (inputs[:, 0] == STUCK).any():
                world.sleep(1000)
            return inputs + number

        backend = SimpleNamespace(name="onnx", device="cpu", provider="sim")
        cost = SimpleNamespace(fixed=0.0, each=self.seconds, batch=8)
        return SimpleNamespace(
            manifest=self._load_manifest(path, None), backend=backend, predict=predict, measure_cost=lambda _: cost
        )

    def check_end(self) -> None:
        """Check that all versions that can be served are, and that nothing else is left."""
        for worker in self.workers:
            if worker.process.alive:
                worker.check_end()
        if not self.was_full:
            for name, times in self.ended.items():
                # A crash of the checker may come before it has written down how its predecessor ended.
                self.world.check(times <= 1 + self.crashed[CHECKER], f"{name} has ended {times} processes")

    def count_end(self, server: str, process: Process) -> None:
        """Count the end of a server, by what a version did or by a crash."""
        if process.exit_code in (-signal.SIGSEGV, -signal.SIGALRM):
            self.ended[self.hostile[process]] += 1
        elif process.exit_code:
            self.crashed[server] += 1


class EngineMetrics(Metrics):
    """Counts what an engine's batcher counts."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model

    def show(self) -> None:
        """Show nothing."""

    def write(self, *_: float) -> None:
        """Forget what has gathered."""
        self.batches.clear()


def simulate(world: World) -> None:
    """Run requests through crashes, then see that everything works again, and ends with the last worker."""
    scenario, draw = Scenario(world), world.random
    world.run(draw.random() * 5)
    if scenario.crashes:
        for _ in range(draw.randrange(6)):
            server = scenario.servers[draw.choice((CHECKER, ENGINE, ENGINE))]
            if server.process:
                server.process.end("is killed")
            world.run(draw.random() * 4)
    scenario.crashes = False
    scenario.disk.full = 0.0
    for process in world.processes.values():
        process.steps = -1
    world.run(QUIET)
    scenario.check_end()
    for worker in scenario.workers:
        worker.process.end()
    world.run(engine.IDLE_SECONDS + 5)
    for name, server in scenario.servers.items():
        world.check(server.process is None and not server.is_due, f"{name} goes on without workers")
