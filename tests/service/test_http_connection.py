"""Tests of service.http.connection and timeouts: on a transport that holds back what is written."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from service.app import create_app
from service.http.connection import Connection, State
from service.http.protocol import HttpProtocol
from service.http.timeouts import check_timeouts
from service.settings import Settings
from tests.wire import build_predict, build_request

MEGABYTE = 2**20


class Wire(asyncio.Transport):
    """A transport whose client reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent = 0
        self.written = b""
        self.reads, self.is_open, self.is_half_open = True, True, False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep bytes."""
        self.written += data

    def write_eof(self) -> None:
        """Close one direction."""
        self.is_half_open = True

    def get_write_buffer_size(self) -> int:
        """Return as much as the test says."""
        return self.unsent

    def pause_reading(self) -> None:
        """Read no more."""
        self.reads = False

    def resume_reading(self) -> None:
        """Read again."""
        self.reads = True

    def is_reading(self) -> bool:
        """Tell whether it is read."""
        return self.reads

    def is_closing(self) -> bool:
        """Tell whether it was closed."""
        return not self.is_open

    def close(self) -> None:
        """Close it."""
        self.is_open = False

    abort = close


def run(models: Path, drive: Callable[[HttpProtocol, Wire], Awaitable[None] | None]) -> None:
    """Drive one connection on an event loop."""

    async def go() -> None:
        connections: set[Connection] = set()
        connection = HttpProtocol(create_app(Settings(models_dir=models, device="cpu")), connections)
        wire = Wire()
        connection.connection_made(wire)
        if (driving := drive(connection, wire)) is not None:
            await driving
        wire.close()
        connection.connection_lost(None)
        assert not connections
        assert connection.app.context.in_flight == 0
        assert not connection.app.context.is_pressed

    asyncio.run(go())


def test_answers_that_nobody_reads_count_as_held(models_dir: Path) -> None:
    """What waits for its client is held until it is sent, in part or as a whole, or the connection ends."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        context = connection.app.context
        seen = []
        wire.unsent = 200 * MEGABYTE
        connection.pause_writing()
        seen.append((context.is_pressed, wire.reads))
        wire.unsent = 100 * MEGABYTE
        check_timeouts({connection}, connection.loop.time())
        seen.append((context.is_pressed, wire.reads))
        wire.unsent = 0
        connection.resume_writing()
        seen.append((context.is_pressed, wire.reads))
        wire.unsent = 200 * MEGABYTE  # below what pauses a connection, if there are enough of them
        check_timeouts({connection}, connection.loop.time())
        seen.append((context.is_pressed, wire.reads))
        assert seen == [(True, False), (False, False), (False, True), (True, True)]

    run(models_dir, drive)


@pytest.mark.parametrize(("unsent", "seconds", "is_open"), [(1, 20, True), (1, 31, False), (200, 2, False)])
def test_client_that_reads_nothing_is_cut_off(unsent: int, seconds: float, is_open: bool, models_dir: Path) -> None:
    """It has as long as a request may take, and a moment once the worker holds too much."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        wire.unsent = unsent * MEGABYTE
        connection.pause_writing()
        check_timeouts({connection}, connection.loop.time() + seconds)
        assert wire.is_open is is_open

    run(models_dir, drive)


@pytest.mark.parametrize(
    ("sent", "state", "stays"),
    [
        (b"", State.READING_HEAD, False),
        (b"GET / HT", State.READING_HEAD, False),
        (build_request("/v1/models/doubler:predict", b"{}")[:-1], State.READING_BODY, False),
        (build_predict("doubler", [1.0]), State.WAITING, True),
        (build_request("/health/live", None, method="GET"), State.WAITING, True),
    ],
    ids=["nothing", "half a head", "half a body", "a prediction", "another"],
)
def test_client_that_sends_no_more_is_kept_for_its_answer(
    sent: bytes, state: State, stays: bool, models_dir: Path
) -> None:
    """The end of what a client sends is the end of its connection, unless it has asked for something."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(sent)
        assert connection.state is state
        assert connection.eof_received() is stays
        assert wire.written == (b"HTTP/1.1 100 Continue\r\n\r\n" if stays else b"")
        connection.eof_received()  # as where a paused connection is read again
        assert wire.written.count(b"Continue") == stays

    run(models_dir, drive)


def test_one_connection_takes_turns(models_dir: Path) -> None:
    """What a client sent is not answered in one turn of the event loop, though nothing of it has to wait."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(build_request("/v1/models/nosuch:predict", b"") * 2000)
        assert 0 < wire.written.count(b"HTTP/1.1 404") < 1000
        assert not wire.reads

    run(models_dir, drive)
