"""Bodies that are small on the wire or in JSON and large as objects: they take neither memory nor anybody's time."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import fakes
from tests.servers import Server
from tests.wire import Wire, build_predict, build_request, exchange, open_wires, wait_until

MEGABYTE = 2**20
LIMIT = 16 * MEGABYTE
DOUBLER, COIN, CANVAS = (f"/v1/models/{name}:predict" for name in ("doubler", "coin", "canvas"))
INFER = "/v2/models/canvas/infer"
GZIPPED = "Content-Encoding: gzip"
SMALL = build_predict("doubler", [2.0])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one worker with the default limits."""
    root: Path = tmp_path_factory.mktemp("bodies")
    for fake in (fakes.doubler(), fakes.coin(), fakes.canvas()):
        fakes.write_version(root, fake.only("onnx"))
    with Server(root, "--workers", "1", "--device", "cpu", "--placement", "inline") as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def _is_warm(server: Server) -> None:
    """Fill the caches and buffers that a worker keeps."""
    for _ in range(2):
        exchange(server.url, build_request(CANVAS, fill(b"[%b]" % b",".join([b"0.5"] * 784), 2 * MEGABYTE)))
        exchange(server.url, build_request(DOUBLER, b" " * (LIMIT - 1)))


def fill(element: bytes, size: int = LIMIT - 1000, before: bytes = b'{"instances":[', after: bytes = b"]}") -> bytes:
    """Return JSON with an element again and again, as large as a body may be."""
    return before + b",".join([element] * (size // (len(element) + 1))) + after


def infer(datatype: str, shape: str, element: bytes) -> bytes:
    """Return a v2 body with an element again and again."""
    head = f'{{"inputs":[{{"name":"inputs","datatype":"{datatype}","shape":{shape},"data":['
    return fill(element, before=head.encode(), after=b"]}]}")


ROW = b"[" + b",".join([b"[%b]" % b",".join([b"0"] * 28)] * 28) + b"]"
ATTACKS: dict[str, tuple[str, bytes, int]] = {
    "empty lists": (DOUBLER, fill(b"[]"), 400),
    "rows": (DOUBLER, fill(b"[1]"), 413),
    "objects": (COIN, fill(b'{"a":1,"b":1}'), 413),
    "objects and parameters": (COIN, fill(b'{"a":1,"b":1}', before=b'{"parameters":{},"instances":['), 413),
    "pictures that are none": (CANVAS, fill(b"{}"), 413),
    "a list of lists": (DOUBLER, fill(b"[]", before=b'{"instances":[[', after=b"]]}"), 413),
    "another field": (DOUBLER, fill(b"[]", before=b'{"x":[', after=b"]}"), 413),
    "keys": (DOUBLER, fill(b'"a":1', before=b"{", after=b"}"), 413),
    "one row of a picture": (CANVAS, fill(b"0", before=b'{"instances":[[', after=b"]]}"), 413),
    "too many pictures": (CANVAS, fill(ROW), 413),
    "v2": (INFER, infer("FP32", "[4096,784]", b"0"), 413),
    "v2 in rows": (INFER, infer("FP32", "[4096,784]", b"[]"), 413),
    "v2 of a large shape": (INFER, infer("FP32", "[2000000,784]", b"0"), 413),
    "v2 of integers": (INFER, infer("INT64", "[4096,784]", b"0"), 413),
    "v2 of strings": (INFER, infer("BYTES", "[4096]", b'""'), 413),
    "v2 of inputs": (INFER, fill(b"{}", before=b'{"inputs":[', after=b"]}"), 413),
}


class Watch:
    """What a worker needs while a client attacks, and how small predictions fare beside it."""

    def __init__(self, server: Server) -> None:
        (self._worker,) = server.workers()
        self._url = server.url
        self._ended = threading.Event()
        self.slowest = self.grown = 0.0  # seconds; bytes

    def predict(self) -> None:
        """Predict again and again on one connection."""
        with Wire(self._url) as wire:
            while not self._ended.is_set():
                began = time.monotonic()
                assert b'"prediction":4.0' in wire.send(SMALL).read().body
                self.slowest = max(self.slowest, time.monotonic() - began)
                time.sleep(0.002)

    def weigh(self) -> None:
        """Follow the worker's memory."""
        before = self._worker.memory_info().rss
        while not self._ended.wait(0.003):
            self.grown = max(self.grown, self._worker.memory_info().rss - before)

    @property
    def cpu(self) -> float:
        """Seconds of CPU that the worker has used."""
        times = self._worker.cpu_times()
        return float(times.user + times.system)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch meanwhile."""
        with ThreadPoolExecutor(2) as pool:
            watchers = [pool.submit(self.predict), pool.submit(self.weigh)]
            yield
            self._ended.set()
            for watcher in watchers:
                watcher.result()


@pytest.mark.parametrize("coding", ["gzip", "none"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_body_is_counted_before_it_is_built(attack: str, coding: str, server: Server) -> None:
    """Millions of values are refused with a sentence, for little time and memory, and small predictions go on."""
    path, body, status = ATTACKS[attack]
    packed = gzip.compress(body, 1) if coding == "gzip" else body
    request = build_request(path, packed, *([GZIPPED] if coding == "gzip" else []))
    watch = Watch(server)
    with watch.watching():
        before = watch.cpu
        reply = exchange(server.url, request)
        used = watch.cpu - before
    assert reply.status in (status, 413)
    assert reply.error
    assert watch.grown < 100 * MEGABYTE
    assert used < 1.5  # it took up to 6; most of what is left are the small predictions
    assert watch.slowest < 1  # on a machine that does other things, too


def test_honest_zeros_may_be_compressed(server: Server) -> None:
    """A thousand digits of zeros, which unfold a thousand times, are read; what unfolds so far and is large is not."""
    row = b"[%b]" % b",".join([b"0.0"] * 784)
    good = gzip.compress(b'{"instances":[%b]}' % b",".join([row] * 1000))
    reply = exchange(server.url, build_request(CANVAS, good, GZIPPED))
    assert len(json.loads(reply.body)["predictions"]) == 1000
    many = gzip.compress(b'{"instances":[%b]}' % b",".join([row] * 4000))
    reply = exchange(server.url, build_request(CANVAS, many, GZIPPED))
    assert (reply.status, "200 times its size; send it uncompressed" in reply.error) == (413, True)
    plain = build_request(CANVAS, b'{"instances":[%b],"parameters":{"top_k":1}}' % b",".join([row] * 4000))
    assert len(json.loads(exchange(server.url, plain).body)["predictions"]) == 4000


def test_clients_that_hang_up_delay_nobody(server: Server) -> None:
    """What was sent by clients that have gone is read no further, and nothing of it is left."""
    rows = fill(ROW, 4095 * (len(ROW) + 1)).replace(b"[0,", b"[0.125,")
    request = build_request(CANVAS, gzip.compress(rows, 1), GZIPPED)
    watch = Watch(server)
    with watch.watching():
        with open_wires(server.url, 4) as wires:
            for wire in wires:
                wire.send(request)
        wait_until(lambda: "service_requests_in_flight 0.0" in server.get("/metrics").text)
        seconds = wait_until(lambda: exchange(server.url, build_request(CANVAS, fill(ROW, 300_000))).status == 200)
    assert seconds < 5
    assert watch.slowest < 1
    assert watch.grown < 100 * MEGABYTE


def test_previews_that_nobody_reads_are_bounded(server: Server) -> None:
    """Clients that ask for large previews, and read none, leave the worker small and others served."""
    row = b"[%b]" % b",".join([b"0.123456789"] * 784)
    preview = build_request(CANVAS.replace("predict", "preview"), b'{"instances":[%b]}' % b",".join([row] * 160))
    watch = Watch(server)
    with watch.watching(), open_wires(server.url, 20) as wires:
        for wire in wires:
            wire.send(preview)
        wait_until(lambda: "service_requests_in_flight 0.0" in server.get("/metrics").text)
    assert watch.grown < 100 * MEGABYTE
    assert watch.slowest < 1


def test_body_in_crumbs_takes_what_it_weighs(server: Server) -> None:
    """A body in chunks of two bytes takes its own size, and not an object for each chunk."""
    crumbs = b"2\r\n  \r\n" * MEGABYTE
    head = build_request(DOUBLER, None, "Transfer-Encoding: chunked")
    good = b'{"instances": [[2.0]]}'
    watch = Watch(server)
    with watch.watching():
        reply = exchange(server.url, head + crumbs + b"%x\r\n%b\r\n0\r\n\r\n" % (len(good), good))
    assert b'"prediction":4.0' in reply.body
    assert watch.grown < 24 * MEGABYTE
