"""Limits on what a client may send, to the byte: each is refused by its status, and nothing behind it is misread."""

import gzip
import json
import re
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import fakes
from tests.servers import Server
from tests.wire import Reply, Wire, build_predict, build_request, exchange, napper, open_wires, rounds_for, wait_until

PREDICT = "/v1/models/doubler:predict"
GOOD = b'{"instances": [[2.0]]}'
RIGHT = b'"predictions":[{"prediction":4.0}]'
LIMIT = 2**20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one worker with narrow limits, with a fast model and a slow one."""
    root: Path = tmp_path_factory.mktemp("small")
    fakes.write_version(root, fakes.doubler())
    fakes.write_version(root, napper(least=rounds_for(0.02)))
    flags = (
        "--max-request-bytes",
        str(LIMIT),
        "--header-timeout",
        "1",
        "--request-timeout",
        "2",
        "--queue-size",
        "512",
        "--placement",
        "inline",  # an engine is nice to others, and then slow where they keep the machine busy
    )
    with Server(root, "--workers", "1", *flags) as server:
        yield server


@pytest.fixture(autouse=True)
def _goes_on(small: Server) -> Iterator[None]:
    """After each test the service answers right, and holds nothing of what it refused."""
    yield
    assert RIGHT in exchange(small.url, build_request(PREDICT, GOOD)).body
    wait_until(lambda: exchange(small.url, build_predict("napper", [0.0])).status == 200)  # what was given up has ended


def chunked(*parts: bytes, end: bool = True) -> bytes:
    """Return a request whose body comes in chunks, without a length."""
    head = build_request(PREDICT, None, "Transfer-Encoding: chunked")
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return head + chunks + (b"0\r\n\r\n" if end else b"")


def test_chunked_body_is_read(small: Server) -> None:
    """A body without a length is read chunk by chunk."""
    assert RIGHT in exchange(small.url, chunked(*[GOOD[i : i + 1] for i in range(len(GOOD))])).body


def test_chunked_body_over_the_limit_is_413_while_it_comes(small: Server) -> None:
    """A body that never ends is refused once it is over the limit; the client that goes on sending hears it."""
    with Wire(small.url) as wire:
        wire.send(chunked(*[b" " * 2**16] * 17, end=False))
        reply = wire.read()
        assert (reply.status, reply.error) == (413, f"the body is over the limit of {LIMIT} bytes")
        assert reply.headers is not None
        assert reply.headers["connection"] == "close"
        wire.send(b"10000\r\n" + b" " * 2**16)
        assert wire.is_closed()


def test_length_over_the_limit_is_413_before_the_body(small: Server) -> None:
    """A length over the limit is refused at once, also of a client that waits for leave to send."""
    for fields in ((), ("Expect: 100-continue",)):
        request = build_request(PREDICT, None, f"Content-Length: {LIMIT + 1}", *fields)
        assert exchange(small.url, request).status == 413


def test_client_is_told_to_go_on(small: Server) -> None:
    """`Expect: 100-continue` is answered before the body is read."""
    with Wire(small.url) as wire:
        wire.send(build_request(PREDICT, None, f"Content-Length: {len(GOOD)}", "Expect: 100-continue"))
        assert wire.read().status == 100
        assert RIGHT in wire.send(GOOD).read().body


@pytest.mark.parametrize("path", ["/v2/repository/index", "/v2/repository/models/doubler/load"])
def test_large_body_of_an_operation_is_413(path: str, small: Server) -> None:
    """What is no prediction has 64 KB for its body, for it is read on the event loop."""
    body = b"{}".ljust(2**16)
    key = f"X-API-Key: {small.token_headers()['X-API-Key']}"
    assert exchange(small.url, build_request(path, body, key)).status == 200
    for long in (body + b" ", b'{"ready":[' + b"[]," * 10**5 + b"[]]}"):
        request = build_request(path, long, key)
        reply = exchange(small.url, request)
        assert (reply.status, reply.error) == (413, "the body is over the limit of 65536 bytes")


def bomb(kind: str, size: int) -> bytes:
    """Return spaces, compressed."""
    if kind == "gzip":
        return gzip.compress(b" " * size, compresslevel=9)
    if kind == "deflate":
        return zlib.compress(b" " * size, 9)
    return zlib.compress(b" " * size, 9)[2:-4]


@pytest.mark.parametrize("kind", ["gzip", "deflate", "raw deflate"])
def test_compressed_body_is_limited_as_it_unfolds(kind: str, small: Server) -> None:
    """A body of 100 kB that unfolds to 100 MB is a 413, and takes neither the memory nor the time of 100 MB."""
    body = bomb(kind, 100 * 2**20)
    (worker,) = small.workers()
    before = worker.memory_info().rss
    for _ in range(5):
        reply = exchange(small.url, build_request(PREDICT, body, f"Content-Encoding: {kind.rsplit(maxsplit=1)[-1]}"))
        assert reply.status == 413
        assert "once decompressed" in reply.error
    assert worker.memory_info().rss - before < 32 * 2**20


PACKED = gzip.compress(GOOD, mtime=0)  # tests are named by it, in every process alike


@pytest.mark.parametrize("body", [b"", b"not gzip", PACKED[:-4], PACKED + b"more"])
def test_damaged_compressed_body_is_a_400(body: bytes, small: Server) -> None:
    """What does not decompress is refused with a sentence."""
    assert exchange(small.url, build_request(PREDICT, body, "Content-Encoding: gzip")).status == 400
    good = exchange(small.url, build_request(PREDICT, gzip.compress(GOOD), "Content-Encoding: gzip"))
    assert RIGHT in good.body


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
        + b"".join(b"X-%d: 1\r\n" % number for number in range(101))
        + b"\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Endless: " + b"a" * 70_000,
        b"\r\n" * 40_000,
    ],
    ids=["101 fields", "long field", "long path", "field without end", "blank lines"],
)
def test_head_over_the_limits_is_431(head: bytes, small: Server) -> None:
    """Too many or too long header fields are a 431, by the time they are read and not when they end."""
    with Wire(small.url) as wire:
        reply = wire.send(head).read()
        assert reply.status == 431
        assert reply.headers is not None
        assert reply.headers["x-request-id"]
        assert wire.is_closed()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"HELLO\r\n\r\n",
        b"GET /v1/models HTTP/9.9\r\n\r\n",
        b"POST /v1/models/doubler:predict HTTP/1.1\r\nHost: x\r\nContent-Length: nine\r\n\r\n",
        b"POST /v1/models/doubler:predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/models/doubler:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /nosuch HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /nosuch HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST /nosuch HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /nosuch HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x/y\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: " + b"x" * 300 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /v1/models HTTP/2.0\r\nHost: x\r\n\r\n",
        b"POST /v1/models/doubler:predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        b"POST /v1/models/doubler:predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nBad Field: 1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    ],
    ids=lambda data: repr(data[:90])[2:-1],
)
def test_what_is_not_http_is_answered_400_and_closed(data: bytes, small: Server) -> None:
    """What cannot be read as HTTP, or could be read in two ways, is a 400 and the end of the connection."""
    with Wire(small.url) as wire:
        replies = [wire.send(data).read()]
        if replies[0].status == 405:  # answered before its body was found to be broken
            replies.append(wire.read())
        assert replies[-1].status in ((400,) if len(replies) == 1 else (0, 400))
        assert wire.is_closed()


def test_slow_head_is_given_up(small: Server) -> None:
    """A client that sends its head a byte at a time is cut off by `--header-timeout`, and holds up nobody."""
    with Wire(small.url) as slow, Wire(small.url) as silent:
        began = time.monotonic()
        for byte in b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa":
            slow.send(bytes([byte]))
            if time.monotonic() - began > 2.5:
                break
            time.sleep(0.05)
        assert slow.is_closed()
        assert silent.is_closed()
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("path", [PREDICT, "/v2/models/doubler/infer", "/nosuch", "/v1/models"])
def test_slow_body_is_given_up(path: str, small: Server) -> None:
    """A client that sends its body a byte at a time is answered or cut off by the deadline, whatever it asks for."""
    with Wire(small.url) as wire:
        wire.send(build_request(path, None, "Content-Length: 1000000"))
        began = time.monotonic()
        while time.monotonic() - began < 8:
            wire.send(b" ")
            time.sleep(0.1)
            if wire.socket.fileno() < 0 or _has_ended(wire):
                break
        assert time.monotonic() - began < 7


def _has_ended(wire: Wire) -> bool:
    """Tell whether the server has closed, without waiting; what it answered is dropped."""
    wire.socket.setblocking(False)
    try:
        while wire.socket.recv(2**16):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    finally:
        wire.socket.settimeout(10)
    return True


def test_slow_reader_is_given_up(small: Server) -> None:
    """A client that asks and asks and reads nothing is not read from any more, and takes no memory without end."""
    request = build_request("/openapi.json", None, method="GET")
    (worker,) = small.workers()
    before = worker.memory_info().rss
    with Wire(small.url) as wire:
        wire.socket.settimeout(1)
        with pytest.raises((TimeoutError, ConnectionError)):
            wire.socket.sendall(request * 100_000)
        assert worker.memory_info().rss - before < 64 * 2**20


@pytest.mark.parametrize("depth", [100, 1000, 2000, 100_000])
def test_deep_json_is_a_400(depth: int, small: Server) -> None:
    """Deep nesting is a 400 by every reader, and takes no worker down."""
    deep = "[" * depth + "]" * depth
    tensor = {"name": "inputs", "datatype": "FP32", "shape": [1, 1], "data": "deep"}
    for path, body in (
        (PREDICT, f'{{"instances": {deep}}}'),
        (PREDICT, f'{{"instances": [[1]], "parameters": {{"x": {deep}}}}}'),
        ("/v2/models/doubler/infer", json.dumps({"inputs": [tensor]}).replace('"deep"', deep)),
        ("/v2/models/doubler/infer", f'{{"inputs": {deep}}}'),
    ):
        assert exchange(small.url, build_request(path, body.encode())).status == 400


def test_rows_of_one_request_are_limited(small: Server) -> None:
    """As many rows as the queue holds are answered; one more is a 413 that says how many may come."""
    most = exchange(small.url, build_predict("doubler", *[[1.0]] * 512))
    assert len(json.loads(most.body)["predictions"]) == 512
    more = build_predict("doubler", *[[1.0]] * 513)
    for request in (more, more.replace(b":predict", b":preview")):
        reply = exchange(small.url, request)
        assert (reply.status, reply.error) == (413, "the request has 513 instances; at most 512 are taken at once")


def test_pipelined_requests_are_answered_in_order(small: Server) -> None:
    """Requests sent without waiting are answered each in its turn, predictions and others mixed."""
    asked = [
        build_predict("napper", [float(rounds_for(0.1))]),
        build_request("/v1/models", None, method="GET"),
        build_predict("doubler", [3.0]),
        build_request("/nosuch", None, method="GET"),
        build_predict("doubler", [4.0]),
    ]
    with Wire(small.url) as wire:
        wire.send(b"".join(asked))
        replies = [wire.read() for _ in asked]
    assert [reply.status for reply in replies] == [200, 200, 200, 404, 200]
    assert b'"model":"napper"' in replies[0].body
    assert b'"prediction":6.0' in replies[2].body
    assert b'"prediction":8.0' in replies[4].body


def test_garbage_after_a_request_does_not_take_its_answer(small: Server) -> None:
    """What cannot be read behind a request that is being answered is refused in its turn, and ends the connection."""
    many = b"".join(b"X-%d: 1\r\n" % number for number in range(101))
    for behind, status in ((b"GARBAGE\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: x\r\n" + many + b"\r\n", 431)):
        with Wire(small.url) as wire:
            reply = wire.send(build_predict("napper", [float(rounds_for(0.2))]) + behind).read()
            assert reply.status == 200
            assert b'"model":"napper"' in reply.body
            assert wire.read().status == status
            assert wire.is_closed()


def test_endless_pipeline_is_answered_at_the_servers_pace(small: Server) -> None:
    """A client that pipelines without end behind a slow request is read no faster than it is answered."""
    (worker,) = small.workers()
    before = worker.memory_info().rss
    count = 5000
    with Wire(small.url) as wire:
        wire.send(build_predict("napper", [float(rounds_for(0.5))]))
        time.sleep(0.05)
        wire.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")  # comes by itself: what follows is read no further
        time.sleep(0.05)
        wire.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * (count - 1))
        assert b'"model":"napper"' in wire.read().body
        assert worker.memory_info().rss - before < 32 * 2**20
        assert all(wire.read().body == b'{"live":true}' for _ in range(count))


def test_refusals_in_a_pipeline_are_answered_in_turns(small: Server) -> None:
    """Thousands of requests that are refused at once, predictions among them, are all answered, in order."""
    refused = [build_request(PREDICT, b"{}")] * 300
    asked = [*refused, build_predict("doubler", [3.0]), *refused * 2, build_predict("doubler", [4.0]), *refused * 10]
    with Wire(small.url) as wire:
        wire.send(b"".join(asked))
        replies = [wire.read() for _ in asked]
        assert RIGHT in wire.send(build_request(PREDICT, GOOD)).read().body
    statuses = [200 if request != refused[0] else 400 for request in asked]
    assert [reply.status for reply in replies] == statuses
    assert b'"prediction":6.0' in replies[300].body
    assert b'"prediction":8.0' in replies[901].body


def test_waiting_connection_is_not_read_without_end(small: Server) -> None:
    """Behind a slow request and one that waits for it, a client can send no more than the sockets hold."""
    (worker,) = small.workers()
    before, sent = worker.memory_info().rss, 0
    with Wire(small.url, 1) as wire:
        wire.send(build_predict("napper", [float(rounds_for(1.5))]))
        for part in (
            b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /nosuch HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n",
        ):
            time.sleep(0.05)
            wire.send(part)
        with suppress(TimeoutError):  # it is read no more
            while sent < 128 * 2**20:
                sent += wire.socket.send(bytes(2**18))
        assert sent < 64 * 2**20
        assert worker.memory_info().rss - before < 32 * 2**20


def test_head_says_nothing_of_what_follows(small: Server) -> None:
    """A refusal behind a HEAD request has its body: only the response to the HEAD has none."""
    with Wire(small.url) as wire:
        wire.socket.sendall(b"HEAD /nosuch HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        wire.socket.sendall(b"GARBAGE\r\n\r\n")
        received = b""
        while part := wire.socket.recv(2**16):
            received += part
    first, _, second = received.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 404 ")
    assert second.startswith(b"HTTP/1.1 400 ")
    assert second.endswith(b'{"error":"this is not an HTTP/1.1 request"}')


@pytest.mark.parametrize("host", ["x", "x.example:8000", "127.0.0.1:1", "[::1]:8000", "[2001:db8::1]", ""])
def test_host_of_any_kind_is_taken(host: str, small: Server) -> None:
    """A name or an address, with or without a port, is a Host; a proxy may send an empty one."""
    assert exchange(small.url, f"GET /health/live HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).status == 200


def test_http_1_0_is_kept_alive_on_demand(small: Server) -> None:
    """`ab -k` reuses its connection, and is told so; a client that does not ask gets the end of it."""
    for path, body in (("POST " + PREDICT, GOOD), ("GET /v1/models", b"")):
        request = f"{path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n".encode()
        with Wire(small.url) as wire:
            for _ in range(3):
                reply = wire.send(request + b"Connection: Keep-Alive\r\n\r\n" + body).read()
                assert (reply.status, (reply.headers or {})["connection"]) == (200, "keep-alive")
            reply = wire.send(request + b"\r\n" + body).read()
            assert (reply.status, (reply.headers or {})["connection"]) == (200, "close")
            assert wire.is_closed()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_half_closed_client_gets_its_answers(version: str, small: Server) -> None:
    """A client that sends no more once it has asked, as netcat does, gets all its answers, and then the end."""
    slow = build_predict("napper", [float(rounds_for(0.05))]).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    asked = [slow, build_predict("doubler", [3.0]), build_request("/v1/models", None, method="GET")]
    with Wire(small.url) as wire:
        wire.send(b"".join(asked if version == "1.1" else asked[:1]))
        wire.socket.shutdown(socket.SHUT_WR)
        replies = [reply for reply in iter(wire.read, Reply()) if reply.status != 100]
    assert [reply.status for reply in replies] == ([200, 200, 200] if version == "1.1" else [200])
    assert b'"model":"napper"' in replies[0].body


def test_client_that_is_not_read_is_missed_when_it_goes(small: Server) -> None:
    """A client that has sent more than is read, and goes, does not keep what it asked for running."""
    gone = r'service_dropped_total\{.*reason="gone".*\} (\S+)'
    before = sum(map(float, re.findall(gone, small.get("/metrics").text)))
    live = build_request("/health/live", None, method="GET")
    with Wire(small.url) as wire:
        wire.send(build_predict("napper", [float(rounds_for(1.5))]))
        for _ in range(2):  # the second is read no more
            time.sleep(0.05)
            wire.send(live * 1000)
    wait_until(lambda: sum(map(float, re.findall(gone, small.get("/metrics").text))) == before + 1, 10)


def test_half_closed_client_is_no_leak(small: Server) -> None:
    """Clients that vanish at any point of a request leave no connection and no request in flight behind."""
    (worker,) = small.workers()
    before = worker.num_fds()
    request = build_predict("napper", [0.0])
    with open_wires(small.url, 60) as wires:
        for number, wire in enumerate(wires):
            wire.send(request[: len(request) * number // 60])
    with open_wires(small.url, 20) as wires:
        for wire in wires:
            wire.send(request)
    wait_until(lambda: worker.num_fds() <= before)
    wait_until(lambda: "service_requests_in_flight 0.0" in small.get("/metrics").text)
