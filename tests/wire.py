"""Raw HTTP connections, and models that are as slow as a request asks, for tests of failures."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from tests import fakes
from tests.fakes import FakeModel, tabular

SECONDS = 30.0  # timeout for things that should happen at once
_SIDE = 128


@dataclass
class Reply:
    """One response as received; `status` is 0 if the connection closed without one."""

    status: int = 0
    headers: dict[str, str] | None = None
    body: bytes = b""

    @property
    def error(self) -> str:
        """The error message in the body."""
        fields = json.loads(self.body)
        assert list(fields) == ["error"]
        return str(fields["error"])


class Wire:
    """A connection that sends raw bytes and reads one response at a time."""

    def __init__(self, url: str, seconds: float = SECONDS) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=seconds)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._left = b""

    def __enter__(self) -> "Wire":
        """Return the connection."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def send(self, data: bytes) -> "Wire":
        """Send bytes, ignoring a closed connection: `read` and `is_closed` report it."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)
        return self

    def read(self) -> Reply:
        """Read one response; an empty `Reply` if the connection closes first.

        Raises:
            TimeoutError: Nothing arrived in time.
        """
        while b"\r\n\r\n" not in self._left:
            if not self._more():
                return Reply()
        head, _, self._left = self._left.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        status = int(first.split()[1])
        if status == 100:
            return Reply(status, headers)
        length = int(headers["content-length"])
        while len(self._left) < length and self._more():
            pass
        body, self._left = self._left[:length], self._left[length:]
        return Reply(status, headers, body)

    def is_closed(self) -> bool:
        """Wait for data or the end of the connection; return true if it closed with nothing left to read."""
        return not self._left and not self._more()

    def _more(self) -> bool:
        try:
            data = self.socket.recv(2**16)
        except ConnectionResetError:
            return False
        self._left += data
        return bool(data)


@contextmanager
def open_wires(url: str, count: int) -> Iterator[list[Wire]]:
    """Open several connections and close them on exit."""
    with ExitStack() as stack:
        yield [stack.enter_context(Wire(url)) for _ in range(count)]


def build_request(path: str, body: bytes | None, *fields: str, method: str = "POST") -> bytes:
    """Build a request. `fields` are extra header lines; without a body there is no Content-Length."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", "Content-Type: application/json", *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


def build_predict(model: str, *rows: list[float], fields: tuple[str, ...] = ()) -> bytes:
    """Build a predict request."""
    return build_request(f"/v1/models/{model}:predict", json.dumps({"instances": rows}).encode(), *fields)


def exchange(url: str, request: bytes, seconds: float = SECONDS) -> Reply:
    """Send a request on a new connection and return the response."""
    with closing(Wire(url, seconds)) as wire:
        return wire.send(request).read()


def wait_until(found: Callable[[], Any], seconds: float = SECONDS) -> float:
    """Wait until `found` returns a true value, and return how long that took, in seconds.

    Raises:
        AssertionError: It did not happen within `seconds`.
    """
    began = time.monotonic()
    while not found():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began


def worker_of(reply: Reply) -> str:
    """Return the prefix of the request ID, which identifies the worker that answered."""
    assert reply.headers is not None
    return reply.headers["x-request-id"].partition("-")[0]


def napper(name: str = "napper", least: int = 0) -> FakeModel:
    """Regression y = x whose graph loops max(x, least) times, so `least` makes it slow for every input."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("MatMul", ["state", "turn"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [_SIDE, _SIDE]),
        ],
        [
            helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [_SIDE, _SIDE]),
        ],
    )
    constants = {
        "turn": np.roll(np.eye(_SIDE, dtype=np.float32), 1, axis=0),
        "start": np.ones((_SIDE, _SIDE), np.float32),
        "least": np.array(least, np.float32),
        "always": np.array(True),
        "zero": np.array(0, np.float32),
    }
    nodes = [
        helper.make_node("ReduceMax", ["inputs"], ["wanted"], keepdims=0),
        helper.make_node("Max", ["wanted", "least"], ["rounds"]),
        helper.make_node("Cast", ["rounds"], ["count"], to=TensorProto.INT64),
        helper.make_node("Loop", ["count", "always", "start"], ["last"], body=body),
        helper.make_node("ReduceMean", ["last"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["inputs", "nothing"], ["outputs"]),
    ]
    graph = helper.make_graph(
        nodes,
        "napper",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return FakeModel(name, "regression", tabular("rounds"), {"kind": "value"}, {"onnx": model.SerializeToString()})


@cache
def rounds_for(seconds: float) -> int:
    """Return how many loops of `napper` take about `seconds` on this machine when it is idle."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(napper().contents["onnx"], options, providers=["CPUExecutionProvider"])
    best = float("inf")
    for _ in range(3):
        began = time.thread_time()
        session.run(None, {"inputs": np.array([[200]], np.float32)})
        best = min(best, time.thread_time() - began)
    return max(1, round(200 * seconds / best))


def thrower() -> FakeModel:
    """Regression y = x whose graph raises for x >= 1: it indexes a list of one element with int(x)."""
    nodes = [
        helper.make_node("ReduceMax", ["inputs"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["list", "index"], ["nothing"]),
        helper.make_node("Add", ["inputs", "nothing"], ["outputs"]),
    ]
    content = fakes.build_onnx(*nodes, weights={"list": np.zeros(1, np.float32)}, wide=1, out=1)
    return FakeModel("thrower", "regression", tabular("x"), {"kind": "value"}, {"onnx": content})
