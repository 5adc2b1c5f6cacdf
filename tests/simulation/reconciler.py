"""Workers that follow a models folder together, while it changes, callers change it, and workers crash and hang."""

import asyncio
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from service.errors import DeadlineExceededError, InvalidRequestError, ModelRefusedError, ServiceError
from service.model import batching
from service.model.batching import Batcher
from service.model.cost import Cost
from service.registry import coordination, loading, reconciler, record, registry
from service.registry.coordination import WorkerGroup, WorkerStatus
from service.registry.model_folder import ModelSettings, VersionFolder
from service.registry.reconciler import Reconciler
from service.registry.registry import Registry
from service.registry.versions import LoadedVersion, VersionKey, list_served
from service.settings import Settings
from tests.simulation.batcher import Metrics, Request
from tests.simulation.system import Lengths, SharedRecord, System, close_record
from tests.simulation.world import Executor, Process, ViolationError, World

ROOT = Path("/models")
CHANGE_SECONDS = 12.0  # after which workers go on without one that hangs
LONGEST_PAUSE = CHANGE_SECONDS + 4.0  # before a worker is started again, as where the supervisor cannot fork
QUIET = LONGEST_PAUSE + 6.0  # seconds after the last fault, in which all must come to agree
STABLE = "stable"  # a model that nobody touches


@dataclass
class Version:
    """What the folder of a version holds.

    Attributes:
        content: what it answers; another after every change.
        is_good: whether it can be served.
    """

    content: int
    is_good: bool = True


class Folder:
    """The models folder, in place of the functions that read it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.versions: dict[VersionKey, Version] = {}
        self.settings: dict[str, ModelSettings] = {}
        self.were_good: set[VersionKey] = set()
        self.is_broken = False
        self._contents = 0
        for module in (loading, reconciler):
            for function in ("scan", "list_versions", "load_settings", "save_settings"):
                if hasattr(module, function):
                    world.patch(module, function, getattr(self, function))
        world.patch(loading, "find_misplaced", lambda *_: ())

    def write(self, key: VersionKey, is_good: bool) -> None:
        """Replace the files of a version."""
        self._contents += 1
        if is_good:
            self.were_good.add(key)
        self.versions[key] = Version(self._contents, is_good or key in self.were_good)
        self.world.log(f"{key.name}/{key.version} is now {self.versions[key]}")

    def scan(self, root: Path) -> frozenset[Any]:
        """Return a stamp for every file."""
        self._read()
        found = {(f"{root}/{key.name}/{key.version}", version.content, 0) for key, version in self.versions.items()}
        return frozenset(found | {(f"{root}/{name}", 0, hash(str(each))) for name, each in self.settings.items()})

    def list_versions(self, root: Path, *_: Any, **__: Any) -> list[VersionFolder]:
        """Return every version."""
        self._read()
        return [
            VersionFolder(*key, root / key.name / str(key.version), (("manifest.json", version.content, 0),))
            for key, version in sorted(self.versions.items())
        ]

    def load_settings(self, root: Path, name: str) -> ModelSettings:
        """Return a model's settings."""
        del root
        self._read()
        return self.settings.get(name, ModelSettings())

    def save_settings(self, root: Path, name: str, changes: dict[str, Any]) -> None:
        """Change a model's settings, unless the disk is full."""
        del root
        if self.world.chance(0.2):
            raise InvalidRequestError("settings.json cannot be written: no space left on device")
        self.settings[name] = self.settings.get(name, ModelSettings()).model_copy(update=changes)

    def _read(self) -> None:
        self.world.step("reads the models folder")
        if self.is_broken:
            raise OSError(5, os.strerror(5))


class Worker:
    """One worker, across the processes that run it in turn."""

    def __init__(self, scenario: "Scenario", number: int) -> None:
        self.scenario, self.world, self.number = scenario, scenario.world, number
        self.process: Process
        self.reconciler: Reconciler | None = None  # once it serves
        self.requests: list[tuple[Request, int]] = []
        self.start()

    def start(self) -> None:
        """Start a process."""
        is_mortal = self.scenario.crashes and self.world.chance(0.7)
        steps = self.world.random.choice((3, 30, 300, 3000)) if is_mortal else 0
        self.process = Process(self.world, f"worker-{self.number}", self.world.random.randrange(steps) if steps else -1)
        self.process.at_end.append(self._end)
        self.process.start_loop(self._run())

    def _end(self) -> None:
        self.reconciler = None
        self.requests.clear()
        self.world.at(self.world.random.random() * self.scenario.pause, self.start)

    async def _run(self) -> None:
        member = self.scenario.group.join(self.number)
        member.report(WorkerStatus())
        state = member.read_state()
        served = Registry(self.scenario.settings)
        try:
            served.load(state.unloaded)
        except OSError:  # the folder cannot be read
            self.process.end("cannot start")
            return
        commit = served.commit

        def commit_and_log(change: Any) -> None:
            commit(change)
            self.world.log(f"commits {change.unloaded=} {sorted(list_served(served.models))}")

        served.commit = commit_and_log  # type: ignore[method-assign]
        self.reconciler = Reconciler(served, self.scenario.settings, member, state.generation)
        following = asyncio.create_task(self.reconciler.run())
        while True:
            await asyncio.sleep(self.world.random.random() * 2)
            if self.scenario.hangs and self.world.chance(0.05):
                self.world.log("hangs")
                self.world.sleep(self.world.random.choice((0.5, 5.0, 15.0)))
            self.request(served)
            self.world.check(not following.done(), "a worker no longer follows")

    def request(self, served: Registry) -> None:
        """Send a request to a model."""
        name = self.world.random.choice((STABLE, "a", "b"))
        try:
            loaded = served.get(name)
        except ServiceError as error:
            self.world.check(name != STABLE, f"{STABLE} is not served: {error}")
            return
        content = int(loaded.predictor.backend.device)
        request = Request(self.world, np.zeros((1, 2), np.float32), 10.0, breaks=False)
        loaded.batcher.submit(request.inputs, request.deadline, request)
        self.requests.append((request, content))

    def check_requests(self) -> None:
        """Check that each request was answered by the version that it was for."""
        for request, content in self.requests:
            if request.deadline > self.world.now:
                continue
            right = isinstance(request.outcome, np.ndarray) and request.outcome[0, 0] == content
            if not right:
                self.world.check(False, f"a request for version {content} is answered {request.outcome}")


class Scenario:
    """A host's workers, its models folder and those who change it."""

    def __init__(self, world: World) -> None:
        draw = self.random = world.random
        self.world = world
        self.crashes, self.hangs = draw.choice((False, True)), draw.random() < 0.2
        self.pause = draw.choice((1.0, 1.0, LONGEST_PAUSE))  # seconds at most until a dead worker's successor starts
        self.flaky = 0.0  # of all openings fail
        self.slow = draw.choice((0.01, 0.3, 1.0))  # seconds that opening takes at most
        system = System(world)
        self.interval = draw.choice((0.0, 1.0, 4.0))
        system.loss = draw.choice((0.0, 0.0, 0.5)) if self.interval else 0.0  # without, only rings have workers look
        self.is_calm = not (self.hangs or system.loss)
        self._patch(system)
        self.settings = Settings(models_dir=ROOT, device="cpu", backend="onnx", reload_interval=self.interval)
        self.folder = Folder(world)
        self.folder.write(VersionKey(STABLE, 1), True)
        for name in ("a", "b"):
            self.change_files(name)
        self.group = WorkerGroup(draw.randrange(1, 5))
        self.workers = [Worker(self, number) for number in range(len(self.group.statuses))]

    def _patch(self, system: System) -> None:
        world = self.world
        for module, names in (
            (coordination, {"os": system.os, "fcntl": system.fcntl, "Record": self._build_record}),
            (record, {"_LENGTH": Lengths(record._LENGTH)}),
            (reconciler, {"time": world.time, "CHANGE_SECONDS": CHANGE_SECONDS, "release_memory": lambda: None}),
            (batching, {"time": world.time, "ThreadPoolExecutor": partial(Executor, world)}),
            (registry, {"record_changes": lambda *_: None}),
            (loading.Loader, {"open_version": lambda _, folder, *__, **___: self.open_version(folder)}),
            (batching.logger, {"disabled": True}),
        ):
            for name, value in names.items():
                world.patch(module, name, value)

    def _build_record(self) -> SharedRecord:
        built = SharedRecord(self.world)
        self.world.at_close.append(partial(close_record, built))
        return built

    def open_version(self, folder: VersionFolder) -> LoadedVersion:
        """Open a version in the worker that runs, which takes time and may fail."""
        world, key = self.world, VersionKey(folder.name, folder.version)
        world.step(f"opens {key.name}/{key.version}")
        world.sleep(self.random.random() * self.slow)
        version = self.folder.versions.get(key)
        if version is None or not version.is_good or (self.flaky and self._is_new(key) and world.chance(self.flaky)):
            raise ModelRefusedError("it fails a check")
        content = version.content

        def predict(inputs: Any) -> Any:
            world.sleep(0.001)
            return inputs + content

        predictor: Any = SimpleNamespace(
            manifest=SimpleNamespace(name=key.name, version=key.version),
            backend=SimpleNamespace(name="onnx", device=str(content), provider="sim"),
        )
        metrics: Any = Metrics()
        return LoadedVersion(predictor, Batcher(predict, Cost(0.0, 0.001), 8, 100, metrics), metrics)

    def _is_new(self, key: VersionKey) -> bool:
        """Tell whether nobody serves a version, so that nobody keeps it when it fails now."""
        ready = [worker.reconciler.registry.models for worker in self.workers if worker.reconciler]
        return not any(key in list_served(models) for models in ready)

    def change_files(self, name: str) -> None:
        """Publish, replace, break or remove a version, or change the settings."""
        draw, key = self.random, VersionKey(name, self.random.randrange(1, 4))
        match draw.randrange(6):
            case 0 if key in self.folder.versions:
                del self.folder.versions[key]
            case 1:
                self.folder.settings[name] = ModelSettings(latest=draw.randrange(1, 4))
            # What is served stays so when its files turn bad, but not in a worker that starts later: left out.
            case 2 if key not in self.folder.were_good:  # it is being copied
                self.folder.write(key, False)
                self.world.at(draw.random() * 5, self.folder.write, key, True)
            case 3 if key not in self.folder.were_good:
                self.folder.write(key, False)
            case _:
                self.folder.write(key, True)

    def ask(self) -> None:
        """Ask any worker to load, unload or roll back a model."""
        ready = [worker for worker in self.workers if worker.reconciler]
        if ready:
            worker = self.random.choice(ready)
            worker.process.start_task(self._ask(worker.reconciler))  # type: ignore[arg-type]

    async def _ask(self, asked: Reconciler) -> None:
        name = self.random.choice(("a", "b"))
        action = self.random.choice((asked.load, asked.unload, asked.unload, asked.roll_back))
        self.world.log(f"{action.__name__} {name}")
        others = [worker.process for worker in self.workers if worker.reconciler]
        try:
            await action(name)
        except DeadlineExceededError as error:
            self.world.check(not self.is_calm, f"{action.__name__}: {error}")
            return
        except (ServiceError, OSError):
            return
        if action == asked.unload and self.is_calm:
            self._check_unloaded(name, others)

    def _check_unloaded(self, name: str, asked: Collection[Process]) -> None:
        """Check that no worker that was there when it was asked serves a model, unless it was loaded again."""
        if name not in self.group.join(0).read_state().unloaded:
            return
        for worker in self.workers:
            if worker.reconciler and worker.process in asked:
                model = worker.reconciler.registry.models.get(name)
                self.world.check(not model or not model.versions, f"{worker.process.name} serves {name} after unload")

    def check_agreement(self) -> list[dict[VersionKey, int]]:
        """Check that all workers serve the same, and return what each does."""
        found = []
        for worker in self.workers:
            if worker.reconciler is None:
                raise ViolationError(f"worker {worker.number} does not serve")
            served = list_served(worker.reconciler.registry.models)
            found.append({key: int(loaded.predictor.backend.device) for key, loaded in sorted(served.items())})
            self.world.log(f"worker {worker.number} serves {found[-1]}")
        self.world.check(all(each == found[0] for each in found), f"workers serve different versions: {found}")
        return found

    def check_end(self) -> None:
        """Check that all workers serve what they should, and have answered."""
        unloaded = self.group.join(0).read_state().unloaded
        expected = {
            key: version.content
            for key, version in sorted(self.folder.versions.items())
            if version.is_good and key.name not in unloaded
        }
        found = self.check_agreement()
        self.world.check(found[0] == expected, f"the workers serve {found[0]}, not {expected}")
        for worker in self.workers:
            worker.check_requests()


def simulate(world: World) -> None:
    """Run workers through changes and faults, then leave them alone until they agree."""
    scenario, draw = Scenario(world), world.random
    world.run(5.0)
    if not scenario.crashes:  # a worker that starts is not told what others could not open
        scenario.flaky = draw.choice((0.0, 0.2))
    for _ in range(draw.randrange(1, 12)):
        match draw.randrange(4):
            case 0 | 1:
                scenario.change_files(draw.choice(("a", "b")))
            case 2:
                scenario.ask()
            case 3:
                scenario.folder.is_broken = draw.random() < 0.5
        world.run(draw.choice((0.01, 0.3, 3.0)) * draw.random())
    scenario.folder.is_broken = scenario.crashes = scenario.hangs = False
    for process in world.processes.values():
        process.steps = -1
    world.run(QUIET)
    was_flaky, scenario.flaky = scenario.flaky, 0.0
    if scenario.interval:
        scenario.check_agreement()
    if was_flaky or not scenario.interval:  # what failed without a reason is tried again when asked for
        worker = scenario.workers[0]
        assert worker.reconciler is not None
        worker.process.start_task(worker.reconciler.load(STABLE))
        world.run(QUIET)
    scenario.check_end()
