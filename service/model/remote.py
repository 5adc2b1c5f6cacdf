"""A worker's side of an engine: the versions that are open there, and a batcher that reaches them.

`EngineClient` has two connections. Versions are opened over a blocking one, from the threads that prepare a change.
Requests and their answers travel over the other, on the event loop. When the engine ends, requests in flight are
answered 503 at once; the client then connects to the engine's successor and opens its versions there.
"""

import asyncio
import contextlib
import itertools
import math
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from service.errors import (
    DeadlineExceededError,
    ModelRefusedError,
    ServiceError,
    TooLargeError,
    UnavailableError,
)
from service.model import channel
from service.model.arena import Arena, create_arena
from service.model.batching import Waiter, give_answer
from service.model.checker import ATTEMPTS, CONNECT_SECONDS, CheckerClient, connect
from service.model.crashes import Crashes, Request
from service.model.manifest import AnyManifest, BackendName

RETRY_SECONDS = 0.05
SWEEP_SECONDS = 0.05


@dataclass(frozen=True)
class RemoteBackend:
    """What runs a version in its engine; see `service.model.backends.Backend`."""

    name: BackendName
    device: str
    provider: str


@dataclass(frozen=True)
class RemotePredictor:
    """A version that is open in an engine: what a worker knows of it."""

    manifest: AnyManifest
    backend: RemoteBackend


class RemoteBatcher:
    """Hands a version's requests to its engine, with the interface of `service.model.batching.Batcher`.

    Args:
        client: of the engine.
        fields: by which the version is opened, and opened again in another engine.
    """

    rows = 0  # the engine counts what waits there
    running = backlog = 0.0  # and watches its own calls

    def __init__(self, client: "EngineClient", fields: channel.Fields) -> None:
        self.fields = fields
        self.problem = ""  # why the engine cannot take requests, if it cannot
        self.is_refused = False  # another engine would not open the version either,
        self.retry_at = math.inf  # before this time by the monotonic clock
        self.refusal = ""  # why the engine could not open it the last time that it was asked for, if it could not
        self.is_cold = False  # whether the version is only opened there when it is asked for
        self._client = client
        self._queue_size = client.queue_size

    def submit(self, inputs: Any, deadline: float, waiter: Waiter) -> None:  # noqa: ANN401 - as `Batcher.submit`
        """Hand a request over; the waiter is given a result or a failure, once, by `deadline`.

        Raises:
            TooLargeError: the request alone has more rows than the queue.
            UnavailableError: the engine cannot take requests now.
        """
        if len(inputs) > self._queue_size:
            raise TooLargeError(
                f"the request has {len(inputs)} instances; at most {self._queue_size} are taken at once"
            )
        if self.problem:
            raise UnavailableError(self.problem)
        self._client.send(self.fields["key"], inputs, deadline, waiter)


class EngineClient:
    """One worker's connections to an engine. Opening may happen in any thread; the rest belongs to the event loop.

    Args:
        path: of the engine's socket.
        queue_size: rows of one request that an engine takes at most.
        request: has the engine started, if it is not running.
        ending: set when the worker ends; no engine is waited for then.
    """

    def __init__(self, path: Path, queue_size: int, request: Callable[[], None], ending: threading.Event) -> None:
        self.queue_size = queue_size
        self._request = request
        self._ending = ending
        self._path = path
        self._worker = f"{os.getpid()}-{id(self)}"
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._batchers: weakref.WeakSet[RemoteBatcher] = weakref.WeakSet()
        self._numbers = itertools.count()
        self._pending: dict[int, tuple[float, Waiter, Request]] = {}
        self._crashes = Crashes()
        self._writer: asyncio.StreamWriter | None = None
        self._arena: Arena | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened = asyncio.Event()  # a version is open in the engine
        self._connected = threading.Event()  # for requests
        self._is_sweeping = False

    def open(self, manifest: AnyManifest, fields: channel.Fields) -> tuple[RemotePredictor, RemoteBatcher]:
        """Have the engine verify, open and measure a version; wait for an engine that is starting.

        Raises:
            ModelRefusedError: the version fails a check, or ended the engine.
            StartError: it cannot run on the backend asked for.
        """
        holder = next(self._numbers)
        fields = fields | {"holder": holder}
        answer = self._open(fields)
        fields.pop("rival", None)  # a version stays where it is when its engine is replaced
        batcher = RemoteBatcher(self, fields)
        batcher.is_cold = answer.get("cold", False)
        self._batchers.add(batcher)
        if self._loop is None:
            self._opened.set()
        else:
            self._loop.call_soon_threadsafe(self._opened.set)
            self._connected.wait(CONNECT_SECONDS)  # so that a version that is committed can answer
        weakref.finalize(batcher, self._close, holder)
        return RemotePredictor(manifest, RemoteBackend(*answer["backend"])), batcher

    def _open(self, fields: channel.Fields) -> channel.Fields:
        answer: channel.Fields = {}
        with self._lock:
            for attempt in range(ATTEMPTS):
                try:
                    self._control = self._control or connect(self._path, self._request, self._ending)
                    channel.send(self._control, fields | {"do": "open", "id": 0, "worker": self._worker})
                    answer = channel.receive(self._control)
                    break
                except channel.ChannelClosedError:  # the engine ended meanwhile; its successor knows why
                    self._control = None
                    if attempt == ATTEMPTS - 1:
                        raise ModelRefusedError("the engine ended again and again while it opened it") from None
                    time.sleep(RETRY_SECONDS)
        if "error" in answer:
            raise channel.build_error(answer["error"])
        return answer

    def _close(self, holder: int) -> None:
        """Tell the engine that this worker no longer needs a version that it opened."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._write, {"do": "close", "id": 0, "holder": holder})

    def send(self, key: str, inputs: Any, deadline: float, waiter: Waiter) -> None:  # noqa: ANN401
        """Send a request's inputs.

        Raises:
            InvalidRequestError: it would crash the engine.
            UnavailableError: there is no engine.
        """
        self._crashes.check(key, inputs)
        writer = self._writer
        if writer is None or writer.is_closing():  # it may be closing before `run` is told
            raise UnavailableError("the engine of this model is starting; try again in a moment")
        number = next(self._numbers)
        self._pending[number] = deadline, waiter, (key, inputs)
        fields = {"do": "run", "id": number, "key": key, "deadline": deadline}
        place = None if self._arena is None else partial(self._arena.place, number)
        writer.writelines(channel.pack(fields, inputs, place))
        if not self._is_sweeping and self._loop is not None:
            self._is_sweeping = True
            self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def _write(self, fields: channel.Fields) -> None:
        if self._writer is not None:
            channel.write(self._writer, fields | {"worker": self._worker})

    async def run(self) -> None:
        """Stay connected until cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            await self._opened.wait()
            if all(batcher.is_refused for batcher in self._batchers):
                await self._wait_for_work()
                continue
            with contextlib.suppress(OSError, channel.ChannelClosedError):
                await self._run_connected()
            await asyncio.sleep(RETRY_SECONDS)

    async def _wait_for_work(self) -> None:
        """Wait until another version is opened, or one that was refused for a while may be opened again."""
        self._opened.clear()
        first = min((batcher.retry_at for batcher in self._batchers), default=math.inf)
        try:
            await asyncio.wait_for(self._opened.wait(), None if first == math.inf else first - time.monotonic())
        except TimeoutError:
            for batcher in self._batchers:
                batcher.is_refused = batcher.retry_at > time.monotonic()
            self._request()
            self._opened.set()

    async def wait_until_connected(self) -> None:
        """Wait until requests can be sent for the versions that are open, but not for long."""
        if self._batchers:
            await asyncio.get_running_loop().run_in_executor(None, self._connected.wait, CONNECT_SECONDS)

    async def _run_connected(self) -> None:
        """Connect, open again what was open in the engine before, and deliver answers until the engine ends."""
        with channel.shorten(self._path) as path:
            reader, writer = await asyncio.open_unix_connection(path, limit=channel.BUFFER_BYTES)
        self._writer = writer
        self._arena = create_arena()
        self._write({"do": "hello", "id": 0, "arena": self._arena and self._arena.describe()})
        self._connected.set()
        reopening = asyncio.create_task(self._reopen())
        try:
            while True:
                self._take(*await channel.read(reader))
        finally:
            reopening.cancel()
            self._writer = None
            if self._arena is not None:
                self._arena.close()
            self._arena = None  # whatever the engine had there
            self._connected.clear()
            writer.close()
            for batcher in self._batchers:
                if not batcher.is_refused:
                    batcher.problem = "the engine of this model is starting; try again in a moment"
            pending, self._pending = self._pending, {}
            self._crashes.lose([request for _, _, request in pending.values()])
            for _, waiter, _ in pending.values():
                give_answer(waiter, UnavailableError("the engine ended while it had this request; try again"))

    def _take(self, fields: channel.Fields, outputs: Any) -> None:  # noqa: ANN401 - array, Tensors or None
        """Take an answer, or what the engine says about a version, the arena or its predecessor."""
        if "previous_exit" in fields:
            self._crashes.judge(fields["previous_exit"])
        elif "cold" in fields:
            for batcher in [each for each in self._batchers if each.fields["key"] == fields["key"]]:
                batcher.is_cold, batcher.refusal = fields["cold"], fields["problem"]
        elif "id" in fields:
            _, waiter, _ = self._pending.pop(fields["id"], (0.0, None, None))
            if waiter is not None:
                give_answer(waiter, channel.build_error(fields["error"]) if "error" in fields else outputs)
        elif self._arena is not None and "unread" in fields:
            self._arena.release(fields["unread"])
        elif self._arena is not None:
            self._arena.close()
            self._arena = self._arena if fields["arena"] else None

    async def _reopen(self) -> None:
        """Open again what was open in the engine before; what is refused for a while, when that is over."""
        for batcher in self._batchers:
            batcher.retry_at = 0.0 if batcher.problem else math.inf
        while (first := min((batcher.retry_at for batcher in self._batchers), default=math.inf)) < math.inf:
            await asyncio.sleep(first - time.monotonic())
            for batcher in [each for each in self._batchers if each.retry_at <= time.monotonic()]:
                await self._reopen_one(batcher)

    async def _reopen_one(self, batcher: RemoteBatcher) -> None:
        batcher.retry_at = math.inf
        try:
            answer = await asyncio.get_running_loop().run_in_executor(None, self._open, batcher.fields)
            batcher.is_cold, batcher.problem, batcher.is_refused = answer.get("cold", False), "", False
        except ServiceError as error:
            batcher.is_refused = isinstance(error, ModelRefusedError)
            batcher.retry_at = getattr(error, "retry_at", 0) or math.inf
            batcher.problem = f"the model is not ready: {error}"

    def _sweep(self) -> None:
        """Answer what an engine did not answer in time, and tell it of requests that nobody waits for any more."""
        assert self._loop is not None
        now = self._loop.time()
        for number, (deadline, waiter, _) in list(self._pending.items()):
            if not waiter.answered and deadline + SWEEP_SECONDS < now:
                give_answer(waiter, DeadlineExceededError("no answer was ready by the request's deadline"))
            if waiter.answered:
                del self._pending[number]
                self._write({"do": "cancel", "id": number})
        self._is_sweeping = bool(self._pending)
        if self._is_sweeping:
            self._loop.call_later(SWEEP_SECONDS, self._sweep)


@dataclass(frozen=True)
class Engines:
    """The processes beside the workers, as one worker reaches them.

    Attributes:
        checker: where a version is opened first.
        by_name: where versions run that do not run in the workers; empty if all do.
        ending: to be set when the worker ends.
        accelerator: the name of the engine that has this worker's accelerator; empty if there is none.
    """

    checker: CheckerClient
    by_name: Mapping[str, EngineClient]
    ending: threading.Event
    accelerator: str = ""
