"""Tests of service.http.protocol: what a client sends piece by piece, ahead of its answers, or near a limit."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from service.http.connection import State
from service.http.protocol import HttpProtocol
from service.http.timeouts import check_timeouts
from tests.service.test_http_connection import Wire, run
from tests.wire import SECONDS, build_predict, build_request

PREDICT = build_predict("doubler", [1.0])
REFUSED = b"POST /v1/models/x:predict HTTP/1.1\r\nHost:\r\n\r\n"  # 404 at once, as it has no body
CHUNKED = b"POST /v1/models/doubler:predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b'15\r\n{"instances":[[3.0]]}\r\n0\r\n'


def statuses(wire: Wire) -> list[int]:
    """Return the statuses of the responses that were written."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", wire.written)]


def values(wire: Wire) -> list[float]:
    """Return the predicted values that were written."""
    bodies = re.findall(rb'\{"model".*?\}\]\}', wire.written)
    return [each["prediction"] for body in bodies for each in json.loads(body)["predictions"]]


async def settle(connection: HttpProtocol) -> None:
    """Wait until no request waits for its response."""
    async with asyncio.timeout(SECONDS):
        await asyncio.sleep(0)
        while connection.state is State.WAITING:
            await asyncio.sleep(0.001)


def test_client_that_waits_for_each_answer_is_answered_at_once(doubler_dir: Path) -> None:
    """Turns are for those who send many requests at once; one that asks again after its answer need not wait."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        for count in range(1, 600):
            connection.data_received(REFUSED)
            assert len(statuses(wire)) == count

    run(doubler_dir, drive)


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead of an answer", "after an answer"])
def test_half_a_head_has_the_time_of_a_head(ahead: bool, doubler_dir: Path) -> None:
    """A client that has begun another request is given the time of a head, not that of an idle connection."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(PREDICT + b"GET / HT" * ahead)
        await settle(connection)
        if not ahead:
            assert connection.state is State.IDLE
            connection.data_received(b"GET / HT")
        limit = connection.app.settings.header_timeout
        check_timeouts({connection}, connection.loop.time() + limit / 2)
        assert wire.is_open
        check_timeouts({connection}, connection.loop.time() + limit + 1)
        assert not wire.is_open

    run(doubler_dir, drive)


def test_limit_of_a_head_is_of_each_head(doubler_dir: Path) -> None:
    """A head may be as long as the limit, whatever came before it on its connection."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        for size in (15_000, 60_000, 15_000, 66_000):
            connection.data_received(REFUSED[:-2] + b"x: " + b"y" * size + b"\r\n\r\n")
            connection.data_received(b"\r\n" * 10_000)  # which a client may send before a request
        assert statuses(wire) == [404, 404, 404, 431]
        assert b"the request's head is over the limit" in wire.written

    run(doubler_dir, drive)


@pytest.mark.parametrize("size", [1000, 63_000, 66_000, 85_000, 200_000])
def test_trailer_fields_of_any_size_are_part_of_one_request(size: int, doubler_dir: Path) -> None:
    """However long its trailer fields are, a request gets one response."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(CHUNKED + LAST_CHUNK + b"x: " + b"y" * size + b"\r\n\r\n")
        await settle(connection)
        assert statuses(wire) in ([200], [431])
        assert statuses(wire) == [200] or size > 65_000

    run(doubler_dir, drive)


def test_trailer_fields_are_no_header_fields(doubler_dir: Path) -> None:
    """What follows a body neither names the request, nor ends the connection, also of a request that had to wait."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        trailer = b"x-request-id: trailer\r\nconnection: close\r\n\r\n"
        connection.data_received(PREDICT + CHUNKED + LAST_CHUNK + trailer + PREDICT)
        await settle(connection)
        assert values(wire) == [2.5, 7.5, 2.5]
        assert b"trailer" not in wire.written

    run(doubler_dir, drive)


def test_continue_is_sent_to_who_asks(doubler_dir: Path) -> None:
    """A request after one that expected `100 Continue` is not sent one."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        expecting = build_predict("doubler", [1.0], fields=("Expect: 100-Continue",))
        for request in (expecting, PREDICT):
            connection.data_received(request)
            await settle(connection)
        assert statuses(wire) == [100, 200, 200]

    run(doubler_dir, drive)


@pytest.mark.parametrize("field", ["Expect: nothing", "X-Expect: 100-continue"])
def test_continue_is_not_sent_to_who_asks_for_something_else(field: str, doubler_dir: Path) -> None:
    """An expectation that nobody knows is ignored, and so is its value in another field."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(build_predict("doubler", [1.0], fields=(field,)))
        await settle(connection)
        assert statuses(wire) == [200]

    run(doubler_dir, drive)


def test_requests_with_the_same_head_have_ids_of_their_own(doubler_dir: Path) -> None:
    """A head that was read before says nothing of who asks now; one that names its request keeps that name."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        for request in (PREDICT, PREDICT, PREDICT, build_predict("doubler", [1.0], fields=("X-Request-ID: mine",))):
            connection.data_received(request)
            await settle(connection)
        ids = re.findall(rb"x-request-id: (\S+)", wire.written)
        assert len(ids) == len(set(ids)) == 4
        assert ids[-1] == b"mine"

    run(doubler_dir, drive)


def test_body_is_no_head(doubler_dir: Path) -> None:
    """A body may be longer than a head, and a chunked one too, unless its chunks are all but empty."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        blank = b" " * 200_000
        connection.data_received(build_request("/v1/models/doubler:predict", b'{"instances":[[1.0]]}' + blank))
        await settle(connection)
        connection.data_received(CHUNKED + b"%x\r\n%b\r\n" % (len(blank), blank) + LAST_CHUNK + b"\r\n")
        await settle(connection)
        assert statuses(wire) == [200, 200]
        connection.data_received(CHUNKED + b"1;" + b"x" * 90_000 + b"\r\n \r\n" + LAST_CHUNK + b"\r\n")
        assert statuses(wire) == [200, 200, 431]
        assert b"bytes of chunk extensions or trailer fields" in wire.written

    run(doubler_dir, drive)


def test_body_over_the_limit_is_refused_at_once(doubler_dir: Path) -> None:
    """A body whose length is not told is refused once it is too long, and nothing that follows is looked at."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(CHUNKED)
        piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        for _ in range(16):
            connection.data_received(piece)
            assert not wire.written
        connection.data_received(piece)
        assert (statuses(wire), connection.state, wire.is_half_open) == ([413], State.DRAINING, True)
        connection.data_received(piece + LAST_CHUNK + b"\r\n" + PREDICT + b"?")
        assert (statuses(wire), connection.state) == ([413], State.DRAINING)

    run(doubler_dir, drive)


def test_what_comes_while_reading_is_paused_is_kept(doubler_dir: Path) -> None:
    """A transport may deliver what it had read already when it is paused: nothing of it is lost or out of order."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        for value in (1.0, 2.0, 3.0, 4.0):
            connection.data_received(build_predict("doubler", [value]) + REFUSED)
        assert not wire.reads
        await settle(connection)
        assert values(wire) == [2.5, 5.0, 7.5, 10.0]
        assert statuses(wire) == [200, 404] * 4
        assert wire.reads

    run(doubler_dir, drive)


def test_hundreds_of_requests_behind_one_that_waits(doubler_dir: Path) -> None:
    """All that was found behind a request that waits is answered, in order, however much it is."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(PREDICT + REFUSED * 340)
        await settle(connection)
        assert statuses(wire) == [200] + [404] * 340

    run(doubler_dir, drive)


def test_thousands_of_requests_at_once_are_all_answered(doubler_dir: Path) -> None:
    """What is left when a connection's turn is over is answered in its next ones, and then it is read again."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(REFUSED * 2000)
        async with asyncio.timeout(SECONDS):
            while len(statuses(wire)) < 2000:
                await asyncio.sleep(0)
        assert (connection.state, wire.reads) == (State.IDLE, True)

    run(doubler_dir, drive)


def test_what_follows_the_last_request_is_dropped(doubler_dir: Path) -> None:
    """After `Connection: close` nothing is answered, and a client that still sends has a moment to read its answer."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(build_predict("doubler", [1.0], fields=("Connection: close",)) + REFUSED)
        connection.data_received(PREDICT)
        connection.since -= 1000
        await settle(connection)
        assert (statuses(wire), connection.state, wire.reads) == ([200], State.DRAINING, True)
        check_timeouts({connection}, connection.loop.time() + 1)
        assert (wire.is_open, wire.is_half_open) == (True, True)
        assert not connection.eof_received()

    run(doubler_dir, drive)


@pytest.mark.parametrize(("size", "status"), [(100, 404), (60_000, 404), (70_000, 431)])
def test_request_for_another_protocol_is_one_of_this(size: int, status: int, doubler_dir: Path) -> None:
    """An `Upgrade` is ignored, however often, and such a head has the limit of any other."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        fields = b"Connection: upgrade\r\nUpgrade: websocket\r\nx: " + b"y" * size
        connection.data_received((REFUSED[:-2] + fields + b"\r\n\r\n") * 2)
        assert statuses(wire) == ([status] if status == 431 else [status, status])

    run(doubler_dir, drive)


def test_answered_request_whose_body_turns_out_to_be_broken_ends_the_connection(doubler_dir: Path) -> None:
    """Nobody can tell where the next request would begin, and there is one response already."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(CHUNKED.replace(b"doubler", b"nosuch"))
        assert (statuses(wire), wire.is_open) == ([404], True)
        connection.data_received(b"no length\r\n" + PREDICT)
        assert (statuses(wire), wire.is_open) == ([404], False)

    run(doubler_dir, drive)


class NoParser:
    """A parser that must not be used."""

    def feed_data(self, data: bytes) -> None:
        """Fail."""
        raise AssertionError(f"{data!r} is parsed")


def test_head_that_was_read_before_is_not_parsed_again(doubler_dir: Path) -> None:
    """Parsing is half of what a small request costs, and clients repeat their heads to the byte."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        for value in (1.0, 2.0):
            connection.data_received(build_predict("doubler", [value]))
            await settle(connection)
            connection._parser = NoParser()  # type: ignore[assignment]
        assert values(wire) == [2.5, 5.0]

    run(doubler_dir, drive)


def test_what_follows_the_last_request_is_not_even_parsed(doubler_dir: Path) -> None:
    """A client that goes on sending, whatever it is, costs nothing."""

    def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(b"?")
        assert (statuses(wire), connection.state) == ([400], State.DRAINING)
        connection._parser = NoParser()  # type: ignore[assignment]
        connection.data_received(PREDICT * 1000)
        assert statuses(wire) == [400]

    run(doubler_dir, drive)


def test_what_comes_while_a_connection_waits_for_its_turn_stays_behind(doubler_dir: Path) -> None:
    """A transport may deliver more before a connection's next turn: it is answered after what came before."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(REFUSED * 400)
        assert not connection._events
        connection.data_received(PREDICT)
        connection.data_received(REFUSED)
        async with asyncio.timeout(SECONDS):
            while len(statuses(wire)) < 402:
                await asyncio.sleep(0)
        assert statuses(wire) == [404] * 400 + [200, 404]

    run(doubler_dir, drive)


def test_body_of_a_request_that_is_answered_already_is_read_to_its_end(doubler_dir: Path) -> None:
    """However long it is, the next request on the connection gets its answer."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(b"POST /nosuch HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\n\r\n")
        async with asyncio.timeout(SECONDS):
            while not statuses(wire):
                await asyncio.sleep(0)
        for _ in range(4):
            connection.data_received(b" " * 100_000)
        assert wire.reads
        connection.data_received(PREDICT)
        await settle(connection)
        assert statuses(wire) == [404, 200]

    run(doubler_dir, drive)


def test_client_that_does_not_read_is_not_read(doubler_dir: Path) -> None:
    """While a client reads none of its answers, its further requests stay where they are."""

    async def drive(connection: HttpProtocol, wire: Wire) -> None:
        connection.data_received(PREDICT * 2)
        connection.pause_writing()
        await settle(connection)
        assert (statuses(wire), wire.reads) == ([200], False)
        connection.resume_writing()
        await settle(connection)
        assert (statuses(wire), wire.reads) == ([200, 200], True)

    run(doubler_dir, drive)
