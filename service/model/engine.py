"""An engine: the process that owns a device's heavy models, for all workers.

Workers reach it over a Unix socket (see `remote`). Its batchers gather the requests of all of them, its calls use all
cores, and what a graph does to the process, at load or later, is done to the engine alone. A version stays open as
long as a connected worker holds it.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import ModelRefusedError, ServiceError, StartError, UnavailableError
from service.model import channel
from service.model.batching import Batcher
from service.model.memory import release_memory
from service.model.predictor import AnyPredictor, load_any_predictor
from service.settings import Settings
from service.telemetry.metrics import ModelMetrics

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

logger = logging.getLogger("service")

TICK_SECONDS, IDLE_TICK_SECONDS = 0.1, 1.0
IDLE_SECONDS = 10.0  # without an open version, after which an engine ends
NICENESS = 10  # a saturated engine gives way to the workers
PRUNE_EVERY = 64  # requests, the answered ones are forgotten
_OPENING, _KILLERS = "opening.json", "killers.json"


@dataclass
class OpenVersion:
    """One version that is open, and who holds it: workers, each with a number for every time it opened the version."""

    predictor: AnyPredictor
    batcher: Batcher
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
        path: of the socket.
        threads: CPU threads that one backend call may use.
        previous_exit: how the engine before this one ended, 0 where there was none.
    """

    def __init__(self, settings: Settings, path: Path, threads: int, previous_exit: int = 0) -> None:
        self._settings = settings
        self._path = path
        self._threads = threads
        self._versions: dict[str, OpenVersion] = {}
        self._connections: Counter[str] = Counter()  # by worker
        self._opener = ThreadPoolExecutor(1, "open")
        self._opening: dict[str, asyncio.Future[OpenVersion]] = {}
        self._is_stopping = False
        self._changed = asyncio.Event()  # there may be a reason to end
        self._idle_since = time.monotonic()
        self._killers = self._read_killers(previous_exit)

    def _read_killers(self, previous_exit: int) -> dict[str, list[str]]:
        """Return how engines before this one ended while they opened a version, by version."""
        killers: dict[str, list[str]] = {}
        known, opening = self._path.parent / _KILLERS, self._path.parent / _OPENING
        with contextlib.suppress(FileNotFoundError):
            killers = json.loads(known.read_bytes())
        with contextlib.suppress(FileNotFoundError):
            end = signal.Signals(-previous_exit).name if previous_exit < 0 else f"exit code {previous_exit}"
            killers.setdefault(opening.read_text(), []).append(end)
            known.write_text(json.dumps(killers))
            opening.unlink()
        return killers

    def _check_harmless(self, key: str) -> None:
        """Refuse to open what ended an engine; by SIGKILL, which may have had another reason, only the second time.

        Raises:
            ModelRefusedError: it did.
        """
        ends = self._killers.get(key, [])
        if len(ends) > 1 or (ends and ends != ["SIGKILL"]):
            raise ModelRefusedError(f"the engine was ended by {ends[-1]} while it opened it")

    def stop(self) -> None:
        """End once the last worker has gone."""
        self._is_stopping = True
        self._changed.set()

    async def run(self, report_ready: Callable[[], None], heartbeat: Callable[[], None]) -> None:
        """Serve workers until SIGTERM and the end of the last worker, or until a backend call does not end."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop)
        self._path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve, self._path, limit=channel.BUFFER_BYTES)
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
        server.close()

    def _is_over(self) -> bool:
        """Tell whether to end: no worker is left after SIGTERM, or none has had anything open here for a while."""
        if self._opening:
            self._idle_since = time.monotonic()
        return not self._connections if self._is_stopping else time.monotonic() - self._idle_since > IDLE_SECONDS

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection until it ends; close what only its worker held once that has no other."""
        worker = ""
        replies: dict[int, Reply] = {}
        try:
            while True:
                fields, tensors = await channel.read(reader)
                action, number = fields["do"], fields["id"]
                if not worker and "worker" in fields:
                    worker = fields["worker"]
                    self._connections[worker] += 1
                if action == "run":
                    replies[number] = reply = Reply(writer, number)
                    self._run(fields, tensors, reply)
                    if number % PRUNE_EVERY == 0:
                        replies = {key: each for key, each in replies.items() if not each.answered}
                elif action == "cancel" and number in replies:
                    replies.pop(number).answered = True
                elif action == "open":
                    answer = await self._open(fields, worker)
                    writer.writelines(channel.pack({"id": number} | answer))
                elif action == "close":
                    self._release(worker, fields["holder"])
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
            writer.close()

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
                    self._opening[key] = loop.run_in_executor(self._opener, self._load, fields)
                try:
                    self._versions[key] = await asyncio.shield(self._opening[key])
                finally:
                    self._opening.pop(key, None)
        except ServiceError as error:
            return {"error": describe_error(error)}
        except Exception as error:  # whatever is wrong with one version, the engine goes on
            logger.exception("model %s version %d could not be opened", fields["name"], fields["version"])
            reason = f"it could not be opened ({type(error).__name__}); see the log"
            return {"error": describe_error(ModelRefusedError(reason))}
        version = self._versions[key]
        version.holders.add((worker, fields["holder"]))
        backend = version.predictor.backend
        return {"backend": [backend.name, backend.device, backend.provider]}

    def _load(self, fields: channel.Fields) -> OpenVersion:
        """Verify, open and measure a version, in the thread that opens; leave a note of what is being opened."""
        key, settings = fields["key"], self._settings
        self._check_harmless(key)
        note = self._path.parent / _OPENING
        note.write_text(key)
        try:
            predictor = load_any_predictor(
                Path(fields["path"]), settings.backend, "cpu", self._threads, serve_as=fields["serve_as"]
            )
            rows = 1 if predictor.manifest.task == "tensors" else settings.max_batch_size
            cost = predictor.measure_cost(rows)
        finally:
            note.unlink()
            release_memory()
        metrics = ModelMetrics(fields["name"], fields["version"])
        batcher = Batcher(predictor.predict, cost, rows, settings.queue_size, metrics)
        return OpenVersion(predictor, batcher, metrics)

    def _release(self, worker: str, holder: int | None = None) -> None:
        """Let one holder of a worker, or all of them, hold nothing more; close what nobody holds."""
        for key, version in list(self._versions.items()):
            version.holders = {each for each in version.holders if each[0] != worker or holder not in (None, each[1])}
            if not version.holders:
                version.metrics.write(0)
                del self._versions[key]
                self._opener.submit(release_memory)


def describe_error(error: BaseException) -> list[Any]:
    """Return a failure as a message has it: its class, its sentence, and seconds until a retry makes sense."""
    return [type(error).__name__, str(error), getattr(error, "retry_after", 0)]


def run_engine(
    settings: Settings,
    path: Path,
    threads: int,
    previous_exit: int,
    report_ready: Callable[[], None],
    heartbeat: Callable[[], None],
) -> None:
    """Run an engine in this process until SIGTERM, and until its workers have gone.

    Raises:
        StartError: the socket cannot be made.
    """
    os.nice(NICENESS)
    engine = Engine(settings, path, threads, previous_exit)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(engine.run(report_ready, heartbeat))
    except OSError as error:
        raise StartError(f"the engine cannot listen on {path}: {error.strerror or error}") from error
