"""Requests as bytes, and rows in the usual shapes."""

import io
import json

import numpy as np
from PIL import Image

from tests.entries.observe import GONE, KEY
from tests.entries.steps import Leave, Pause, Read, Row, Step, Write
from tests.wire import build_request, rounds_for

V1, V2, PREVIEW = "/v1/models/doubler:predict", "/v2/models/doubler/infer", "/v1/models/doubler:preview"
CANVAS, NAPPER = "/v1/models/canvas:predict", "/v1/models/napper:predict"
GOOD = b'{"instances": [[2.0]]}'
TENSORS = b'{"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [1, 1], "data": [2.0]}]}'
HEAVY = GOOD + b" " * 2**18  # read in a thread
LIMIT = 2**20  # bytes
CHUNKED, GZIPPED = "Transfer-Encoding: chunked", "Content-Encoding: gzip"
EXPECT, CLOSE = "Expect: 100-continue", "Connection: close"


def ask(
    path: str,
    body: bytes | None = None,
    *fields: str,
    method: str = "POST",
    kind: str = "",
    key: str = KEY,
    sent_id: str = "",
) -> bytes:
    """Return a request with a key."""
    fields = (f"X-API-Key: {key}", *fields) if key else fields
    request = build_request(path, body, *((f"X-Request-ID: {sent_id}", *fields) if sent_id else fields), method=method)
    return request.replace(b"application/json", kind.encode(), 1) if kind else request


def get(path: str, *fields: str, sent_id: str = "") -> bytes:
    """Return a GET with a key."""
    return ask(path, None, *fields, method="GET", sent_id=sent_id)


def chunk(*parts: bytes) -> bytes:
    """Return a chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


def draw() -> bytes:
    """Return a PNG of a stroke."""
    picture = Image.new("L", (40, 40))
    picture.paste(255, (18, 5, 23, 35))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def pack_tensor(*values: float) -> tuple[bytes, str]:
    """Return a v2 body with a binary tensor, and the field that tells where it begins."""
    raw = np.array(values, np.float32).tobytes()
    tensor = {"name": "inputs", "datatype": "FP32", "shape": [len(values), 1]}
    head = {
        "inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head).encode()
    return text + raw, f"Inference-Header-Content-Length: {len(text)}"


def nap(seconds: float, *fields: str, sent_id: str = "") -> bytes:
    """Return a request that runs for about so long."""
    return ask(NAPPER, json.dumps({"instances": [[rounds_for(seconds)]]}).encode(), *fields, sent_id=sent_id)


def row(name: str, request: bytes, *statuses: int, early: bool = False, logged: tuple[int, ...] | None = None) -> Row:
    """Return a row that sends all at once and reads as many answers as there are statuses."""
    return Row(name, (Write(request), *[Read()] * len(statuses)), statuses, logged, early=early)


def talk(name: str, *turns: tuple[bytes, int]) -> Row:
    """Return a row that sends each part when the answer before it has been read."""
    steps = [step for part, _ in turns for step in (Write(part), Read())]
    return Row(name, tuple(steps), tuple(status for _, status in turns))


def leave(name: str, request: bytes, *, reset: bool = False) -> Row:
    """Return a row whose client leaves in the middle of its body."""
    return Row(name, (Write(request), Pause(0.05), Leave(reset=reset)), (), (GONE,))


def cut(name: str, request: bytes, *statuses: int) -> Row:
    """Return a row that sends a request in two parts, for every place where it can be cut, on one connection."""
    reads = [Read()] * len(statuses)
    steps: list[Step] = []
    for at in range(1, len(request)):
        steps += [Write(request[:at]), Pause(0.0005), Write(request[at:]), *reads]
    return Row(name, tuple(steps), statuses * (len(request) - 1))
