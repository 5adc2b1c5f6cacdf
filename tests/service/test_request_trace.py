"""How far a prediction travels through the code: its calls, and how often they change from one file to another.

A reader follows a request by these hops, so they are held to a budget. `pytest -s` prints the whole trace.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from service import __file__ as package
from service.app import create_app
from service.http.protocol import HttpProtocol
from service.settings import Settings

ROOT = Path(package).parent
DIGIT = [0.5] * 784
TENSOR = {"name": "inputs", "shape": [1, 784], "datatype": "FP32", "data": DIGIT}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "/v1/models/mnist:predict": ({"instances": [DIGIT]}, 40, 12),
    "/v2/models/mnist/infer": ({"inputs": [TENSOR]}, 50, 14),
}
PARSED_CALLS, PARSED_CHANGES = 17, 4  # more, where the parser calls back for each part of a head that is new
Call = tuple[str, str]
"""A file below `service/`, and a function in it."""


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep bytes."""
        self.written += data

    def is_closing(self) -> bool:
        """Stay open."""
        return False


def build_request(path: str, body: dict[str, Any], agent: str = "python-requests/2.32") -> bytes:
    """Return a request as `requests` would send it."""
    content = json.dumps(body).encode()
    fields = ["Host: x", f"User-Agent: {agent}", "Accept-Encoding: gzip, deflate", "Accept: */*"]
    fields += ["Connection: keep-alive", f"Content-Length: {len(content)}", "Content-Type: application/json"]
    return "\r\n".join([f"POST {path} HTTP/1.1", *fields, "", ""]).encode() + content


def trace(run: Callable[[], object]) -> list[Call]:
    """Return the calls of functions below `service/` while something runs, in order."""
    calls: list[Call] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT):
            calls.append((str(file.relative_to(ROOT)), frame.f_code.co_name))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def list_stops(calls: list[Call]) -> list[str]:
    """Return the files that calls pass through; one entry for calls in a row in the same file."""
    files = [file for file, _ in calls]
    return [file for before, file in zip(["", *files], files, strict=False) if file != before]


@pytest.mark.parametrize("is_new", [False, True], ids=["known head", "new head"])
@pytest.mark.parametrize("path", CASES)
def test_prediction_takes_a_short_way(path: str, is_new: bool, published: Path) -> None:
    """A prediction makes few calls through few files, and its response passes no file that its request has left."""
    body, most_calls, most_changes = CASES[path]
    request = build_request(path, body, agent="another") if is_new else build_request(path, body)
    calls: list[Call] = []

    async def predict_twice() -> None:
        loop = asyncio.get_running_loop()
        connection = HttpProtocol(create_app(Settings(models_dir=published, device="cpu")), set())
        wire = Wire()
        connection.connection_made(wire)
        connection.data_received(build_request(path, body))  # fills caches
        while not wire.written:
            await asyncio.sleep(0)
        wire.written = b""
        flush: list[Callable[[], object]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(connection.loop, "call_soon", flush.append, raising=False)
            calls.extend(trace(lambda: connection.data_received(request)))
        assert len(flush) == 1
        loop.call_soon(lambda: calls.extend(trace(flush[0])))
        while not wire.written:
            await asyncio.sleep(0)
        assert wire.written.startswith(b"HTTP/1.1 200 OK")

    asyncio.run(predict_twice())
    stops = list_stops(calls)
    print(f"\n{path}{', a new head' * is_new}: {len(calls)} calls, {len(stops) - 1} changes of file")
    for file, function in calls:
        print(f"    {file:32} {function}")
    turn = calls.index(next(call for call in calls if call[1] == "_flush"))
    left = {file for file, _ in calls[:turn]} - {"http/protocol.py", "request.py", "model/batching.py"}
    assert left.isdisjoint(file for file, _ in calls[turn:])
    assert len(calls) <= most_calls + PARSED_CALLS * is_new
    assert len(stops) - 1 <= most_changes + PARSED_CHANGES * is_new
