"""What connections bring beside plain requests, over real HTTP: other protocols, trailers, answers nobody reads."""

import re
import socket
import time
from collections.abc import Iterator

import pytest

from tests import fakes
from tests.servers import Server
from tests.wire import Wire, build_predict, build_request, exchange, wait_until

PREDICT, PREVIEW = "/v1/models/doubler:predict", "/v1/models/doubler:preview"
GOOD = b'{"instances": [[2.0]]}'
RIGHT = {PREDICT: b'"predictions":[{"prediction":4.0}]', PREVIEW: b'"instances":[[2.0]]'}
REFUSED = r'service_other_requests_total\{code="400"\}'
UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one worker that gives up on a client after two seconds."""
    root = tmp_path_factory.mktemp("small")
    fakes.write_version(root, fakes.doubler())
    with Server(
        root, "--workers", "1", "--header-timeout", "1", "--request-timeout", "2", "--queue-size", "400000"
    ) as server:
        yield server


@pytest.fixture(autouse=True)
def _goes_on(small: Server) -> Iterator[None]:
    """After each test the service answers right."""
    yield
    assert RIGHT[PREDICT] in exchange(small.url, build_request(PREDICT, GOOD)).body


def build_chunks(path: str, *fields: str, trailers: bytes = b"") -> bytes:
    """Return a request whose body comes in chunks."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (GOOD[:9], GOOD[9:]))
    return build_request(path, None, "Transfer-Encoding: chunked", *fields) + chunks + b"0\r\n" + trailers + b"\r\n"


@pytest.mark.parametrize("path", [PREDICT, PREVIEW])
@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "in chunks"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_wish_for_another_protocol_is_ignored(path: str, chunked: bool, size: int, small: Server) -> None:
    """`Upgrade: h2c`, which curl --http2 and Java's client send, changes nothing, however the request is cut."""
    request = build_chunks(path, *UPGRADE) if chunked else build_request(path, GOOD, *UPGRADE)
    with Wire(small.url) as wire:
        for _ in range(2):  # the connection stays usable
            for start in range(0, len(request), size):
                wire.send(request[start : start + size])
            reply = wire.read()
            assert (reply.status, RIGHT[path] in reply.body) == (200, True)
        assert RIGHT[PREDICT] in wire.send(build_request(PREDICT, GOOD)).read().body


def test_wishes_for_another_protocol_are_ignored_in_a_pipeline(small: Server) -> None:
    """Requests sent without waiting are answered in their order, those that wish for another protocol too."""
    websocket = ("Connection: keep-alive, upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    asked = [
        build_request(PREDICT, GOOD, *UPGRADE),
        build_request("/health/live", None, *websocket, method="GET"),
        build_chunks(PREVIEW, *UPGRADE),
        build_request("/nosuch", None, *UPGRADE, method="GET"),
        build_request(PREDICT, GOOD, *UPGRADE, "Expect: 100-continue"),
        build_predict("doubler", [3.0], fields=UPGRADE),
    ]
    with Wire(small.url) as wire:
        wire.send(b"".join(asked))
        replies = [reply for reply in (wire.read() for _ in range(7)) if reply.status != 100]
    assert [reply.status for reply in replies] == [200, 200, 200, 404, 200, 200]
    assert b'"prediction":6.0' in replies[-1].body


@pytest.mark.parametrize("path", [PREDICT, "/nosuch"])
def test_body_behind_a_wish_for_another_protocol_is_no_request(path: str, small: Server) -> None:
    """A body that looks like a request is a body, and is answered as one."""
    inner = build_request("/health/live", None, method="GET")
    request = build_request(path, inner, "Connection: upgrade", "Upgrade: foo")
    with Wire(small.url) as wire:
        wire.send(request[: -len(inner)])
        time.sleep(0.1)
        wire.send(inner + build_request("/nosuch/either", None, method="GET"))
        replies = [wire.read(), wire.read()]
    assert [reply.status for reply in replies] == [400 if path == PREDICT else 404, 404]
    assert "/nosuch/either" in replies[1].error


@pytest.mark.parametrize("more", [b"Content-Length: 3\r\nContent-Length: 4\r\n", b"X: a\r\n b\r\n", b"X\x00: a\r\n"])
def test_head_with_a_wish_is_read_as_strictly_as_any(more: bytes, small: Server) -> None:
    """A head that could be read in two ways, or not at all, ends the connection, whatever else it wishes for."""
    head = b"POST /v1/models/doubler:predict HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: foo\r\n" + more
    with Wire(small.url) as wire:
        assert wire.send(head + b"\r\nabc").read().status == 400
        assert wire.is_closed()


def test_wish_to_close_is_heard_beside_one_for_another_protocol(small: Server) -> None:
    """`Connection: close, upgrade` still closes."""
    with Wire(small.url) as wire:
        wire.send(build_request(PREDICT, GOOD, "Connection: close, upgrade", "Upgrade: h2c"))
        assert RIGHT[PREDICT] in wire.read().body
        assert wire.is_closed()


def test_limits_hold_for_a_head_with_a_wish(small: Server) -> None:
    """Too many or too long fields are a 431, also where they come in two parts."""
    for fields in ([f"X-{number}: 1" for number in range(101)], [f"X: {'a' * 70_000}"]):
        request = build_request(PREDICT, GOOD, *UPGRADE, *fields)
        for cut in (0, 300, len(request) // 2):
            with Wire(small.url) as wire:
                wire.send(request[:cut])
                time.sleep(0.05)
                assert wire.send(request[cut:]).read().status == 431
                assert wire.is_closed()


@pytest.mark.parametrize("path", [PREDICT, PREVIEW])
def test_trailer_fields_are_dropped(path: str, small: Server) -> None:
    """Fields behind a chunked body replace none of the head, and do not hurt the connection."""
    trailers = b"Content-Type: text/weird\r\nX-Request-ID: fromtrailer\r\nConnection: upgrade\r\nUpgrade: foo\r\n"
    with Wire(small.url) as wire:
        for fields in ((), ("Expect: 100-continue",)):
            reply = wire.send(build_chunks(path, *fields, "X-Request-ID: fromhead", trailers=trailers)).read()
            reply = wire.read() if reply.status == 100 else reply
            assert (reply.status, RIGHT[path] in reply.body) == (200, True)
            assert reply.headers is not None
            assert reply.headers["x-request-id"] == "fromhead"


@pytest.mark.parametrize("path", [PREDICT, PREVIEW, "/nosuch"])
@pytest.mark.parametrize("line", [b"X-%06d: b\r\n", b"%06d"], ids=["many fields", "one field"])
def test_trailers_without_end_are_refused(path: str, line: bytes, small: Server) -> None:
    """Trailers over the limit of a head end the connection; it is a 431 where no answer was given before."""
    with Wire(small.url, 5) as wire:
        wire.send(build_chunks(path).removesuffix(b"\r\n") + b"X: ")
        if path == "/nosuch":
            assert wire.read().status == 404
        for start in range(0, 20_000, 1000):
            wire.send(b"".join(line % number for number in range(start, start + 1000)))
        if path != "/nosuch":
            reply = wire.read()
            assert (reply.status, "trailer fields" in reply.error) == (431, True)
        assert wire.is_closed()


def test_chunk_extensions_without_end_are_refused(small: Server) -> None:
    """A chunk that does not begin is a 431; many small chunks are a body like any other."""
    with Wire(small.url) as wire:
        wire.send(build_request(PREDICT, None, "Transfer-Encoding: chunked") + b"5;x=" + b"a" * 70_000)
        reply = wire.read()
        assert (reply.status, "chunk extensions" in reply.error) == (431, True)
        assert wire.is_closed()
    body = build_request(PREDICT, None, "Transfer-Encoding: chunked") + b"1;a=b\r\n \r\n" * 30_000
    assert exchange(small.url, body + b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD)).status == 200


def test_large_bodies_in_a_pipeline_are_no_long_heads(small: Server) -> None:
    """Bodies of bytes that come together with half a head do not count as a part of it."""
    request = build_request(PREDICT, GOOD + b" " * 100_000)
    with Wire(small.url) as wire:
        for _ in range(3):
            wire.send(request + request[:30]).send(request[30:])
            assert [wire.read().status, wire.read().status] == [200, 200]


@pytest.mark.parametrize("target", ["CONNECT a:80", "GET http://x", "POST http://x:99999/v1/models", "GET a"])
def test_target_that_is_no_path_is_a_400(target: str, small: Server) -> None:
    """What names no path of this server is refused, counted and logged; requests before it are answered."""
    before = count(small, REFUSED)
    bad = f"{target} HTTP/1.1\r\nHost: test\r\n\r\n".encode()
    with Wire(small.url) as wire:
        wire.send(build_request(PREDICT, GOOD)).read()
        reply = wire.send(bad).read()
        assert (reply.status, reply.error != "") == (400, True)
        assert wire.is_closed()
    assert reply.headers is not None
    request_id = reply.headers["x-request-id"]
    wait_until(lambda: count(small, REFUSED) == before + 1 and f"{request_id} - 400" in small.log())
    with Wire(small.url) as wire:
        assert wire.send(build_request("/v1/models", None, method="GET") + bad).read().status == 200
        assert wire.read().status == 400
        assert wire.is_closed()
    wait_until(lambda: count(small, REFUSED) == before + 2)


@pytest.mark.parametrize("path", [PREVIEW, "/v1/models"])
def test_broken_body_is_answered_once(path: str, small: Server) -> None:
    """A request whose body cannot be read gets one answer, and leaves no stack in the log."""
    with Wire(small.url) as wire:
        assert (
            wire.send(build_request(path, None, "Transfer-Encoding: chunked") + b"1\r\n \r\nzz\r\n").read().status
            == 400
        )
        assert wire.is_closed()
    assert exchange(small.url, build_request(PREDICT, GOOD)).status == 200
    assert "Traceback" not in small.log()


def connect_narrowly(server: Server) -> Wire:
    """Return a connection whose client takes little at a time."""
    wire = Wire(server.url, 10)
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**15)
    return wire


def count(server: Server, pattern: str) -> float:
    """Return the sum of the figures of /metrics whose names and labels match."""
    return sum(map(float, re.findall(rf"^{pattern} (\S+)$", server.get("/metrics").text, re.MULTILINE)))


def test_client_that_reads_nothing_is_not_answered_without_end(small: Server) -> None:
    """Once its answers wait, nothing more is read of it, and when it goes on reading nothing it is cut off."""
    answered, slow = r"service_requests_total\{.*", r'service_dropped_total\{.*reason="slow".*'
    before, given_up = count(small, answered), count(small, slow)
    request = build_predict("doubler", *[[0.0]] * 30_000)  # its answer is of 600 kB, and the kernel holds some of them
    with connect_narrowly(small) as wire:
        for _ in range(40):
            wire.send(request)
            time.sleep(0.05)
        assert count(small, answered) - before < 25
        wait_until(lambda: count(small, slow) == given_up + 1, 10)


@pytest.mark.parametrize("fields", [(), ("Connection: close",)])
def test_client_that_reads_slowly_gets_all(fields: tuple[str, ...], small: Server) -> None:
    """An answer may take longer than any request, as long as its client reads."""
    with connect_narrowly(small) as wire:
        began = time.monotonic()
        wire.send(build_predict("doubler", *[[0.0]] * 400_000, fields=fields))
        got, last = b"", b'"prediction":0.0}]}'
        while not got.endswith(last):
            part = wire.socket.recv(2**16)
            assert part, "the connection ended too soon"
            got += part
            time.sleep(0.05)
        assert time.monotonic() - began > 4  # twice what a request may take
        if "Connection: close" not in fields:
            assert RIGHT[PREDICT] in wire.send(build_request(PREDICT, GOOD)).read().body
