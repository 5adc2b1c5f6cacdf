"""Tests of service.model.remote, on a socket of the test's own."""

import asyncio
import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest

from service.errors import UnavailableError
from service.model import channel
from service.model.remote import EngineClient
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
