"""One table of requests, sent by both ways in: our own HTTP host, and the ASGI application under a stock uvicorn.

Each row must show the same at both: status, body and header fields of every answer, lines in the access log, counts in
/metrics.
"""

import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import fakes
from tests.entries.build import GOOD, LIMIT, V1, ask, nap
from tests.entries.observe import KEY, Seen, count_lines, observe, read_access
from tests.entries.steps import Row
from tests.entries.stock import StockServer
from tests.entries.table import TABLE
from tests.servers import Server
from tests.wire import Wire, napper, rounds_for, thrower


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each kind, one that is slow, and one that fails."""
    root: Path = tmp_path_factory.mktemp("entries")
    slow = napper(least=rounds_for(0.02))  # too slow to run on the event loop
    for each in (fakes.doubler(), fakes.doubler(version=2), fakes.coin(), fakes.canvas(), slow, thrower()):
        fakes.write_version(root, each.only("onnx"))
    return root


def start(models: Path, stack: ExitStack) -> tuple[Server, Server]:
    """Start both at once; the stack ends them."""
    flags = ("--device", "cpu", "--log-format", "json", "--reload-interval", "0", "--api-key", KEY)
    inline = ("--placement", "inline")  # as in the other, which has no engine
    own = Server(models, *flags, *inline, "--workers", "1", "--max-request-bytes", str(LIMIT))
    stock = StockServer(models, *flags, "--max-request-bytes", str(LIMIT))
    stack.callback(end, own)
    stack.callback(end, stock)
    return stack.enter_context(own), stack.enter_context(stock)


def end(server: Server) -> None:
    """Kill a server that was not stopped, such as one whose companion did not start."""
    if server.process.returncode is None:
        server.kill()


@pytest.fixture(scope="module")
def entries(models: Path) -> Iterator[tuple[Server, Server]]:
    """Our own host and a stock one, on the same models with the same settings."""
    with ExitStack() as stack:
        yield start(models, stack)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: re.sub(r"[\[\]]", "", row.name))
def test_both_entries_show_the_same(row: Row, entries: tuple[Server, Server]) -> None:
    """Answers, log lines and counts are those that the row wants, and the same at both entries."""
    with ThreadPoolExecutor(2) as pool:
        own, stock = pool.map(lambda server: observe(server, row), entries)
    assert (list_statuses(own), list_statuses(stock)) == ((list(row.statuses), row.expected_lines),) * 2
    assert own.answers == stock.answers
    assert (own.lines, own.messages) == (stock.lines, stock.messages)
    for seen in (own, stock):
        assert seen.counts == count_lines(seen.lines, row.dropped)


def list_statuses(seen: Seen) -> tuple[list[int], list[int]]:
    """Return the statuses of the answers and those of the access lines."""
    return [answer.status for answer in seen.answers], seen.statuses


def test_drain_shows_the_same(models: Path) -> None:
    """After SIGTERM what runs and what is still arriving is answered, and then its connection ends, an idle one too."""
    with ExitStack() as stack:
        servers = start(models, stack)
        with ThreadPoolExecutor(2) as pool:
            own, stock = pool.map(drain, servers, [nap(0.8, sent_id="runs")] * 2)
    assert own == stock
    assert [status for status, _ in own[0]] == [200, 200, 0, 0, 0]


def drain(server: Server, slow: bytes) -> tuple[list[tuple[int, bytes]], list[dict[str, object]]]:
    """End a server with requests in flight; return the answers and the access lines."""
    with Wire(server.url) as runs, Wire(server.url) as arrives, Wire(server.url) as idle:
        body = ask(V1, GOOD, sent_id="arrives")
        idle.send(ask(V1, GOOD, sent_id="idle")).read()
        runs.send(slow)
        arrives.send(body[:-5])
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        arrives.send(body[-5:])
        replies = [wire.read() for wire in (arrives, runs, arrives, runs, idle)]
    assert server.process.wait(20) == 0
    assert not server.members()
    server.kill()
    if not isinstance(server, StockServer):
        assert [(reply.headers or {}).get("connection") for reply in replies[:2]] == ["close", "close"]
    return [(reply.status, reply.body) for reply in replies], read_access(server)
