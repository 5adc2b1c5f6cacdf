"""Tests of service.http.connection and timeouts: on a transport that holds back what is written."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from service.app import create_app
from service.http.connection import Connection, State
from service.http.exchange import AsgiExchange
from service.http.protocol import HttpProtocol
from service.http.timeouts import check_timeouts
from service.settings import Settings
from tests.wire import SECONDS, build_predict, build_request

MEGABYTE = 2**20
PREDICT = build_predict("doubler", [1.0])


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


def test_answers_that_nobody_reads_count_as_held(doubler_dir: Path) -> None:
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

    run(doubler_dir, drive)


@pytest.mark.parametrize(("unsent", "seconds", "is_open"), [(1, 20, True), (1, 31, False), (200, 2, False)])
def test_client_that_reads_nothing_is_cut_off(unsent: int, seconds: float, is_open: bool, doubler_dir: Path) -> None:
    """It has as long as a request may take, and a moment once the worker holds too much."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        wire.unsent = unsent * MEGABYTE
        connection.pause_writing()
        check_timeouts({connection}, connection.loop.time() + seconds)
        assert wire.is_open is is_open

    run(doubler_dir, drive)


@pytest.mark.parametrize(
    ("sent", "state", "stays"),
    [
        (b"", State.READING_HEAD, False),
        (b"GET / HT", State.READING_HEAD, False),
        (build_request("/v1/models/doubler:predict", b"{}")[:-1], State.READING_BODY, False),
        (PREDICT, State.WAITING, True),
        (build_request("/health/live", None, method="GET"), State.WAITING, True),
    ],
    ids=["nothing", "half a head", "half a body", "a prediction", "another"],
)
def test_client_that_sends_no_more_is_kept_for_its_answer(
    sent: bytes, state: State, stays: bool, doubler_dir: Path
) -> None:
    """The end of what a client sends is the end of its connection, unless it has asked for something."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(sent)
        assert connection.state is state
        assert connection.eof_received() is stays
        assert wire.written == (b"HTTP/1.1 100 Continue\r\n\r\n" if stays else b"")
        connection.eof_received()  # as where a paused connection is read again
        assert wire.written.count(b"Continue") == stays

    run(doubler_dir, drive)


@pytest.mark.parametrize("kind", ["1.0", "started"])
def test_client_that_could_not_ignore_it_is_not_probed(
    kind: str, doubler_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written to a client that sends no more where it would be taken for a part of its answer."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        if kind == "1.0":
            connection.data_received(PREDICT.replace(b"HTTP/1.1", b"HTTP/1.0"))
        else:
            connection.data_received(build_request("/v1/models", None, method="GET"))
        assert connection.eof_received()
        assert wire.written == b""

    monkeypatch.setattr(AsgiExchange, "started", True)
    run(doubler_dir, drive)


async def wait_for_answer(connection: HttpProtocol) -> None:
    """Wait until the current request has its response."""
    async with asyncio.timeout(SECONDS):
        while connection.state is State.WAITING:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("more", [b"", PREDICT], ids=["one", "two"])
def test_client_that_sends_no_more_gets_the_end(more: bytes, doubler_dir: Path) -> None:
    """Once all that it asked for is answered, the connection of a client that sends no more is closed."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(PREDICT + more)
        assert connection.eof_received()
        await wait_for_answer(connection)
        assert wire.written.count(b"HTTP/1.1 200") == 1 + bool(more)
        assert not wire.is_open

    run(doubler_dir, drive)


def test_connection_too_many_is_refused(doubler_dir: Path) -> None:
    """A connection over the limit is told so and closed, reads nothing, and makes room as it goes."""

    async def go() -> None:
        app = create_app(Settings(models_dir=doubler_dir, device="cpu", max_connections=1))
        connections: set[Connection] = set()
        first, second, third = (HttpProtocol(app, connections) for _ in range(3))
        wires = Wire(), Wire(), Wire()
        first.connection_made(wires[0])
        assert (wires[0].written, app.arrival.is_set()) == (b"", True)
        second.connection_made(wires[1])
        assert wires[1].written.startswith(b"HTTP/1.1 503 ")
        assert b"connection: close\r\n" in wires[1].written
        assert b"retry-after" in wires[1].written
        assert not wires[1].is_open
        second.data_received(PREDICT)
        second.connection_lost(None)
        first.connection_lost(None)
        third.connection_made(wires[2])
        assert wires[2].is_open
        assert [answered.status for answered in app.recorder.answered] == [503]

    asyncio.run(go())


@pytest.mark.parametrize("state", [State.IDLE, State.READING_HEAD, State.READING_BODY, State.WAITING])
def test_connections_end_as_the_service_stops(state: State, doubler_dir: Path) -> None:
    """A connection without a request closes at once, and any other with its response, which says so."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        parts = {
            State.IDLE: (PREDICT,),
            State.READING_BODY: (PREDICT[:-1], PREDICT[-1:]),
            State.WAITING: (PREDICT, b""),
        }
        sent = parts.get(state, (b"GET",))
        connection.data_received(sent[0])
        if state is State.IDLE:
            await wait_for_answer(connection)
        assert connection.state is state
        connection.app.draining = True
        connection.shut_down()
        assert wire.is_open is (len(sent) > 1)
        if wire.is_open:
            connection.data_received(sent[1])
            await wait_for_answer(connection)
            assert b"HTTP/1.1 200 " in wire.written
            assert b"connection: close\r\n" in wire.written
            assert not wire.is_open

    run(doubler_dir, drive)


@pytest.mark.parametrize("request_line", ["POST /v1/models/x:predict", "GET /v1/models"])
def test_client_that_may_never_send_its_body_is_let_go(request_line: str, doubler_dir: Path) -> None:
    """An answer to a client that still waits to be told to send its body ends the connection, once it could read it."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        fields = "Host: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        connection.data_received(f"{request_line} HTTP/1.1\r\n{fields}".encode())
        async with asyncio.timeout(SECONDS):
            while connection.state is State.READING_BODY:
                await asyncio.sleep(0.001)
        assert b"connection: close\r\n" in wire.written
        assert b"100 Continue" not in wire.written
        assert connection.state is State.DRAINING
        assert (wire.is_open, wire.is_half_open) == (True, True)
        check_timeouts({connection}, connection.loop.time() + 1)
        assert wire.is_open
        check_timeouts({connection}, connection.loop.time() + 3)
        assert not wire.is_open

    run(doubler_dir, drive)


def test_head_has_no_body(doubler_dir: Path) -> None:
    """The response to a HEAD has the length of the body, and not the body; the next response follows."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        head = build_request("/v1/models/doubler:predict", b"", method="HEAD")
        connection.data_received(head + build_request("/v1/models/x:predict", b""))
        first, second, body = wire.written.split(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 405 ")
        assert b"content-length: 0" not in first
        assert second.startswith(b"HTTP/1.1 404 ")
        assert b"content-length: %d" % len(body) in second

    run(doubler_dir, drive)


def test_what_is_not_http_is_answered_and_recorded(doubler_dir: Path) -> None:
    """Bytes that are no request get a 400, which is recorded, also behind a request; then the connection ends."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(PREDICT.replace(b"HTTP/1.1", b"HTTP/1.0\r\nConnection: keep-alive", 1) + b"?\r\n")
        await wait_for_answer(connection)
        assert re.findall(rb"HTTP/1.1 (\d+)", wire.written) == [b"200", b"400"]
        assert wire.written.count(b"connection: keep-alive\r\n") == 1
        assert wire.written.count(b"connection: close\r\n") == 1
        first, second = connection.app.recorder.answered
        assert (first.status, first.method) == (200, "POST")
        assert (second.status, second.method, second.error) == (400, "-", "this is not an HTTP/1.1 request")
        assert b"x-request-id: " + second.request_id in wire.written

    run(doubler_dir, drive)


@pytest.mark.parametrize(
    "sent", [PREDICT, build_request("/v1/models", None, method="GET")], ids=["prediction", "other"]
)
def test_client_that_reads_nothing_and_goes_ends_its_request(sent: bytes, doubler_dir: Path) -> None:
    """What waits to write to a client does not wait for ever once it has gone, and writes nothing."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(sent)
        connection.pause_writing()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        wire.close()
        connection.connection_lost(None)
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*tasks)
        await asyncio.sleep(0.01)
        assert wire.written == b""
        assert connection.current is None

    run(doubler_dir, drive)


def test_client_that_reads_again_is_an_idle_one(doubler_dir: Path) -> None:
    """Once a client has read its answers, nothing counts as held for it, and it may be idle as long as any other."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(PREDICT)
        await wait_for_answer(connection)
        wire.unsent = 200 * MEGABYTE
        connection.pause_writing()
        wire.unsent = 0
        connection.resume_writing()
        assert not connection.app.context.is_pressed
        check_timeouts({connection}, connection.loop.time() + 70)
        assert wire.is_open
        check_timeouts({connection}, connection.loop.time() + 76)
        assert not wire.is_open

    run(doubler_dir, drive)


@pytest.mark.parametrize("is_lost", [True, False], ids=["lost", "closing"])
def test_nothing_is_done_for_a_connection_that_has_ended(is_lost: bool, doubler_dir: Path) -> None:
    """What a client sent before it went is not answered any more, nor written to a connection that is closing."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(build_request("/v1/models/nosuch:predict", b"") * 1000)
        answered = connection.app.recorder.answered
        counts = len(wire.written), len(answered)
        assert counts > (0, 0)
        wire.close()
        if is_lost:
            connection.connection_lost(None)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(wire.written) == counts[0]
        if is_lost:
            assert (connection.app.recorder.answered, len(answered)) == (answered, counts[1])

    run(doubler_dir, drive)


def test_idle_time_begins_with_the_answer(doubler_dir: Path) -> None:
    """A client whose request took long may be idle after its answer as long as any other."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(PREDICT)
        connection.since -= 1000
        await wait_for_answer(connection)
        check_timeouts({connection}, connection.loop.time() + 10)
        assert wire.is_open

    run(doubler_dir, drive)


@pytest.mark.parametrize(
    ("sent", "has_body"),
    [
        (build_request("/v1/models/x:predict", None, method="HEAD") + b"?", True),
        (build_request("/v1/models", None, "Transfer-Encoding: chunked", method="HEAD") + b"?", False),
    ],
    ids=["behind a HEAD", "in the body of a HEAD"],
)
def test_answer_to_what_is_broken_has_a_body_unless_it_is_a_head(
    sent: bytes, has_body: bool, doubler_dir: Path
) -> None:
    """Only a request whose method was HEAD is answered without a body."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(sent)
        head, _, body = wire.written.rpartition(b"\r\n\r\n")
        assert b"HTTP/1.1 400 " in head
        assert bool(body) is has_body

    run(doubler_dir, drive)


def test_what_is_not_http_is_recorded_once(doubler_dir: Path) -> None:
    """However much of it comes, also while the connection is closing, it is one request that failed."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        wire.close()
        connection.data_received(b"?" * 40_000)
        assert [answered.status for answered in connection.app.recorder.answered] == [400]

    run(doubler_dir, drive)


def test_one_connection_takes_turns(doubler_dir: Path) -> None:
    """What a client sent is not answered in one turn of the event loop, though nothing of it has to wait."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(build_request("/v1/models/nosuch:predict", b"") * 2000)
        assert 0 < wire.written.count(b"HTTP/1.1 404") < 1000
        assert not wire.reads

    run(doubler_dir, drive)
