"""Mixed traffic from several clients, every answer kept and checked: what `tests.chaos` and `tests.soak` are made of.

A client is a thread with a connection of its own; some requests must be answered and some
refused, and each answer to the first kind is compared, at the end, with what onnxruntime gives for the same numbers.
"""

import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from service.model.manifest import Manifest
from service.model.version_folder import load_manifest
from tests.servers import Server
from tests.wire import Reply, Wire, build_request, open_wires, worker_of

HUNG_SECONDS = 20.0  # beyond the request timeout of 10 s: an answer that takes longer is none
ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE = 1e-5, 1e-4
FLAGS = ("--request-timeout", "10", "--access-log", "false", "--queue-size", "2048")


@dataclass(frozen=True)
class Asked:
    """A good request's model and rows, and the numbers that came back."""

    model: str
    rows: np.ndarray[Any, np.dtype[np.float32]]
    numbers: list[float]


@dataclass
class Record:
    """What one client saw."""

    sent: int = 0
    answered: Counter[int] = field(default_factory=Counter)
    left: int = 0
    closed: int = 0
    refused_connections: int = 0
    hung: int = 0
    slowest: float = 0.0  # seconds until an answer, or the end of the connection
    misjudged: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)


class Models:
    """The models of a folder that take float32 rows: their manifests, and onnxruntime's own sessions on their files."""

    def __init__(self, root: Path) -> None:
        self.manifests: dict[str, Manifest] = {}
        self._sessions: dict[str, ort.InferenceSession] = {}
        for path in sorted(root.glob("*/*/manifest.json")):
            manifest = load_manifest(path.parent)
            if isinstance(manifest, Manifest):  # one without a task has no typed API
                self._add(manifest, path.parent)

    def _add(self, manifest: Manifest, folder: Path) -> None:
        self.manifests[manifest.name] = manifest
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        file = str(folder / manifest.artifacts["onnx"].file)
        self._sessions[manifest.name] = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def draw(self, chance: random.Random, rows: int) -> tuple[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Return a model and rows for it."""
        name = chance.choice(sorted(self.manifests))
        shape = (rows, *self.manifests[name].input.shape)
        generator = np.random.default_rng(chance.getrandbits(32))
        return name, generator.random(shape, dtype=np.float32)

    def count_wrong(self, asked: list[Asked]) -> int:
        """Return how many answers are not what onnxruntime gives for the same rows."""
        wrong = 0
        for each in asked:
            session = self._sessions[each.model]
            expected = session.run(None, {session.get_inputs()[0].name: each.rows})[0].reshape(-1)
            given = np.array(each.numbers, np.float32)
            limit = ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * np.abs(expected)
            wrong += given.shape != expected.shape or bool((np.abs(given - expected) > limit).any())
        return wrong


def read_numbers(body: bytes, manifest: Manifest) -> list[float]:
    """Return the graph's own outputs from a typed answer, row by row."""
    key = {"value": "prediction", "probability": "probability", "probabilities": "probabilities"}[manifest.output.kind]
    numbers: list[float] = []
    for prediction in json.loads(body)["predictions"]:
        value = prediction[key]
        numbers += value if isinstance(value, list) else [value]
    return numbers


def build_good(models: Models, chance: random.Random) -> tuple[bytes, str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return a request that must be answered 200: few rows or many, now and then by ASGI."""
    name, rows = models.draw(chance, chance.choice((1, 1, 1, 2, 8, 32)))
    body = json.dumps({"instances": rows.reshape(len(rows), -1).tolist()}).encode()
    fields = ("Expect: 100-continue",) if chance.random() < 0.05 else ()
    return build_request(f"/v1/models/{name}:predict", body, *fields), name, rows


def _wrong_length(path: str) -> bytes:
    return build_request(path, b'{"instances": [[1, 2, 3, 4, 5, 6, 7]]}')


BAD: dict[str, tuple[Callable[[str], bytes], set[int]]] = {
    "wrong length": (_wrong_length, {400}),
    "not JSON": (lambda path: build_request(path, b'{"instances": [[1'), {400}),
    "NaN": (lambda path: build_request(path, b'{"instances": [[NaN]]}'), {400}),
    "deep": (lambda path: build_request(path, b'{"instances": ' + b"[" * 50_000), {400}),
    "v2 without inputs": (lambda path: build_request(path.replace("v1", "v2")[:-8] + "/infer", b"{}"), {400}),
    "unknown model": (lambda path: build_request("/v1/models/nosuch:predict", b"{}"), {404}),
    "GET": (lambda path: build_request(path, None, method="GET"), {405}),
    "media": (lambda path: build_request(path, b"a,b").replace(b"application/json", b"text/csv"), {415}),
    "long": (lambda path: build_request(path, None, f"Content-Length: {2**40}"), {413}),
    "gzip": (lambda path: build_request(path, b"no gzip", "Content-Encoding: gzip"), {400}),
    "many fields": (lambda path: build_request(path, b"{}", *[f"X-{n}: 1" for n in range(120)]), {431}),
    "garbage": (lambda path: b"\x00\x01\x02 garbage\r\n\r\n", {400}),
    "half a request": (lambda path: build_request(path, b"{}" * 99)[:-50], set()),
}


class Client(threading.Thread):
    """Sends one request after another until told to stop; a connection that is closed is opened again.

    Args:
        url: returns where to.
        models: to ask.
        seed: of what is asked.
        bad: share of requests that must be refused.
        done: set to stop.
        pause: mean seconds between two requests.
    """

    def __init__(
        self,
        url: Callable[[], str],
        models: Models,
        seed: int,
        bad: float,
        done: threading.Event,
        pause: float = 0.0,
    ) -> None:
        super().__init__(daemon=True)
        self.record = Record()
        self._url = url
        self._models = models
        self._chance = random.Random(seed)
        self._bad = bad
        self._done = done
        self._pause = pause
        self._wire: Wire | None = None

    def run(self) -> None:
        """Send until told to stop."""
        while not self._done.is_set():
            if self._chance.random() < self._bad:
                self._send_bad()
            else:
                self._send_good()
            if self._pause:
                self._done.wait(self._chance.expovariate(1 / self._pause))
        self._hang_up()

    def _send_good(self) -> None:
        request, name, rows = build_good(self._models, self._chance)
        reply = self._exchange(request)
        if reply is not None and reply.status == 200:
            self.record.asked.append(Asked(name, rows, read_numbers(reply.body, self._models.manifests[name])))
        elif reply is not None and reply.status == 503:
            time.sleep(0.05)
        elif reply is not None:
            self.record.misjudged.append(f"a good request was answered {reply.status}: {reply.body[:200]!r}")

    def _send_bad(self) -> None:
        kind = self._chance.choice(sorted(BAD))
        build, expected = BAD[kind]
        name = self._chance.choice(sorted(self._models.manifests))
        self._hang_up()
        if not expected:
            self._leave_half_way(build(f"/v1/models/{name}:predict"))
            return
        reply = self._exchange(build(f"/v1/models/{name}:predict"))
        self._hang_up()
        if reply is not None and reply.status not in expected | {503}:
            self.record.misjudged.append(f"{kind} was answered {reply.status}: {reply.body[:200]!r}")

    def _leave_half_way(self, request: bytes) -> None:
        self.record.sent += 1
        self.record.left += 1
        try:
            Wire(self._url(), HUNG_SECONDS).send(request).close()
        except OSError:
            self.record.refused_connections += 1

    def _exchange(self, request: bytes) -> Reply | None:
        """Return the answer, or None where the connection was closed before one came."""
        self.record.sent += 1
        began = time.monotonic()
        try:
            if self._wire is None:
                self._wire = Wire(self._url(), HUNG_SECONDS)
            reply = self._wire.send(request).read()
            if reply.status == 100:
                reply = self._wire.read()
        except TimeoutError:
            self.record.hung += 1
            self._hang_up()
            return None
        except ConnectionError:
            self.record.refused_connections += 1
            self._hang_up()
            time.sleep(0.02)
            return None
        finally:
            self.record.slowest = max(self.record.slowest, time.monotonic() - began)
        if reply.status == 0:
            self.record.closed += 1
            self._hang_up()
            return None
        self.record.answered[reply.status] += 1
        if reply.headers and reply.headers.get("connection") == "close":
            self._hang_up()
        return reply

    def _hang_up(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None


def end_when_told() -> None:
    """Have SIGTERM end this program as Ctrl-C does: with its servers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def add(records: list[Record]) -> Record:
    """Return all that several clients saw."""
    whole = Record()
    for record in records:
        whole.sent += record.sent
        whole.answered += record.answered
        whole.left += record.left
        whole.closed += record.closed
        whole.refused_connections += record.refused_connections
        whole.hung += record.hung
        whole.slowest = max(whole.slowest, record.slowest)
        whole.misjudged += record.misjudged
        whole.asked += record.asked
    return whole


class Killer:
    """Kills workers with -9, and tells how long it takes until another answers in the place of one.

    Args:
        server: whose workers.
        workers: how many it has.
        seed: of which one is killed.
        spared: the name of one that is not.
    """

    def __init__(self, server: Server, workers: int, seed: int, spared: str = "") -> None:
        self._server = server
        self._spared = spared
        self._chance = random.Random(seed)
        self._known: set[str] = set()
        until = time.monotonic() + HUNG_SECONDS
        while len(self._known) < workers and time.monotonic() < until:
            self._known |= self._who_answers()

    def kill(self) -> float:
        """Kill one and return the seconds until a worker answers that never did before; infinity if none does."""
        began = time.monotonic()
        self._chance.choice([worker for worker in self._server.workers() if worker.name() != self._spared]).kill()
        while time.monotonic() - began < HUNG_SECONDS:
            new = self._who_answers() - self._known
            if new:
                self._known |= new
                return time.monotonic() - began
        return float("inf")

    def _who_answers(self) -> set[str]:
        """Return what tells the workers apart that answer a few connections opened at once."""
        found = set()
        with suppress(OSError), open_wires(self._server.url, 4) as wires:
            for wire in wires:
                reply = wire.send(build_request("/health/live", None, method="GET")).read()
                if reply.status:
                    found.add(worker_of(reply))
        return found
