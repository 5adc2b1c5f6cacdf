"""Tests of service.model.remote, on a socket of the test's own."""

import asyncio
import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ModelRefusedError, UnavailableError
from service.model import channel
from service.model.checker import RETRY_SECONDS
from service.model.remote import EngineClient, RemoteBatcher
from tests.waiter import FutureWaiter


def test_request_to_a_connection_that_is_closing_is_unavailable(tmp_path: Path) -> None:
    """Between the end of an engine and its discovery, a request is refused, and nothing of it is kept."""

    async def talk() -> None:
        connected, ended = asyncio.Event(), asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await channel.read(reader)
            connected.set()
            with contextlib.suppress(channel.ChannelClosedError):
                await channel.read(reader)
            writer.close()
            ended.set()

        client = EngineClient(tmp_path / "engine.sock", 8, lambda: None, threading.Event())
        async with await asyncio.start_unix_server(serve, tmp_path / "engine.sock"):
            running = asyncio.create_task(client._run_connected())
            await connected.wait()
            assert client._writer is not None
            client._writer.close()
            with pytest.raises(UnavailableError, match="starting"):
                client.send("key", np.zeros((1, 1), np.float32), 0.0, FutureWaiter())
            assert not client._pending
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError, channel.ChannelClosedError):
                await running
            await ended.wait()

    asyncio.run(talk())


def test_engine_that_would_refuse_every_version_again_is_not_waited_for(tmp_path: Path) -> None:
    """Where a successor refuses all that was open, and ends, the reason stays and nobody tries to connect for ever."""

    async def talk() -> None:
        refusal = channel.describe_error(ModelRefusedError("killed by SIGFPE while opening"))
        connections = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            with contextlib.suppress(channel.ChannelClosedError):
                while (await channel.read(reader))[0]["do"] != "open":
                    pass
                channel.write(writer, {"id": 0, "error": refusal})
                await channel.read(reader)
            writer.close()

        client = EngineClient(tmp_path / "engine.sock", 8, lambda: None, threading.Event())
        batcher = RemoteBatcher(client, {"key": "killer/1"})
        batcher.problem = "the engine of this model is starting; try again in a moment"
        client._batchers.add(batcher)
        client._opened.set()
        async with await asyncio.start_unix_server(serve, tmp_path / "engine.sock") as server:
            running = asyncio.create_task(client.run())
            while not batcher.is_refused:
                await asyncio.sleep(0.01)
            assert client._control is not None
            client._control.close()
            assert client._writer is not None
            client._writer.close()  # the engine has ended
            while client._opened.is_set():
                await asyncio.sleep(0.01)
            assert "SIGFPE" in batcher.problem
            before = connections
            await asyncio.sleep(5 * RETRY_SECONDS)
            assert connections == before
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            server.close()

    asyncio.run(asyncio.wait_for(talk(), 20))


@pytest.mark.parametrize("is_alone", [True, False])
def test_version_that_is_refused_for_a_while_is_opened_again(is_alone: bool, tmp_path: Path) -> None:
    """When the time is over, in the same engine if another version keeps it there, or else in one that is requested."""

    async def talk() -> None:
        retry_at: list[float] = []
        requested = threading.Event()
        writers: list[asyncio.StreamWriter] = []
        served: set[Any] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served.add(asyncio.current_task())
            with contextlib.suppress(channel.ChannelClosedError):
                while fields := (await channel.read(reader))[0]:
                    if fields["do"] != "open":
                        writers.append(writer)
                    elif retry_at and time.monotonic() >= retry_at[0]:
                        channel.write(writer, {"id": 0, "backend": ["onnx", "cpu", ""]})
                    else:
                        error = ModelRefusedError("killed by SIGKILL while opening")
                        retry_at.append(time.monotonic() + 1.5)
                        error.retry_at = retry_at[0]
                        channel.write(writer, {"id": 0, "error": channel.describe_error(error)})
            writer.close()

        client = EngineClient(tmp_path / "engine.sock", 8, requested.set, threading.Event())
        batcher = RemoteBatcher(client, {"key": "m/1"})
        batcher.problem = "the engine of this model is starting; try again in a moment"
        client._batchers.add(batcher)
        client._opened.set()
        async with await asyncio.start_unix_server(serve, tmp_path / "engine.sock") as server:
            running = asyncio.create_task(client.run())
            while "SIGKILL" not in batcher.problem:
                await asyncio.sleep(0.01)
            if is_alone:  # the engine ends
                writers.pop().close()
            while batcher.is_refused or batcher.problem:
                await asyncio.sleep(0.01)
            assert requested.is_set() == is_alone
            assert client._control is not None
            client._control.close()
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await asyncio.wait(served)
            server.close()

    asyncio.run(asyncio.wait_for(talk(), 20))
