"""Send a case to a server, and tell what came back."""

import asyncio
import re
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import NamedTuple

from tests.conformance.case import HALF_CLOSE, Case

AT_ONCE = 32  # connections
MARKER = b"GET /marker HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
MARKED = "404"  # every server answers so, and no case is answered so last
_PAUSE = 1.0  # between two segments, where the first is not answered
_HEAD = re.compile(rb"HTTP/1\.[01] (\d{3})[^\n]*\n(?:[^\r\n][^\n]*\n)*\r?\n")
_LENGTH = re.compile(rb"\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\ntransfer-encoding: *chunked", re.IGNORECASE)


class Outcome(NamedTuple):
    """What came back, in the form of `case`, and its bytes."""

    text: str
    received: bytes


class _Connection(asyncio.Protocol):
    """Collects what comes back, and counts responses in it."""

    def __init__(self, is_head: bool) -> None:
        self.is_head = is_head  # the first response, so it has no body
        self.received = b""
        self.statuses: list[str] = []
        self.is_closed = False
        self.news = asyncio.Event()
        self._parsed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while head := _HEAD.match(self.received, self._parsed):
            self._parsed = self._find_end(head)
            self.statuses.append(head[1].decode())
        self.news.set()

    def eof_received(self) -> None:
        self.is_closed = True
        self.news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.eof_received()

    @property
    def answered(self) -> int:
        """How many requests have been answered."""
        return sum(status >= "2" for status in self.statuses)

    async def wait_for_any(self, seconds: float) -> None:
        """Wait until something has come back; give up after a while."""
        with suppress(TimeoutError):
            while not self.received and not self.is_closed:
                self.news.clear()
                await asyncio.wait_for(self.news.wait(), seconds)

    async def wait(self, count: int, seconds: float) -> None:
        """Wait until so many requests are answered, or the server has closed; give up after a silence."""
        with suppress(TimeoutError):
            while self.answered < count and not self.is_closed:
                self.news.clear()
                await asyncio.wait_for(self.news.wait(), seconds)

    def _find_end(self, head: re.Match[bytes]) -> int:
        end = head.end()
        if (self.is_head and not self.statuses) or self.received[end : end + 5] == b"HTTP/":
            return end
        if length := _LENGTH.search(head[0]):
            return end + int(length[1])
        if _CHUNKED.search(head[0]):
            return self.received.find(b"0\r\n\r\n", end) + 5 if b"0\r\n\r\n" in self.received[end:] else end
        return end


def judge(case: Case, outcome: Outcome) -> str:
    """Return "best", "allowed" or "wrong"."""
    text = outcome.received.decode("latin-1")
    if (case.wanted and not re.search(case.wanted, text)) or (case.unwanted and re.search(case.unwanted, text)):
        return "wrong"
    best = case.best.split()
    allowed = case.allowed.split()
    if all(pattern == "-" or re.fullmatch("[45][0-9]+", pattern) for pattern in best):
        allowed += ["4??", "5??"]  # refused, if by another status
    for verdict, patterns in (("best", best), ("allowed", allowed)):
        if any(fnmatchcase(outcome.text, pattern) for pattern in patterns):
            return verdict
    return "wrong"


async def run_cases(port: int, cases: Iterable[Case], patience: float, bytewise: bool = False) -> dict[str, Outcome]:
    """Run cases against a server on this machine, many at once.

    Args:
        port: the server's.
        cases: what to send.
        patience: seconds without a byte after which a server counts as waiting.
        bytewise: send each byte by itself.
    """
    limit = asyncio.Semaphore(AT_ONCE)

    async def run(case: Case) -> tuple[str, Outcome]:
        async with limit:
            return case.name, await _run_case(port, case, patience, bytewise)

    return dict(await asyncio.gather(*map(run, cases)))


async def _run_case(port: int, case: Case, patience: float, bytewise: bool) -> Outcome:
    is_head = case.sent[:4] == "HEAD"
    _, wire = await asyncio.get_running_loop().create_connection(lambda: _Connection(is_head), "127.0.0.1", port)
    try:
        end = await _exchange(wire, case, patience, bytewise)
    finally:
        wire.transport.abort()
    return Outcome(",".join(wire.statuses) + end or "-", wire.received)


async def _exchange(wire: _Connection, case: Case, patience: float, bytewise: bool) -> str:
    """Send a case, and whether the connection is usable then; return how it ended."""
    segments = (case.sent,) if isinstance(case.sent, str) else case.sent
    for index, segment in enumerate(segments):
        if index and segment != HALF_CLOSE:
            await wire.wait_for_any(_PAUSE)
        if segment == HALF_CLOSE:
            wire.transport.write_eof()
        else:
            await _send(wire, segment.encode("latin-1"), bytewise)
    await wire.wait(1, patience)
    if HALF_CLOSE not in segments:
        if not wire.answered:
            return "" if wire.is_closed else "~"
        wire.transport.write(MARKER)
    await wire.wait(10_000, patience)
    if HALF_CLOSE not in segments and wire.answered > 1 and wire.statuses[-1] == MARKED:
        wire.statuses.pop()
        return "+"
    return "" if wire.is_closed else "~"


async def _send(wire: _Connection, data: bytes, bytewise: bool) -> None:
    step = 1 if bytewise else len(data)
    start = 0
    while start < len(data) and not wire.is_closed:
        wire.transport.write(data[start : start + step])
        start += step
        step = step if start < 1000 else 2**14
        if bytewise:
            await asyncio.sleep(0)
