"""All that shows of a row at one entry: answers, log lines and metrics."""

import json
import re
import socket
import struct
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.entries.steps import Pause, Read, Row, Step, Write
from tests.servers import Server
from tests.wire import Reply, Wire, exchange, wait_until

KEY = "secret"
GONE = 499  # the status, nginx's, of a line for a client that left before its answer
LATE_SECONDS = 2.0  # until a line that should be in the log is missed
_READ_SECONDS = 10.0
_COUNTERS = ("service_requests_total", "service_dropped_total", "service_other_requests_total")
_COMPARED = (
    "allow", "connection", "content-encoding", "content-length", "content-type", "inference-header-content-length",
    "retry-after", "traceparent", "vary", "www-authenticate", "x-request-id",
)  # fmt: skip
_MADE = re.compile(r"[0-9a-f]{12}-[0-9a-f]+")  # a request id of the service's own
_PREDICTS = re.compile(r"'?\S+ (/v1/models/[^:]+:predict|/v2/models/.+/infer)'?")  # quoted where it is not printable
_NUMBERS = count()

Counts = Counter[tuple[str, ...]]
"""How often each sample, named by metric and label values, has been counted."""


@dataclass(frozen=True)
class Answer:
    """What is compared of an answer; `body` is decoded where it is JSON."""

    status: int
    headers: dict[str, str]
    body: Any


@dataclass(frozen=True)
class Seen:
    """What shows of a row at one entry."""

    answers: list[Answer]
    lines: list[dict[str, Any]]
    messages: list[tuple[str, str]]
    counts: Counts

    @property
    def statuses(self) -> list[int]:
        """Of the access lines, in order."""
        return [line["status"] for line in self.lines]


def count_lines(lines: list[dict[str, Any]], dropped: tuple[tuple[str, str, str], ...] = ()) -> Counts:
    """Return what must have been counted for these access lines, and for `dropped` (model, version, reason)."""
    counts: Counts = Counter(("service_dropped_total", *labels) for labels in dropped)
    for line in lines:
        name, _, version = line.get("model", "").partition("/")
        if line["status"] == GONE:
            counts["service_dropped_total", name, version, "gone"] += 1
        elif _PREDICTS.fullmatch(line["request"]) and not line["request"].startswith("OPTIONS "):
            counts["service_requests_total", name, version, str(line["status"])] += 1
        else:
            counts["service_other_requests_total", str(line["status"])] += 1
    return counts


def observe(server: Server, row: Row) -> Seen:
    """Play a row on a server and return what shows of it, once nothing of it is in flight any more."""
    before = _read_quiet(server)
    start = server.log().count("\n")
    replies = _play(server.url, row.steps)
    if GONE in row.expected_lines:  # lines of answers are there before their answers
        with suppress(AssertionError):  # what is missing then shows in the comparison
            wait_until(lambda: len(read_access(server, start)) >= len(row.expected_lines), LATE_SECONDS)
    marker = f"/marker/{next(_NUMBERS)}"
    request = f"GET {marker} HTTP/1.1\r\nHost: test\r\nX-API-Key: {KEY}\r\n\r\n".encode()
    with Wire(server.url) as wire:
        assert wire.send(request).read().status == 404
        wait_until(lambda: marker in server.log())  # all before it is in the log, too, and counted
    after = _read_quiet(server)
    after[_COUNTERS[2], "404"] -= 1
    lines = [line for line in read_access(server, start) if marker not in line["request"]]
    if row.wires > 1:
        lines.sort(key=lambda line: (line["status"], line["id"]))
    names = _Names()
    answers = [_compare(reply, names, row.early) for reply in replies]
    return Seen(answers, [line | {"id": names(line["id"])} for line in lines], _messages(server, start), after - before)


def _play(url: str, steps: tuple[Step, ...]) -> list[Reply]:
    wires: dict[int, Wire] = {}
    replies = []
    with ExitStack() as stack:
        for step in steps:
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                continue
            if step.wire not in wires:
                wires[step.wire] = stack.enter_context(Wire(url, _READ_SECONDS))
            wire = wires[step.wire]
            if isinstance(step, Write):
                wire.send(step.data)
            elif isinstance(step, Read):
                replies.append(wire.read())
            else:
                if step.reset:
                    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                wire.close()
    return replies


class _Names:
    """Calls ids that the service made by the order in which they are seen; those of a client stay."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def __call__(self, request_id: str) -> str:
        made = _MADE.fullmatch(request_id)
        return self._seen.setdefault(request_id, f"made {len(self._seen)}") if made else request_id


def _compare(reply: Reply, names: _Names, early: bool) -> Answer:
    sent = reply.headers or {}
    headers = {name: sent[name] for name in _COMPARED if name in sent and not (early and name == "connection")}
    if "x-request-id" in headers:
        headers["x-request-id"] = names(headers["x-request-id"])
    is_json = sent.get("content-type") == "application/json" and "content-encoding" not in sent
    has_json = is_json and reply.body and "inference-header-content-length" not in sent
    return Answer(reply.status, headers, json.loads(reply.body) if has_json else reply.body)


def _read_log(server: Server, start: int) -> list[dict[str, Any]]:
    lines = server.log().split("\n")[start:-1]  # the last may be half a line
    return [json.loads(line) for line in lines]


def read_access(server: Server, start: int = 0) -> list[dict[str, Any]]:
    """Return the access lines from a line of the log on, without what differs from run to run."""
    lines = [line for line in _read_log(server, start) if line["logger"] == "access"]
    return [{name: value for name, value in line.items() if name not in ("time", "ms")} for line in lines]


def _messages(server: Server, start: int) -> list[tuple[str, str]]:
    lines = [line for line in _read_log(server, start) if line["logger"] != "access"]
    return [(line["level"], line["message"]) for line in lines]


def _read_quiet(server: Server) -> Counts:
    """Wait until no prediction is in flight, waits or runs; return what has been counted."""
    found: Counts = Counter()

    def is_quiet() -> bool:
        nonlocal found
        found, busy = _read_metrics(server)
        return busy == 0

    wait_until(is_quiet, _READ_SECONDS)
    return found


def _read_metrics(server: Server) -> tuple[Counts, float]:
    reply = exchange(server.url, f"GET /metrics HTTP/1.1\r\nHost: test\r\nX-API-Key: {KEY}\r\n\r\n".encode())
    counts: Counts = Counter()
    busy = 0.0
    for family in text_string_to_metric_families(reply.body.decode()):
        for sample in family.samples:
            if sample.name in _COUNTERS:
                labels = (
                    sample.labels[name] for name in ("model", "version", "code", "reason") if name in sample.labels
                )
                counts[sample.name, *labels] += int(sample.value)
            elif sample.name in ("service_requests_in_flight", "service_queue_rows"):
                busy += sample.value
    return counts, busy
