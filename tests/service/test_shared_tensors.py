"""Tests of engines and their clients with an arena: what a request is given, and when its slots are free again."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.errors import UnavailableError
from service.model import channel, opener, remote
from service.model.arena import LEAST_BYTES, Arena, open_arena
from service.model.engine import Engine
from service.model.remote import EngineClient
from service.settings import Settings
from tests.waiter import FutureWaiter

SECONDS = 30.0
WIDE = LEAST_BYTES // 4  # of float32, in the smallest row that goes to a slot
COST = [0.01, 0.01, 64]  # of a model that runs in the batcher's thread

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there is no memfd here")


def rows(value: float) -> "np.ndarray[Any, Any]":
    """Return inputs for slots, float32 (1, WIDE)."""
    return np.full((1, WIDE), value, np.float32)


async def wait_for(found: Callable[[], object]) -> None:
    """Give the event loop turns until `found` returns a true value."""
    until = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < until
        await asyncio.sleep(0.005)


class Model:
    """A version whose calls wait until they may end: y = the sum of a row."""

    def __init__(self) -> None:
        self.calls = 0
        self.may_end = threading.Event()
        self.manifest = SimpleNamespace(task="regression")
        self.backend = remote.RemoteBackend("onnx", "cpu", "CPUExecutionProvider")

    def predict(self, inputs: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """Return float32 (N, 1)."""
        self.calls += 1
        assert self.may_end.wait(SECONDS)
        sums: np.ndarray[Any, Any] = inputs.sum(axis=1, keepdims=True)
        return sums


class Worker:
    """A worker's end of a connection to an engine, by the message."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.arena = reader, writer, Arena()

    async def greet(self) -> None:
        """Offer the arena, and open version 1."""
        arena = self.arena.describe()
        self.writer.writelines(channel.pack({"do": "hello", "id": 0, "worker": "w", "arena": arena}))
        assert [await self.read(), await self.read()] == [{"arena": True}, {"id": 0, "previous_exit": 0}]
        self.arena.close()
        version = {
            "key": "m",
            "name": "m",
            "version": 1,
            "path": "",
            "serve_as": "",
            "verified": "",
            "retry": False,
            "cost": COST,
        }
        self.writer.writelines(channel.pack({"do": "open", "id": 0, "worker": "w", "holder": 0} | version))
        assert "backend" in await self.read()

    async def read(self) -> channel.Fields:
        """Return the next message, with the first output as "sum"."""
        async with asyncio.timeout(SECONDS):
            fields, outputs = await channel.read(self.reader)
        return fields if outputs is None else fields | {"sum": float(outputs[0, 0])}

    def send(self, number: int, value: float, key: str = "m", seconds: float = SECONDS) -> None:
        """Ask for the sum of a row."""
        deadline = asyncio.get_running_loop().time() + seconds
        fields = {"do": "run", "id": number, "key": key, "deadline": deadline}
        message = channel.pack(fields, rows(value), lambda tensor: self.arena.place(number, tensor))
        assert sum(map(len, message)) < LEAST_BYTES
        self.writer.writelines(message)

    def cancel(self, number: int) -> None:
        """Give a request up."""
        self.writer.writelines(channel.pack({"do": "cancel", "id": number}))


@asynccontextmanager
async def running_engine(folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Worker]:
    """Run an engine that has the model, in this process, and connect a worker."""
    monkeypatch.setattr(opener, "load_any_predictor", lambda *_, **__: model)
    ready, process = asyncio.Event(), Engine(Settings(), folder, "engine-cpu", 1)
    running = asyncio.create_task(process.run(ready.set, lambda: None))
    await ready.wait()
    worker = Worker(*await asyncio.open_unix_connection(folder / "engine-cpu.sock"))
    await worker.greet()
    try:
        yield worker
    finally:
        model.may_end.set()
        process.stop()
        worker.writer.close()
        await asyncio.wait_for(running, SECONDS)


def play(folder: Path, monkeypatch: pytest.MonkeyPatch, scene: Callable[[Worker, Model], Awaitable[None]]) -> None:
    """Run a scene with an engine and its model."""

    async def run() -> None:
        model = Model()
        async with running_engine(folder, model, monkeypatch) as worker:
            await scene(worker, model)

    asyncio.run(run())


def test_engine_reads_slots_and_says_when_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answered request's slots are free, whether it was alone in its call or not, and one that was refused."""

    async def scene(worker: Worker, model: Model) -> None:
        model.may_end.set()
        for value in (1.0, 2.0):
            worker.send(1, value)
            assert [await worker.read(), await worker.read()] == [{"id": 1, "sum": WIDE * value}, {"unread": 1}]
        for number in range(8):
            worker.send(number, float(number))
        found = [await worker.read() for _ in range(16)]
        assert sorted(each["sum"] for each in found if "sum" in each) == [WIDE * float(each) for each in range(8)]
        assert sorted(each["unread"] for each in found if "unread" in each) == list(range(8))
        worker.send(9, 1.0, key="another")
        found = [await worker.read(), await worker.read()]
        assert (found[0]["error"][0], found[1]) == ("UnavailableError", {"unread": 9})

    play(tmp_path, monkeypatch, scene)


def test_slots_of_a_running_call_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request given up, or late, keeps its slots while its call runs; one that waited has its own free at once."""

    async def scene(worker: Worker, model: Model) -> None:
        worker.send(1, 1.0)
        await wait_for(lambda: model.calls)
        worker.send(2, 2.0)
        worker.send(3, 3.0)
        worker.cancel(1)
        worker.cancel(2)
        assert await worker.read() == {"unread": 2}
        model.may_end.set()
        found = [await worker.read() for _ in range(3)]
        assert {"id": 3, "sum": WIDE * 3.0} in found
        assert sorted(each["unread"] for each in found if "unread" in each) == [1, 3]

    play(tmp_path, monkeypatch, scene)


def test_late_answer_does_not_free_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure at a request's deadline comes while its call still reads, so it says nothing about the slots."""

    async def scene(worker: Worker, model: Model) -> None:
        worker.send(1, 1.0, seconds=0.2)
        assert (await worker.read())["error"][0] == "DeadlineExceededError"
        assert model.calls == 1
        model.may_end.set()
        assert await worker.read() == {"unread": 1}

    play(tmp_path, monkeypatch, scene)


def test_worker_that_ends_takes_its_arena_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call goes on reading in the arena of a worker that has gone, and other workers are served."""

    async def scene(worker: Worker, model: Model) -> None:
        other = Worker(*await asyncio.open_unix_connection(tmp_path / "engine-cpu.sock"))
        await other.greet()
        other.send(1, 1.0)
        await wait_for(lambda: model.calls)
        other.writer.close()
        del other
        worker.send(1, 5.0)
        await asyncio.sleep(0.05)
        model.may_end.set()
        assert await worker.read() == {"id": 1, "sum": WIDE * 5.0}

    play(tmp_path, monkeypatch, scene)


class FakeEngine:
    """An engine by the message: it keeps requests until it is told to answer."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "engine.sock"
        self.opens_arena = True
        self.requests: dict[int, Any] = {}
        self.placed = 0  # requests whose tensors were not in their messages
        self.connections = self.ended = 0
        self.writer: asyncio.StreamWriter | None = None
        self._borrow: Any = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take messages until the worker, or `drop`, ends the connection."""
        self.writer = writer
        self.connections += 1
        try:
            while True:
                fields, tensors = await channel.read(reader, self._count)
                if fields["do"] == "hello":
                    self._borrow = open_arena(fields["arena"], lambda _: None) if self.opens_arena else None
                    writer.writelines(channel.pack({"arena": self._borrow is not None}))
                elif fields["do"] == "run":
                    self.requests[fields["id"]] = tensors
        except channel.ChannelClosedError:
            writer.close()
            self.ended += 1

    def _count(self, number: int) -> Any:
        self.placed += 1
        return self._borrow(number)

    def say(self, fields: channel.Fields, outputs: Any = None) -> None:
        """Send a message."""
        assert self.writer is not None
        self.writer.writelines(channel.pack(fields, outputs))


@asynccontextmanager
async def running_client(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[EngineClient, FakeEngine]]:
    """Connect a worker's client to a fake engine, in which it has opened a version."""
    fake = FakeEngine(folder)
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"".join(channel.pack({"id": 0, "backend": ["onnx", "cpu", "x"]})))
        monkeypatch.setattr(remote, "connect", lambda *_: here)
        client = EngineClient(fake.path, 64, lambda: None, threading.Event())
        server = await asyncio.start_unix_server(fake.serve, fake.path)
        running = asyncio.create_task(client.run())
        await asyncio.sleep(0)
        manifest: Any = None
        version = await asyncio.to_thread(client.open, manifest, {"key": "m"})
        await wait_for(lambda: fake.writer)
        try:
            yield client, fake
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            server.close()
            await wait_for(lambda: fake.ended == fake.connections)
            del version


async def ask(client: EngineClient, value: float) -> FutureWaiter:
    """Send a row, and return its waiter."""
    waiter = FutureWaiter()
    client.send("m", rows(value), asyncio.get_running_loop().time() + SECONDS, waiter)
    return waiter


def test_client_reuses_slots_only_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests beyond the arena go through the socket, an answer frees nothing, and what the engine reads is right."""
    monkeypatch.setattr(remote, "create_arena", lambda: Arena(4 * LEAST_BYTES))

    async def run() -> None:
        async with running_client(tmp_path, monkeypatch) as (client, fake):
            await wait_until_opened(client, fake)
            waiters = [await ask(client, float(value)) for value in range(6)]
            await wait_for(lambda: len(fake.requests) == 6)
            assert fake.placed == 4
            first, *_, last = fake.requests
            for number, value in zip(fake.requests, range(6), strict=True):
                assert np.array_equal(fake.requests[number], rows(value))
                fake.say({"id": number}, np.array([[value]], np.float32))
            assert [(await waiter).item() for waiter in waiters] == list(range(6))
            waiter = await ask(client, 7.0)
            await wait_for(lambda: len(fake.requests) == 7)
            assert np.array_equal(fake.requests[first], rows(0.0))
            assert fake.placed == 4
            fake.say({"unread": first})
            fake.say({"unread": last})  # which had none
            fake.say({"id": [*fake.requests][-1]}, np.array([[7]], np.float32))
            await waiter
            fake.requests.clear()
            await ask(client, 8.0)
            await wait_for(lambda: fake.requests)
            assert fake.placed == 5

    asyncio.run(run())


async def wait_until_opened(client: EngineClient, fake: FakeEngine) -> None:
    """Send requests until one is in the arena, and answer them; then nothing is left of them."""
    while not fake.placed:
        waiter = await ask(client, 0.0)
        await wait_for(lambda: fake.requests)
        number = fake.requests.popitem()[0]
        fake.say({"id": number}, np.zeros((1, 1), np.float32))
        fake.say({"unread": number})
        await waiter
        await asyncio.sleep(0.01)
    fake.placed = 0


def test_given_up_request_keeps_its_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nobody waits any more, the engine may still read; the slots are free once it says so."""
    monkeypatch.setattr(remote, "create_arena", lambda: Arena(LEAST_BYTES))

    async def run() -> None:
        async with running_client(tmp_path, monkeypatch) as (client, fake):
            await wait_until_opened(client, fake)
            waiter = await ask(client, 1.0)
            await wait_for(lambda: fake.requests)
            waiter.cancel()
            number = next(iter(fake.requests))
            await asyncio.sleep(3 * remote.SWEEP_SECONDS)
            await ask(client, 2.0)
            await wait_for(lambda: len(fake.requests) == 2)
            assert np.array_equal(fake.requests[number], rows(1.0))
            fake.say({"unread": number})
            await asyncio.sleep(0.05)
            await ask(client, 3.0)
            await wait_for(lambda: len(fake.requests) == 3)
            assert fake.placed == 2

    asyncio.run(run())


def test_refused_arena_leaves_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that may not open the arena is given everything through the socket."""

    async def run() -> None:
        async with running_client(tmp_path, monkeypatch) as (client, fake):
            fake.opens_arena = False
            assert fake.writer is not None
            fake.writer.close()
            await wait_for(lambda: fake.connections == 2)
            await asyncio.sleep(0.1)
            await ask(client, 1.0)
            await wait_for(lambda: fake.requests)
            assert fake.placed == 0
            assert np.array_equal(fake.requests.popitem()[1], rows(1.0))

    asyncio.run(run())


def test_engine_that_ends_takes_the_arena_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots in use when an engine ends are dropped with their arena: its successor gets a new one, all of it free."""
    monkeypatch.setattr(remote, "create_arena", lambda: Arena(LEAST_BYTES))

    async def run() -> None:
        async with running_client(tmp_path, monkeypatch) as (client, fake):
            await wait_until_opened(client, fake)
            waiter = await ask(client, 1.0)
            await wait_for(lambda: fake.placed)
            assert fake.writer is not None
            fake.writer.close()
            with pytest.raises(UnavailableError):
                await waiter
            await wait_for(lambda: fake.connections == 2)
            fake.requests.clear()
            fake.placed = 0
            await wait_until_opened(client, fake)

    asyncio.run(run())
