"""What has been answered, on its way to metrics, access lines and spans.

A request only appends to a list. The list is written a few times a second, or sooner when it is long: writing all that
a busy worker answers in a tenth of a second would hold up its event loop for milliseconds.
"""

from typing import NamedTuple

from service.telemetry import metrics
from service.telemetry.log import AccessLog
from service.telemetry.metrics import ModelMetrics
from service.telemetry.tracing import Tracer

CLIENT_CLOSED = 499
BATCH = 64  # requests


class Answered(NamedTuple):
    """One answered request.

    `rows` are the instances in it, `seconds` the time from its head to its response, `metrics` those of the version
    that it named, and `error` the message of a failed response.
    """

    method: str
    path: str
    request_id: bytes
    status: int
    seconds: float
    is_prediction: bool = False
    rows: int = 0
    metrics: ModelMetrics | None = None
    error: str = ""
    trace: bytes = b""


class Recorder:
    """Gathers what one worker has answered; `write` belongs to the event loop's thread, too."""

    def __init__(self, access_log: AccessLog, tracer: Tracer | None) -> None:
        self.answered: list[Answered] = []
        self._access_log = access_log
        self._tracer = tracer

    def write(self) -> None:
        """Count, log and trace what was answered since the last call."""
        answered, self.answered = self.answered, []
        seconds: dict[tuple[ModelMetrics, int], list[float]] = {}
        for one in answered:
            if one.metrics is not None and one.is_prediction and one.status != CLIENT_CLOSED:
                seconds.setdefault((one.metrics, one.status), []).append(one.seconds)
            else:
                _count(one)
            model = "" if one.metrics is None else one.metrics.model
            what = f"{one.method} {one.path}" if one.path else one.method
            self._access_log.add(one.request_id, what, one.status, one.rows, one.seconds, model, one.error)
            if self._tracer is not None and one.is_prediction:
                self._tracer.record(one.request_id, one.trace, model or one.path, one.status, one.rows, one.seconds)
        for (version_metrics, status), each in seconds.items():
            version_metrics.answered(status, each)
            version_metrics.write_batches()  # the registry writes those of served versions; this one may be gone

    def flush(self) -> None:
        """Write what was answered since the last call, and the log lines that have gathered."""
        self.write()
        self._access_log.flush()

    def close(self) -> None:
        """Write what is left, and send the spans that are left."""
        self.flush()
        if self._tracer is not None:
            self._tracer.close()


def _count(one: Answered) -> None:
    """Count what is not an answered prediction of a known version."""
    if one.status == CLIENT_CLOSED:
        metrics.record_dropped("gone") if one.metrics is None else one.metrics.dropped("gone")
    elif one.is_prediction:
        metrics.record_failure(one.status)
    else:
        metrics.record_other(one.status)
