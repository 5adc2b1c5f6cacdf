"""An engine: the process that owns a device's models, for all workers. The checker is one that only checks.

Workers reach it over a Unix socket (see `remote`). Its batchers gather the requests of all of them, its calls use all
cores, and what a graph does to the process, at load or later, is done to the engine alone. A version stays open as
long as a connected worker holds it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from service.errors import DeviceLostError, ServiceError, StartError, UnavailableError
from service.model import channel
from service.model.arena import Borrow, open_arena
from service.model.batching import Batcher
from service.model.channel import describe_error
from service.model.checker import CHECKER, Checker, choose_rows
from service.model.cold import Budget, ColdBatcher
from service.model.memory import offer_to_oom_killer, release_memory
from service.model.opener import Opener, abandon_device
from service.model.openings import Openings, build_refusal
from service.settings import Settings
from service.telemetry.metrics import ModelMetrics

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

logger = logging.getLogger("service")

TICK_SECONDS, IDLE_TICK_SECONDS = 0.1, 1.0
IDLE_SECONDS = 10.0  # without an open version, after which an engine ends
CHECKER_IDLE_SECONDS = 2.0
NICENESS = 5  # a saturated engine gives way to the workers, which then leave it a quarter of the time
PRUNE_EVERY = 64  # requests, the answered ones are forgotten
CHECKER_OOM_SCORE, ENGINE_OOM_SCORE = 1000, 500  # whom the system ends first when memory runs out


@dataclass
class OpenVersion:
    """One version that is open, or cold within a memory budget, and who holds it.

    A holder is a worker, with a number for every time it opened the version; `backend` is what workers are told of it.
    """

    backend: channel.Fields
    batcher: Batcher | ColdBatcher
    metrics: ModelMetrics
    holders: set[tuple[str, int]] = field(default_factory=set)


class Reply:
    """The batcher's waiter for a request of a worker."""

    def __init__(self, writer: asyncio.StreamWriter, number: int) -> None:
        self.answered = False
        self._writer = writer
        self._number = number

    def set_result(self, outputs: Any, /) -> None:  # noqa: ANN401 - as `predict` gives them
        """Send the outputs."""
        self._send(channel.pack({"id": self._number}, outputs))

    def set_exception(self, error: BaseException, /) -> None:
        """Send a failure."""
        self._send(channel.pack({"id": self._number, "error": describe_error(error)}))

    def _send(self, parts: list[bytes | memoryview]) -> None:
        if not self.answered and not self._writer.is_closing():
            self._writer.writelines(parts)
        self.answered = True


class Engine:
    """Opens versions and runs them for the workers that connect.

    Args:
        settings: how to run.
        shared: the folder that all processes share; the socket is there.
        name: of the process.
        threads: CPU threads that one backend call may use.
        previous_exit: how the process of this name before this one ended, 0 where there was none.
    """

    def __init__(self, settings: Settings, shared: Path, name: str, threads: int, previous_exit: int = 0) -> None:
        self._settings = settings
        self._path = shared / f"{name}.sock"
        self._device = choose_device(name)
        self._threads = threads
        self._idle_seconds = CHECKER_IDLE_SECONDS if name == CHECKER else IDLE_SECONDS
        self._versions: dict[str, OpenVersion] = {}
        self._connections: Counter[str] = Counter()  # by worker
        self._thread = ThreadPoolExecutor(1, "open")
        self._opening: dict[str, asyncio.Future[OpenVersion]] = {}
        self._openings = Openings(shared, name, settings.open_timeout)
        self._openings.blame(previous_exit, is_alone=name == CHECKER)
        self._opener = Opener(settings, self._openings, self._device, threads)
        self._checker = Checker(settings, self._openings, threads, self._thread)
        self._budget = Budget(self._thread) if settings.memory_budget and name != CHECKER else None
        self._listeners: set[asyncio.StreamWriter] = set()  # who hears what is cold
        self._previous_exit = previous_exit
        self._is_stopping = False
        self._changed = asyncio.Event()  # there may be a reason to end
        self._idle_since = time.monotonic()

    @property
    def is_opening(self) -> bool:
        """Whether a version is being opened now."""
        is_budget_opening = self._budget is not None and self._budget.is_opening
        return bool(self._opening or self._checker.running or is_budget_opening)

    def stop(self) -> None:
        """End once the last worker has gone."""
        self._is_stopping = True
        self._changed.set()

    async def run(self, report_ready: Callable[[], None], heartbeat: Callable[[], None]) -> None:
        """Serve workers until SIGTERM and the end of the last worker, or until a backend call does not end."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop)
        server = await self._listen()
        report_ready()
        while self._versions or not self._is_over():
            self._changed.clear()
            heartbeat()
            for version in self._versions.values():
                self._idle_since = time.monotonic()
                version.metrics.write(version.batcher.rows, version.batcher.backlog)
                if version.batcher.running > self._settings.stuck_seconds:
                    logger.error("a call of model %s does not end; the engine ends", version.metrics.model)
                    os._exit(1)  # the interpreter would wait for the thread
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS if self._versions else IDLE_TICK_SECONDS):
                    await self._changed.wait()
            if not self._path.exists():  # somebody cleaned the folder away; the supervisor makes it again
                server.close()
                with contextlib.suppress(OSError):
                    server = await self._listen()
        server.close()

    async def _listen(self) -> asyncio.Server:
        self._path.unlink(missing_ok=True)
        with channel.shorten(self._path) as path:
            return await asyncio.start_unix_server(self._serve, path, limit=channel.BUFFER_BYTES)

    def _is_over(self) -> bool:
        """Tell whether to end: no worker is left after SIGTERM, or none has had anything open here for a while."""
        if self.is_opening:
            self._idle_since = time.monotonic()
        return not self._connections if self._is_stopping else time.monotonic() - self._idle_since > self._idle_seconds

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection until it ends; close what only its worker held once that has no other."""
        worker = ""
        replies: dict[int, Reply] = {}
        borrow: Borrow | None = None
        try:
            while True:
                tensors = None  # or those of the last request would count as read until the next one comes
                fields, tensors = await channel.read(reader, borrow)
                action, number = fields["do"], fields["id"]
                if not worker and "worker" in fields:
                    worker = fields["worker"]
                    self._connections[worker] += 1
                    borrow = _open_arena(fields, writer)
                if action == "run":
                    replies[number] = reply = Reply(writer, number)
                    self._run(fields, tensors, reply)
                    if number % PRUNE_EVERY == 0:
                        replies = {key: each for key, each in replies.items() if not each.answered}
                elif action == "cancel" and number in replies:
                    replies.pop(number).answered = True
                elif action in ("hello", "open", "close", "check"):
                    await self._manage(fields, worker, writer)
        except (channel.ChannelClosedError, asyncio.CancelledError):  # the worker, or this engine, ends
            for reply in replies.values():
                reply.answered = True  # nobody waits any more
        finally:
            self._connections[worker] -= 1
            if self._connections[worker] <= 0:
                del self._connections[worker]
                self._release(worker)
            if self._is_stopping:
                self._changed.set()
            self._listeners.discard(writer)
            writer.close()

    async def _manage(self, fields: channel.Fields, worker: str, writer: asyncio.StreamWriter) -> None:
        """Open, close or check versions, or tell a worker how the engine ended that it had before."""
        if fields["do"] == "hello":
            channel.write(writer, {"id": fields["id"], "previous_exit": self._previous_exit})
            self._listeners.add(writer)
        elif fields["do"] == "open":
            answer = await self._open(fields, worker)
            channel.write(writer, {"id": fields["id"]} | answer)
        elif fields["do"] == "close":
            self._release(worker, fields["holder"])
        else:
            await self._checker.check_all(fields["versions"], writer)

    def _run(self, fields: channel.Fields, tensors: Any, reply: Reply) -> None:  # noqa: ANN401 - array or Tensors
        version = self._versions.get(fields["key"])
        try:
            if version is None:
                raise UnavailableError("the model is not open in its engine; try again in a moment")
            version.batcher.submit(tensors, fields["deadline"], reply)
        except ServiceError as error:
            reply.set_exception(error)

    async def _open(self, fields: channel.Fields, worker: str) -> channel.Fields:
        """Open a version, unless it is, and let a worker hold it."""
        key = fields["key"]
        try:
            if key not in self._versions:
                loop = asyncio.get_running_loop()
                if key not in self._opening:  # else another worker has asked for it
                    self._opening[key] = loop.run_in_executor(self._thread, self._load, fields)
                try:
                    self._versions[key] = await asyncio.shield(self._opening[key])
                finally:
                    self._opening.pop(key, None)
        except Exception as error:  # whatever is wrong with one version, the engine goes on
            return {"error": describe_error(build_refusal(error, fields["name"], fields["version"]))}
        version = self._versions[key]
        version.holders.add((worker, fields["holder"]))
        return version.backend | {"cold": isinstance(version.batcher, ColdBatcher) and version.batcher.is_cold}

    def _load(self, fields: channel.Fields) -> OpenVersion:
        """Verify, open and measure a version, in the thread that opens; within a memory budget, if there is room."""
        metrics = ModelMetrics(fields["name"], fields["version"], is_shown=False)
        if self._budget is None or "share" not in fields:
            backend, batcher = self._open_batcher(fields, metrics)
            return OpenVersion(backend, batcher, metrics)
        self._budget.limit = fields["share"]
        cold = ColdBatcher(
            f"{fields['name']} version {fields['version']}",
            fields["memory"],
            lambda: self._open_batcher(fields, metrics)[1],
            self._budget,
            self._settings.queue_size,
            metrics,
            partial(self._tell, fields["key"]),
        )
        cold.open_now()
        return OpenVersion({"backend": fields["backend"]}, cold, metrics)

    def _open_batcher(self, fields: channel.Fields, metrics: ModelMetrics) -> tuple[channel.Fields, Batcher]:
        predictor, cost = self._opener.open(fields)
        release_memory()
        metrics.show()
        rows, backend = choose_rows(predictor.manifest, self._settings), predictor.backend
        predict, queue_size = self._watch(predictor.predict), self._settings.queue_size
        batcher = Batcher(predict, cost, rows, queue_size, metrics, niceness=0)  # it has the process's
        return {"backend": [backend.name, backend.device, backend.provider]}, batcher

    def _tell(self, key: str) -> None:
        """Tell the workers whether a version is cold, and why it could not be opened."""
        version = self._versions.get(key)
        if version is not None and isinstance(version.batcher, ColdBatcher):
            about = {"key": key, "cold": version.batcher.is_cold, "problem": version.batcher.problem}
            for writer in self._listeners:
                channel.write(writer, about)

    def _watch(self, predict: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return `predict` such that this process ends when a call of it loses the device."""
        if self._device == "cpu":
            return predict

        def run(inputs: Any) -> Any:  # noqa: ANN401 - as `predict`
            try:
                return predict(inputs)
            except DeviceLostError as error:
                abandon_device(self._device, error)
                raise

        return run

    def _release(self, worker: str, holder: int | None = None) -> None:
        """Let one holder of a worker, or all of them, hold nothing more; close what nobody holds."""
        for key, version in list(self._versions.items()):
            version.holders = {each for each in version.holders if each[0] != worker or holder not in (None, each[1])}
            if not version.holders:
                version.metrics.write(0)
                del self._versions[key]
                self._thread.submit(release_memory)


def choose_device(name: str) -> str:
    """Return the device of an engine by its name: "cuda:0" of "engine-cuda:0"; the checker's is "cpu"."""
    return "cpu" if name == CHECKER else name.removeprefix("engine-")


def _open_arena(fields: channel.Fields, writer: asyncio.StreamWriter) -> Borrow | None:
    """Open the arena that a worker offers, if it does, and tell it whether that could be done."""
    if not fields.get("arena"):
        return None

    def tell_unread(number: int) -> None:
        if not writer.is_closing():
            writer.writelines(channel.pack({"unread": number}))

    borrow = open_arena(fields["arena"], tell_unread)
    writer.writelines(channel.pack({"arena": borrow is not None}))
    return borrow


def run_engine(
    settings: Settings,
    shared: Path,
    name: str,
    threads: int,
    previous_exit: int,
    report_ready: Callable[[], None],
    heartbeat: Callable[[], None],
) -> None:
    """Run an engine or the checker in this process until SIGTERM, and until its workers have gone.

    Raises:
        StartError: the socket cannot be made.
    """
    is_checker = name == CHECKER
    takes_cores = not is_checker and choose_device(name) == "cpu"  # the checker measures; a GPU must be fed
    os.nice(NICENESS if takes_cores else 0)
    offer_to_oom_killer(CHECKER_OOM_SCORE if is_checker else ENGINE_OOM_SCORE)
    engine = Engine(settings, shared, name, threads, previous_exit)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(engine.run(report_ready, heartbeat))
    except OSError as error:
        raise StartError(f"{name} cannot listen in {shared}: {error.strerror or error}") from error
    if engine.is_opening:
        os._exit(0)  # the interpreter would wait for the thread
