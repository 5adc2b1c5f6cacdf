"""The checker: a process in which a version is opened for the first time, so that its graph can hurt nothing else.

Workers send it new versions. Each is verified, opened, run on its golden samples and measured once, one after the
other. The answer says where the version is to run and what a call of it costs. It is kept, so that a worker that
starts later need not ask.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

from service.errors import ModelRefusedError
from service.model import channel
from service.model.backends import choose_backends
from service.model.channel import Fields, describe_error
from service.model.cost import Cost
from service.model.manifest import AnyManifest
from service.model.memory import estimate_memory, release_memory
from service.model.openings import Openings, build_refusal, is_quarantined
from service.model.predictor import AnyPredictor, digest_manifest, load_any_predictor, load_named_manifest
from service.settings import Settings

CHECKER = "checker"  # the process's name
MAX_INLINE_BYTES = 16 * 2**20  # of weights that every worker may hold a copy of
MAX_INLINE_SECONDS = 0.004  # that a lone row may take in a worker
ATTEMPTS = 8  # with one version; a checker that is ending may still accept connections
CONNECT_SECONDS = 10.0  # for a process that is starting
RETRY_SECONDS = 0.02


class Checker:
    """The side of the process that checks. `check` belongs to its event loop.

    Args:
        settings: how to run.
        openings: where answers are kept.
        threads: CPU threads of one backend call in an engine.
        executor: of one thread, in which versions are opened.
    """

    def __init__(self, settings: Settings, openings: Openings, threads: int, executor: Executor) -> None:
        self.running: dict[str, asyncio.Future[Fields]] = {}
        self._settings = settings
        self._openings = openings
        self._threads = threads
        self._executor = executor

    async def check_all(self, versions: Sequence[Fields], writer: asyncio.StreamWriter) -> None:
        """Send an answer for each version, in their order."""
        for version in versions:
            channel.write(writer, await self.check(version))

    async def check(self, version: Fields) -> Fields:
        """Return the answer for a version. It is checked once, however many ask, unless one asks to retry."""
        key = version["key"]
        known = self._openings.read(key)
        if known is not None and (is_quarantined(known) or not version["retry"]):
            return known
        if key not in self.running:  # else another worker has asked for it
            loop = asyncio.get_running_loop()
            self.running[key] = loop.run_in_executor(self._executor, self._check, version)
            self.running[key].add_done_callback(lambda _: self.running.pop(key))
        return await asyncio.shield(self.running[key])

    def _check(self, version: Fields) -> Fields:
        try:
            with self._openings.opening(version["key"]):
                answer = self._open(version)
        except Exception as error:  # whatever is wrong with one version, the checker goes on
            answer = {"error": describe_error(build_refusal(error, version["name"], version["version"]))}
        self._openings.write(version["key"], answer)
        return answer

    def _open(self, version: Fields) -> Fields:
        """Open a version as it would run where it belongs, and return what was found."""
        manifest = load_named_manifest(Path(version["path"]), version["serve_as"])
        is_automatic = version["placement"] == "auto"
        place = "inline" if is_automatic else version["placement"]
        if is_automatic and self._is_heavy(manifest):
            place = "engine"
        predictor, cost = self._measure(version, place)
        if is_automatic and place == "inline" and cost.seconds(1) > MAX_INLINE_SECONDS:
            place = "engine"
            predictor, cost = self._measure(version, place, verified=digest_manifest(manifest))
        backend = predictor.backend
        if manifest.artifacts[backend.name].bytes > MAX_INLINE_BYTES:
            del predictor
            release_memory()
        return {
            "place": place,
            "backend": [backend.name, backend.device, backend.provider],
            "cost": [cost.fixed, cost.each, cost.batch],
            "memory": estimate_memory(manifest.artifacts[backend.name].bytes),
            "manifest": digest_manifest(manifest),
        }

    def _is_heavy(self, manifest: AnyManifest) -> bool:
        """Tell whether a version does not belong into the workers: its weights are too large, or it takes any tensors.

        Without a task, a manifest does not say which numbers the graph can bear, and some crash a process.
        """
        backends = choose_backends(manifest, self._settings.backend)
        is_large = bool(backends) and manifest.artifacts[backends[0]].bytes > MAX_INLINE_BYTES
        return is_large or manifest.task == "tensors"

    def _measure(self, version: Fields, place: str, verified: str = "") -> tuple[AnyPredictor, Cost]:
        threads = version["threads"] if place == "inline" else self._threads
        path, backend, public_key = Path(version["path"]), self._settings.backend, self._settings.require_signature
        predictor = load_any_predictor(
            path, backend, "cpu", threads, serve_as=version["serve_as"], verified=verified, public_key=public_key
        )
        return predictor, predictor.measure_cost(choose_rows(manifest=predictor.manifest, settings=self._settings))


def choose_rows(manifest: AnyManifest, settings: Settings) -> int:
    """Return how many rows may share a call; requests with tensors of any shape cannot."""
    return 1 if manifest.task == "tensors" else settings.max_batch_size


class CheckerClient:
    """A worker's side of the checker, for the threads that prepare a change.

    Args:
        shared: the folder that all processes share.
        request: has the checker started, if it is not running.
        ending: set when the worker ends; nothing is waited for then.
    """

    def __init__(self, shared: Path, request: Callable[[], None], ending: threading.Event) -> None:
        self._path = shared / f"{CHECKER}.sock"
        self._openings = Openings(shared, CHECKER, 0)
        self._request = request
        self._ending = ending

    def check(self, versions: Sequence[Fields]) -> Iterator[Fields]:
        """Yield the checker's answer for each version, in their order, as soon as it is there.

        While the caller opens one version, the checker checks the next.
        """
        known = [self._openings.read(version["key"]) for version in versions]
        for index, answer in enumerate(known):
            if answer is not None and versions[index]["retry"] and not is_quarantined(answer):
                known[index] = None
        asked = self._ask([version for version, answer in zip(versions, known, strict=True) if answer is None])
        for answer in known:
            yield answer if answer is not None else next(asked)

    def _ask(self, versions: list[Fields]) -> Iterator[Fields]:
        attempts = 0
        while versions:
            try:
                with connect(self._path, self._request, self._ending) as connection:
                    channel.send(connection, {"do": "check", "id": 0, "versions": versions})
                    while versions:
                        answer = channel.receive(connection)
                        versions, attempts = versions[1:], 0
                        yield answer
            except channel.ChannelClosedError:  # a version ended the checker; the next checker knows which
                attempts += 1
                if attempts == ATTEMPTS:
                    yield {"error": describe_error(ModelRefusedError("the checker ended again and again"))}
                    versions, attempts = versions[1:], 0
                time.sleep(RETRY_SECONDS)
            except ModelRefusedError as error:
                yield from [{"error": describe_error(error)}] * len(versions)
                return


def connect(path: Path, request: Callable[[], None], ending: threading.Event) -> socket.socket:
    """Return a blocking connection to a process; have it started if it is not running, and wait for it.

    Raises:
        ModelRefusedError: it does not start, or this worker is ending.
    """
    until = time.monotonic() + CONNECT_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with channel.shorten(path) as short:
                connection.connect(short)
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() > until or ending.is_set():
                refusal = ModelRefusedError("the process that would open it is not running; it is tried again")
                refusal.retry_at = time.monotonic() + CONNECT_SECONDS  # the version is not at fault
                raise refusal from error
        request()
        time.sleep(RETRY_SECONDS)
