"""What operators watch, in Prometheus' text format, summed over all worker processes.

A worker writes its metrics ten times a second, so one that is killed loses a tenth of a second of them at most. Any
worker answers for all of them, including those that have died; see `shared_metrics`.
"""

import time
from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.telemetry.shared_metrics import COLLECTOR, Counter, Gauge, Histogram

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MODEL = ("model", "version")

_requests = Counter("service_requests", "Predict requests answered, by status code", (*_MODEL, "code"))
_request_seconds = Histogram(
    "service_request_seconds", "From a predict request's head to its answer", _MODEL, buckets=_SECONDS
)
_queue_seconds = Histogram(
    "service_queue_seconds", "How long the oldest request of a batch waited for the backend", _MODEL, buckets=_SECONDS
)
_inference_seconds = Histogram("service_inference_seconds", "One backend call", _MODEL, buckets=_SECONDS)
_batch_rows = Histogram("service_batch_rows", "Instances in one backend call", _MODEL, buckets=_ROWS)
_dropped = Counter(
    "service_dropped",
    "Requests given up: queue full, too long for the deadline (overload), deadline expired, client gone",
    (*_MODEL, "reason"),
)
_out_of_range = Counter(
    "service_out_of_range", "Numbers that were answered although outside the range of their column", (*_MODEL, "column")
)
_others = Counter("service_other_requests", "Requests answered that are no predict requests, by status code", ("code",))
_in_flight = Gauge("service_requests_in_flight", "Predict requests being answered", is_live=True)
_queue_rows = Gauge("service_queue_rows", "Instances that wait or run", _MODEL, is_live=True)
_backlog = Gauge(
    "service_queue_backlog_seconds",
    "Estimated seconds until all instances that wait or run are answered, in the process with the most",
    _MODEL,
    combine=max,
    is_live=True,
)
_served = Gauge(
    "service_model_info",
    "Workers that serve a version, by where it runs",
    (*_MODEL, "backend", "device", "provider"),
    is_live=True,
)
# Without labels these two are there from the start, so that a rule can tell 0 from a service that is not scraped.
_models_serving = Gauge(
    "service_models_serving", "Models of which a version serves; 0 for an empty folder", combine=max, is_live=True
)
_restarts = Counter("service_worker_restarts", "Workers started again because the one before them ended")
_last_request = Gauge(
    "service_last_request_seconds", "When the last request was answered, since 1970", _MODEL, combine=max
)
_refused = Gauge("service_model_refused", "Workers that refuse a version", _MODEL, is_live=True)


class ModelMetrics:
    """The metrics of one version. The batcher appends to `batches`, on the request path; `write` adds them up.

    An entry of `batches` is one backend call: its rows, the seconds that its oldest request waited, and the seconds
    that it took.

    Args:
        name: of the model.
        version: its number.
        is_shown: whether its figures are there from the start.
    """

    def __init__(self, name: str, version: int, is_shown: bool = True) -> None:
        self.model = f"{name}/{version}"
        self.batches: list[tuple[int, float, float]] = []
        self._labels = (name, str(version))
        self._shown_rows = 0
        if is_shown:
            self.show()

    def show(self) -> None:
        """Have all its figures there, zeros at first, so that a rate sees the first request."""
        for histogram in (_request_seconds, _queue_seconds, _inference_seconds, _batch_rows):
            histogram.observe((), *self._labels)
        for gauge in (_queue_rows, _backlog):
            gauge.set(0, *self._labels)

    def answered(self, code: int, seconds: Sequence[float]) -> None:
        """Count answered requests of one status; `seconds` are from each request's head to its response."""
        _requests.add(len(seconds), *self._labels, str(code))
        _request_seconds.observe(seconds, *self._labels)

    def dropped(self, reason: str) -> None:
        """Count a request that was given up: "full", "overload", "expired" or "gone"."""
        _dropped.add(1, *self._labels, reason)

    def write_batches(self) -> None:
        """Add up the backend calls since the last time."""
        if not self.batches:
            return
        batches, self.batches = self.batches, []
        _batch_rows.observe([rows for rows, _, _ in batches], *self._labels)
        _queue_seconds.observe([waited for _, waited, _ in batches], *self._labels)
        _inference_seconds.observe([ran for _, _, ran in batches], *self._labels)
        _last_request.set(time.time(), *self._labels)

    def write(self, queue_rows: int, backlog: float = 0.0) -> None:
        """Add up the backend calls since the last time, and set the gauges of the queue.

        Args:
            queue_rows: that wait or run.
            backlog: seconds until they are answered.
        """
        if queue_rows or self._shown_rows:
            self._shown_rows = queue_rows
            _queue_rows.set(queue_rows, *self._labels)
            _backlog.set(backlog, *self._labels)
        self.write_batches()


def record_failure(code: int) -> None:
    """Count a predict request for no known model. It has no model label: callers could invent any number of names."""
    _requests.add(1, "", "", str(code))


def record_dropped(reason: str) -> None:
    """Count a connection that was given up: it was too slow to send a request, or to read its response."""
    _dropped.add(1, "", "", reason)


def record_out_of_range(name: str, version: int, column: str, count: int) -> None:
    """Count numbers of a request that are outside the range which their column's manifest says."""
    _out_of_range.add(count, name, str(version), column)


def record_other(code: int) -> None:
    """Count a response to anything but a predict request."""
    _others.add(1, str(code))


def record_served(name: str, version: int, backend: str, device: str, provider: str, serves: bool) -> None:
    """Say whether this worker serves a version."""
    _served.set(int(serves), name, str(version), backend, device, provider)


def record_refused(name: str, version: str, refuses: bool) -> None:
    """Say whether this worker refuses a version."""
    _refused.set(int(refuses), name, version)


def set_serving(models: int) -> None:
    """Set how many models have a version that this worker serves."""
    _models_serving.set(models)


def record_restart() -> None:
    """Count a worker that replaces one that ended; called by the parent of the workers."""
    _restarts.add(1)


def set_in_flight(count: int) -> None:
    """Set how many predict requests this worker is answering."""
    _in_flight.set(count)


def render() -> bytes:
    """Return the metrics of all workers as text."""
    return generate_latest(COLLECTOR)


Totals = dict[tuple[str, str, str], float]


def read_totals(*version: str) -> Totals:
    """Return sums over all workers by sample, model and version; "succeeded" are the requests answered 200.

    Args:
        version: the name of a model and its version, to return no others.
    """
    totals: Totals = {}
    for family in COLLECTOR.collect(*version):
        for sample in family.samples:
            labels = sample.labels
            if "model" not in labels or sample.name.endswith("_bucket"):
                continue
            key = (sample.name, labels["model"], labels["version"])
            totals[key] = totals.get(key, 0.0) + sample.value
            if sample.name == "service_requests_total" and labels["code"] == "200":
                totals["succeeded", labels["model"], labels["version"]] = sample.value
    return totals
