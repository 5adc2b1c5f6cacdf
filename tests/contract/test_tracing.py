"""OpenTelemetry spans, from a real server to a collector that speaks OTLP over HTTP."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.servers import Server

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
DEADLINE_SECONDS = 20


class Collector(HTTPServer):
    """Keeps the spans it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        """Keep the body and say that all is well."""
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector on a free port."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_span_continues_the_callers_trace(collector: Collector, models_dir: Path) -> None:
    """A prediction becomes one span under the caller's traceparent, and is sent before the service ends."""
    endpoint = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
    }
    with Server(models_dir, "--workers", "1", environment=endpoint) as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        body = {"instances": [[2], [3]]}
        assert server.post("/v1/models/doubler:predict", json=body, headers=headers).status_code == 200
        assert server.stop() == 0
    until = time.monotonic() + DEADLINE_SECONDS
    while not collector.bodies and time.monotonic() < until:
        time.sleep(0.05)
    (request,) = (ExportTraceServiceRequest.FromString(each) for each in collector.bodies)
    (span,) = request.resource_spans[0].scope_spans[0].spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name.startswith("predict doubler/")
    found = {each.key: each.value.int_value for each in span.attributes}
    assert (found["http.response.status_code"], found["service.instances"]) == (200, 2)
    assert span.end_time_unix_nano >= span.start_time_unix_nano
