"""One OpenTelemetry span per prediction, where the `otel` extra is installed and an endpoint is configured.

The standard variables decide (https://opentelemetry.io/docs/specs/otel/protocol/exporter): OTEL_EXPORTER_OTLP_ENDPOINT
or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is the collector, OTEL_SERVICE_NAME the service's name. A span continues the
caller's `traceparent`. Without an endpoint nothing is imported.
"""

import logging
import os
import time
from typing import Any

from service import __version__

logger = logging.getLogger("service")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_FIRST_OWN_FAILURE = 500


class Tracer:
    """Sends spans in the background of one worker; `close` sends what is left."""

    def __init__(self, provider: Any) -> None:  # noqa: ANN401 - opentelemetry is optional
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._provider = provider
        self._tracer = provider.get_tracer("service", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request_id: bytes, trace: bytes, what: str, status: int, rows: int, seconds: float) -> None:
        """Send the span of a request that has just been answered.

        Args:
            request_id: the response's `X-Request-ID`.
            trace: the request's `traceparent`, which names the parent span, or nothing.
            what: model and version.
            status: of the response.
            rows: instances in the request.
            seconds: from the request's head to its response.
        """
        from opentelemetry.trace import SpanKind, StatusCode  # noqa: PLC0415

        ended = time.time_ns()
        span = self._tracer.start_span(
            f"predict {what}",
            context=self._propagator.extract({"traceparent": trace.decode("latin-1")}),
            kind=SpanKind.SERVER,
            start_time=ended - int(seconds * 1e9),
            attributes={
                "http.response.status_code": status,
                "service.model": what,
                "service.instances": rows,
                "service.request_id": request_id.decode("latin-1"),
            },
        )
        if status >= _FIRST_OWN_FAILURE:
            span.set_status(StatusCode.ERROR)
        span.end(ended)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def open_tracer() -> Tracer | None:
    """Return a tracer where one is configured and installed, else None."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        logger.warning("an OTLP endpoint is configured, but spans need the otel extra: pip install '.[otel]'")
        return None
    name = os.environ.get("OTEL_SERVICE_NAME", "model-service")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)
