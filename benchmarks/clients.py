"""Clients for large bodies, where wrk and requests cost too much: HTTP/1.1 on asyncio, closed loop or open loop."""

import asyncio
import re
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import uvloop

HOST = "127.0.0.1"
OK, REFUSED, TIMED_OUT = 200, 503, 504
MAX_IN_FLIGHT = 800  # of the open loop: at 600 kB each, 480 MB of bodies
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_PAUSE = 0.05  # seconds after a response that is not 200
_LINGER = 10.0  # seconds that the open loop waits for its last responses
Result = TypeVar("Result")


class Response(NamedTuple):
    """When a request was sent, when its response was complete (`time.perf_counter`), and the status; 0 for none."""

    sent: float
    done: float
    status: int

    @property
    def milliseconds(self) -> float:
        """Latency."""
        return (self.done - self.sent) * 1e3


@dataclass
class Pool:
    """Latencies (ms) of several spells of load, and what was completed in how many seconds."""

    latencies: list[float] = field(default_factory=list)
    completed: int = 0
    seconds: float = 0.0
    failed: int = 0

    @property
    def rate(self) -> float:
        """Completions a second."""
        return self.completed / self.seconds if self.seconds else float("nan")

    def percentile(self, percent: float) -> float:
        """Return a percentile of the latencies in ms; NaN where there is none."""
        return float(np.percentile(self.latencies, percent)) if self.latencies else float("nan")

    def add(self, responses: list[Response], start: float, end: float) -> None:
        """Count the responses that were complete in a window of time.

        Batches complete together, so whole ones are counted: from the last response before the window to the last one
        in it.
        """
        done = sorted(response.done for response in responses)
        first = max((moment for moment in done if moment <= start), default=start)
        last = max((moment for moment in done if moment <= end), default=first)
        inside = [response for response in responses if first < response.done <= last]
        good = [response for response in inside if response.status == OK]
        self.latencies += [response.milliseconds for response in good]
        self.completed += len(good)
        self.failed += len(inside) - len(good)
        self.seconds += last - first


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request in flight."""

    def __init__(self) -> None:
        self.is_open = False
        self.body = b""  # of the last response
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._waiter: asyncio.Future[int] | None = None

    async def ask(self, request: bytes) -> Response:
        """Send a request and wait for its whole response."""
        assert self._transport is not None
        self._waiter = asyncio.get_running_loop().create_future()
        sent = time.perf_counter()
        self._transport.write(request)
        status = await self._waiter
        return Response(sent, time.perf_counter(), status)

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport, self.is_open = cast(asyncio.Transport, transport), True  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._received[: end + 2])
        length = _LENGTH.search(head)
        if len(self._received) < end + 4 + (int(length[1]) if length else 0):
            return
        self.body = bytes(self._received[end + 4 :])
        self._received.clear()
        self.is_open = self.is_open and not _CLOSES.search(head)
        self._resolve(int(head[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        del exc
        self.is_open = False
        self._resolve(0)

    def _resolve(self, status: int) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(status)


def build_request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return the bytes of a POST."""
    fields = {"Host": HOST, "Content-Length": str(len(body))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def run_closed(port: int, request: bytes, clients: int, seconds: float, ramp: float, pool: Pool) -> None:
    """Load a server with clients that each wait for their response, and add what is seen after `ramp` seconds."""
    _run(closed_loop(port, request, clients, seconds, ramp, pool))


async def closed_loop(port: int, request: bytes, clients: int, seconds: float, ramp: float, pool: Pool) -> None:
    """Do `run_closed`."""
    start = time.perf_counter() + ramp
    responses: list[Response] = []

    async def repeat() -> None:
        connection = await connect(port)
        while time.perf_counter() < start + seconds:
            if not connection.is_open:
                connection.close()
                connection = await connect(port)
            responses.append(await connection.ask(request))
            if responses[-1].status != OK:
                await asyncio.sleep(_PAUSE)
        connection.close()

    await asyncio.gather(*(repeat() for _ in range(clients)))
    pool.add(responses, start, start + seconds)


def run_open(port: int, request: bytes, rate: float, seconds: float) -> list[Response]:
    """Send requests at even intervals whatever the responses, and return those; see `MAX_IN_FLIGHT`."""
    return _run(_open_loop(port, request, rate, seconds))


async def _open_loop(port: int, request: bytes, rate: float, seconds: float) -> list[Response]:
    idle: list[Connection] = []
    responses: list[Response] = []
    tasks: set[asyncio.Task[None]] = set()

    async def send() -> None:
        began = time.perf_counter()
        try:
            connection = idle.pop() if idle else await connect(port)
        except OSError:
            responses.append(Response(began, time.perf_counter(), 0))
            return
        try:
            responses.append(await connection.ask(request))
        finally:
            if connection.is_open:
                idle.append(connection)
            else:
                connection.close()

    start = time.perf_counter()
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        while len(tasks) >= MAX_IN_FLIGHT:
            await asyncio.sleep(0.001)
        if time.perf_counter() > start + seconds:  # the limit on requests in flight has held it up
            break
        idle[:] = [connection for connection in idle if connection.is_open]
        task = asyncio.create_task(send())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    unanswered = len((await asyncio.wait(tasks, timeout=_LINGER))[1]) if tasks else 0
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for connection in idle:
        connection.close()
    now = time.perf_counter()
    return [*responses, *[Response(now - _LINGER, now, 0)] * unanswered]


async def connect(port: int) -> Connection:
    """Open a connection to a server on this machine."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, HOST, port)
    return connection


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
