"""`model_service.client` against the service, and against one that refuses first."""

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from model_service.client import AsyncClient, CallError, Client, encode_instances
from tests import columns
from tests.servers import Server


def test_arrays_frames_and_parameters(server: Server) -> None:
    """Rows in, columns out; both clients give the same, of any version."""
    rows = np.array([[0.9, 0.1], [0.1, 0.9]], np.float32)
    with Client(server.url) as client:
        answer = client.predict("coin", rows, threshold=0.5)
        assert (answer.model, answer.version) == ("coin", 1)
        assert answer.column("label").tolist() == ["heads", "tails"]
        assert answer.column("probabilities").shape == (2, 2)
        framed = client.predict("coin", pd.DataFrame(rows, columns=["a", "b"]), threshold=0.5, version=1)
        assert framed == answer
        assert framed.to_frame()["label"].tolist() == ["heads", "tails"]
        assert {model["name"] for model in client.models()} >= {"coin", "doubler"}

    async def ask() -> None:
        async with AsyncClient(f"{server.url}/") as client:
            assert await client.predict("coin", rows, threshold=0.5) == answer
            assert len(await client.models()) > 1
            with pytest.raises(CallError, match="unknown model"):
                await client.predict("nosuch", rows)

    asyncio.run(ask())


def test_refusals_are_the_services_own_sentences(server: Server) -> None:
    """A wrong row is not sent again; its status and sentence are in the error."""
    with Client(server.url) as client, pytest.raises(CallError, match=r"instances\[0\]") as caught:
        client.predict("coin", [[1, 2, 3]])
    assert caught.value.status == 400


def test_missing_values_times_and_pictures(tmp_path: Path) -> None:
    """NaN and NaT are null, times ISO 8601, and paths and bytes pictures."""
    frame = pd.DataFrame({"age": [1.5, np.nan], "since": [pd.Timestamp("2024-01-31"), pd.NaT], "city": ["Oslo", None]})
    assert encode_instances(frame) == [
        {"age": 1.5, "since": "2024-01-31T00:00:00", "city": "Oslo"},
        {"age": None, "since": None, "city": None},
    ]
    (tmp_path / "a.png").write_bytes(b"abc")
    assert encode_instances([tmp_path / "a.png", b"abc"]) == [{"b64": "YWJj"}] * 2


def test_typed_columns_are_taken_from_a_frame(tmp_path: Path) -> None:
    """A model of typed columns takes a frame with missing values."""
    columns.write_all(tmp_path)
    with Server(tmp_path, "--workers", "1") as server, Client(server.url) as client:
        described = next(model for model in client.models() if model["name"] == "spam")
        sample = server.get("/v1/models/spam/card").json()["golden"]
        rows = sample["inputs"] if sample else [{column["name"]: "text" for column in described["input"]["columns"]}]
        assert client.predict("spam", pd.DataFrame(rows)).column("label").shape == (len(rows),)


@pytest.fixture
def busy() -> Iterator[tuple[str, list[float]]]:
    """A service that has no room twice, and then answers; with the times of its requests."""
    times: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            times.append(time.monotonic())
            self.rfile.read(int(self.headers["Content-Length"]))
            is_full = len(times) < 3
            body = b'{"error": "the queue is full"}' if is_full else b'{"model": "m", "version": 1, "predictions": []}'
            self.send_response(503 if is_full else 200)
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    service = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=service.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{service.server_port}", times
    service.shutdown()
    thread.join()
    service.server_close()


def test_waits_as_long_as_it_is_told(busy: tuple[str, list[float]]) -> None:
    """503 is sent again after Retry-After, as often as `retries` says."""
    url, times = busy
    with Client(url) as client:
        assert client.predict("m", [[1]]).predictions == []
    assert [after - before >= 0.99 for before, after in pairwise(times)] == [True, True]


def test_gives_up_with_the_last_sentence(busy: tuple[str, list[float]]) -> None:
    """Without retries, the refusal is the error; without a service, there is a sentence too."""
    url, times = busy
    with Client(url, retries=0) as client, pytest.raises(CallError, match="the queue is full"):
        client.predict("m", [[1]])
    assert len(times) == 1
    with Client("http://127.0.0.1:9", retries=1) as client, pytest.raises(CallError, match="no service answers at"):
        client.models()
